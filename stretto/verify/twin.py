"""A layout against one process, or against another layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from stretto.arguments.schema import Arguments
from stretto.batch import Batch
from stretto.layout import Layout
from stretto.verify.compare import (
    ROUNDING,
    ROUNDING_FP8,
    TOLERANCE,
    UPDATE_SLACK,
    Comparison,
    Difference,
    Quantity,
    Trace,
    differences,
    factor,
    initial_differences,
    trace,
)
from stretto.verify.session import build, random_batch, random_weights
from stretto.world import World

ONE_PROCESS = Layout.of()


def against_twin(
    args: Arguments, layout: Layout, world: World, *, twin: Layout = ONE_PROCESS, steps: int = 2, seed: int = 0
) -> Comparison:
    """Compare a layout with its twin, from the same random weights and batches.

    The twin, by default one process, runs on the first ranks of the world while the layout's run lives on all of
    them; every rank gets the comparison. The initial weights that both draw must be the same bits; then both run from
    others, in which nothing is zero or one. AdamW gets an eps of at least 1e-3: with its usual one the first updates
    are the signs of the gradients, and rounding flips signs. Raises ValueError when the twin has more ranks than the
    world.
    """
    args = replace(args, optimizer=replace(args.optimizer, eps=max(args.optimizer.eps, 1e-3)))
    batches = [random_batch(args, seed + 1 + k) for k in range(steps)]
    with build(args, layout, world) as session:
        weights = random_weights(session, seed)
        tried = trace(session, weights, batches)
        other = _Twin(args, twin, world, weights, batches)
        unequal = dict.fromkeys(name for rank in session.from_all(tried.unequal) for name in rank)
        return Comparison(session.from_first(_found(other, tried)), tuple(unequal))


@dataclass(frozen=True)
class _Twin:
    """How the twin runs, in any dtype."""

    args: Arguments
    layout: Layout
    world: World
    weights: Mapping[str, Tensor]
    batches: Sequence[Batch]

    def trace(self, dtype: Literal["fp32", "bf16", "fp64"]) -> Trace | None:
        """What it shows, in fp8 where the run is and `dtype` is the run's; None on ranks that it does not need."""
        world = first_ranks(self.world, self.layout.world)
        if world is None:
            return None
        run = self.args.run
        args = replace(self.args, run=run if dtype == run.dtype else replace(run, dtype=dtype, fp8="none"))
        with build(args, self.layout, world) as session:
            return trace(session, self.weights, self.batches)


def _found(twin: _Twin, tried: Trace) -> tuple[Difference, ...]:
    """What `tried` differs in from its twin, with the limits of its dtype."""
    dtype = twin.args.run.dtype
    own = twin.trace(dtype)
    step = ROUNDING.get(dtype) if twin.args.run.fp8 == "none" else ROUNDING_FP8
    exact = None if step is None else twin.trace("fp64")
    if own is None:
        return ()
    limits = dict.fromkeys((first := initial_differences(own, tried)), 0.0)
    if step is None or exact is None:
        found = differences(own, tried, twin.weights)
        limits |= {q: TOLERANCE[dtype] * (UPDATE_SLACK if q.kind == "update" else 1.0) for q in found}
    else:
        usual = differences(exact, own, twin.weights, ord=2)
        found = differences(exact, tried, twin.weights, ord=2)
        limits |= {q: 2 * max(error, step) for q, error in over_layers(usual).items()}
    all_found = (Difference(q, e, limits[q]) for q, e in (first | found).items())
    return tuple(replace(d, factor=factor(own, tried, d.quantity)) if d.exceeds else d for d in all_found)


def over_layers(errors: Mapping[Quantity, float]) -> dict[Quantity, float]:
    """For each quantity the largest error of those that differ from it in the number of the layer alone.

    What rounding does to one tensor is one draw of chance, and may be small by luck; other layers are other draws.
    """
    largest: dict[Quantity, float] = {}
    for q, error in errors.items():
        role = _role(q)
        largest[role] = max(largest.get(role, 0.0), error)
    return {q: largest[_role(q)] for q in errors}


def _role(q: Quantity) -> Quantity:
    return q._replace(of=re.sub(r"\blayers\.\d+\b", "layers.*", q.of))


def first_ranks(world: World, n: int) -> World | None:
    """The first `n` ranks of a world as a world of their own; None on the others.

    Raises ValueError when there are fewer.
    """
    if n > world.size:
        raise ValueError(f"a reference of {n} ranks does not fit into a world of {world.size}")
    if world.rank >= n:
        return None
    if n == 1:
        return World.single(world.device)
    return replace(world, size=n, ranks=world.ranks[:n])
