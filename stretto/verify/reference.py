"""A layout against one process, or against another layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from stretto.arguments.schema import Arguments
from stretto.batch import Batch
from stretto.estimate import count_parameters
from stretto.initialize.settings import cores
from stretto.layout import Layout
from stretto.verify.compare import (
    MOMENTS_SLACK,
    PROJECTED,
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
from stretto.verify.full import CPU
from stretto.verify.session import Session, build, random_batch, random_weights
from stretto.world import World

ONE_PROCESS = Layout.of()

OTHERWISE: Final = 8
"""Further runs of the reference, each rounding otherwise, where rounding is coarse. Of 100 right runs in bf16 20
exceeded twice the error of a single one somewhere, 3 that of the largest of five, 1 that of nine (docs/verify.md)."""


def against_reference(
    args: Arguments, layout: Layout, world: World, *, reference: Layout = ONE_PROCESS, steps: int = 2, seed: int = 0
) -> Comparison:
    """Compare a layout with its reference, from the same random weights and batches.

    The reference, by default one process, runs on the first ranks of the world while the layout's run lives on all of
    them; every rank gets the comparison. Further runs of one process go to ranks that would only wait. The initial
    weights that both draw must be the same bits; then both run from others, in which nothing is zero or one. AdamW gets
    an eps of at least 1e-3: with its usual one the first updates are the signs of the gradients, and rounding flips
    signs. Raises ValueError when the reference has more ranks than the world.
    """
    if args.optimizer.optimizer in ("adamw", "muon"):  # the others have none
        args = replace(args, optimizer=replace(args.optimizer, eps=max(args.optimizer.eps, 1e-3)))
    batches = [random_batch(args, seed + 1 + k) for k in range(steps)]
    home = _home(args, world.device)
    with build(args, layout, world, home=home) as session:
        weights = random_weights(session, seed)
        tried = trace(session, weights, batches)
        bits = args.parallel.exact is not None and replicas(layout) == replicas(reference)
        other = _Reference(args, reference, world, weights, batches, home, bits)
        unequal = dict.fromkeys(name for rank in session.from_all(tried.unequal) for name in rank)
        found = session.from_all([astuple(d) for d in _found(other, tried, session)])[0]
        return Comparison(tuple(Difference(Quantity(*q), *rest) for q, *rest in found), tuple(unequal))


def replicas(layout: Layout) -> tuple[int, ...]:
    """Sizes of data parallelism, level by level: what the order of sums over replicas follows from."""
    return tuple(layout.size(axis) for axis in layout.axes if axis.partition(".")[0] == "dp")


_WHOLE: Final = 20
"""Whole models in fp64 that are there at once, about: the weights, gradients and updates of three runs of two steps."""


def _home(args: Arguments, device: torch.device) -> torch.device:
    """Where whole tensors are kept and compared: on the GPU, if they take less than half of what is free there."""
    if device.type != "cuda":
        return device
    taken = _WHOLE * 8 * count_parameters(args.model, args.batch.seq_len).total
    return device if taken < torch.cuda.mem_get_info(device)[0] / 2 else CPU


@dataclass(frozen=True)
class _Reference:
    """How the reference runs, in any dtype."""

    args: Arguments
    layout: Layout
    world: World
    weights: Mapping[str, Tensor]
    batches: Sequence[Batch]
    home: torch.device
    exactly: bool
    """Whether the bits are to be the same: exact runs of one dp; another deals rows to other microbatches."""

    @property
    def copies(self) -> int:
        """How many references run side by side where more than one run is to be made: on a GPU each, or a core."""
        if self.layout.world > 1:
            return 1
        free = self.world.size if self.world.device.type == "cuda" else cores()
        return min(free, self.world.size, 1 + OTHERWISE)

    @contextmanager
    def session(self, dtype: Literal["fp32", "bf16", "fp64"], copies: int = 1) -> Iterator[Session | None]:
        """It, ready to run, in fp8 where the run is and `dtype` is the run's; None on ranks that it does not need.

        It computes plainly, operation by operation, whatever kernels make the run fast.
        """
        own = copies > 1 and self.world.rank < copies
        world = World.single(self.world.device) if own else first_ranks(self.world, self.layout.world)
        if world is None:
            yield None
            return
        run = replace(self.args.run, compile=False, cuda_graphs=False, attention="torch")
        if run.activation_budget is not None:  # of a rank of another layout
            run = replace(run, activation_budget=None, recompute="block")
        args = replace(self.args, parallel=replace(self.args.parallel, reduce_dtype="fp32"), run=run)
        if dtype != run.dtype:  # in which masters are no weights and remainders
            optimizer = replace(self.args.optimizer, masters="fp32")
            args = replace(args, optimizer=optimizer, run=replace(run, dtype=dtype, fp8="none"))
        with build(args, self.layout, world, home=self.home) as session:
            yield session

    def trace(self, dtype: Literal["fp32", "bf16", "fp64"], copies: int = 1) -> Trace | None:
        """One run from the weights, on the ranks of `session`."""
        with self.session(dtype, copies) as session:
            return None if session is None else trace(session, self.weights, self.batches)


def _found(reference: _Reference, tried: Trace, everyone: Session) -> tuple[Difference, ...]:
    """What `tried` differs in from its reference, with the limits of its dtype; nothing on ranks without one."""
    dtype = reference.args.run.dtype
    step = ROUNDING.get(dtype) if reference.args.run.fp8 == "none" else ROUNDING_FP8
    exactly = reference.exactly
    if step is None or exactly:
        own = reference.trace(dtype)
        if own is None:
            return ()
        found = differences(own, tried, bits=exactly)
        limits = {q: limit_of(q, reference.args, exactly=exactly) for q in found}
    else:
        exact = reference.trace("fp64", reference.copies)
        own, errors = _draws(reference, exact, step)
        said = everyone.from_all(list(errors.items()))
        usual = [{Quantity(*quantity): error for quantity, error in each} for each in said]
        if own is None or exact is None:
            return ()
        found = differences(exact, tried, ord=2)
        limits = {q: 2 * max(step, *(each[q] for each in usual if each)) for q in found}
    all_found = (Difference(q, e, limits.get(q, 0.0)) for q, e in (initial_differences(own, tried) | found).items())
    return tuple(replace(d, factor=factor(own, tried, d.quantity)) if d.exceeds else d for d in all_found)


def limit_of(q: Quantity, args: Arguments, *, exactly: bool) -> float:
    """How far a quantity may be from the reference's where rounding is fine, or where the bits must be the same."""
    if exactly:
        return PROJECTED if q.kind in ("activation", "activation gradient") else 0.0
    limit = TOLERANCE[args.run.dtype] * (UPDATE_SLACK if q.kind == "update" else 1.0)
    rounded = args.optimizer.moments == "bf16" and args.run.dtype == "fp32" and q.kind == "update" and q.step > 1
    return max(limit, MOMENTS_SLACK) if rounded else limit


def _draws(reference: _Reference, exact: Trace | None, step: float) -> tuple[Trace | None, dict[Quantity, float]]:
    """This rank's share of the reference's runs in the run's dtype, all but the first from `perturbed` weights.

    The first of them, which on rank 0 is from the weights themselves; and of each quantity the largest error.
    """
    first, errors = None, dict[Quantity, float]()
    with reference.session(reference.args.run.dtype, reference.copies) as session:
        if session is None or exact is None:
            return None, {}
        for k in range(reference.world.rank % reference.copies, 1 + OTHERWISE, reference.copies):
            start = perturbed(reference.weights, step, k - 1) if k else reference.weights
            run = trace(session, start, reference.batches)
            first = first or run
            # In this order: an error that is no number does not take the place of one that is.
            errors = {q: max(errors.get(q, 0.0), e) for q, e in differences(exact, run, ord=2).items()}
    return first, errors


def perturbed(weights: Mapping[str, Tensor], step: float, seed: int) -> dict[str, Tensor]:
    """The same weights but for less than rounding to `step` leaves of them: each moves by up to a quarter of that.

    A few then round to their other neighbour, and with them all that is computed from them rounds otherwise. What
    rounding does to a tensor is one draw of chance, and this is another.
    """
    home = next(iter(weights.values())).device
    generator = torch.Generator(home).manual_seed(seed)
    moved = {}
    for name, w in weights.items():
        chance = 2 * torch.rand(w.shape, generator=generator, dtype=torch.float64, device=home) - 1
        octave = torch.ldexp(w.double().sign().abs(), torch.frexp(w.double()).exponent - 1)
        moved[name] = (w.double() + chance * octave * (step / 4)).to(w.dtype)
    return moved


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
