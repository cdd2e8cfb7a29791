"""The page of verified combinations, with the errors that are measured now.

python -m benchmarks.verified docs/verified.md             # all of them
python -m benchmarks.verified docs/verified.md --missing   # those that the page does not have yet
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import cycle, product
from pathlib import Path

from allpairspy import AllPairs

from benchmarks import pairs
from benchmarks.pairs import Partial
from stretto.layout import Layout
from stretto.layout.schedules import FAMILIES
from stretto.testing import Pool
from stretto.verify import Comparison, against_reference
from stretto.verify.compare import ROUNDING, TOLERANCE
from stretto.verify.matrix import (
    ACTIVATIONS,
    CONTEXT,
    DATA,
    DTYPES,
    FEATURES,
    MOST,
    PIPELINE,
    TENSOR,
    Combination,
    example,
    exists,
    sizes,
    used_up,
)
from stretto.verify.reference import OTHERWISE
from stretto.world import World

Measure = Callable[[Combination, tuple[bool, ...]], str]
Row = tuple[str, ...]

_INTRODUCTION = f"""\
# What is verified

Made by `make verified`; do not edit.

A run uses a combination of features: of tensor parallelism, context parallelism, a pipeline schedule, replicas or a
kind of sharding, experts, several documents in a row, adapters or frozen parameters, dropout, recomputation, a dtype.
The rows below hold every two of them together, where beside context parallelism, experts, documents and what is
trained schedules of a kind take turns; and every one of tensor parallelism, 1F1B, GPipe, replicas, dropout and
recomputation with all the others at once. Each is compared with one process, from the same weights and batches, for
two steps: initial weights, activations, losses, gradients, gradient norms, updates and evaluations; replicas must be
bitwise equal. A row of the latter is run twice: with every other option of the model on (tied embedding, biases,
LayerNorm, learned positions, GELU, norms of queries and keys, one key/value head that two ranks hold copies of, a
pipeline stage without layers), and with every one off; with dropout only on, and with recomputation alone only off.
One of every two features is run for one step, in one dtype, with options or without. Sizes are not told apart here:
[test_verify_layouts](../tests/verify/test_verify_layouts.py) has every layout of up to 8 ranks,
[test_verify_random](../tests/verify/test_verify_random.py) draws layouts and options at random.

A figure is the largest relative error of all that is compared. It may be {TOLERANCE["fp64"]:g} in fp64 and
{TOLERANCE["fp32"]:g} in fp32. In bf16, rounding shows in one process too: there an error against fp64 may be twice that
of the same tensor on one process in bf16, the largest of {1 + OTHERWISE} runs that round differently, or twice a
rounding step of {ROUNDING["bf16"]:g}; and a figure is the largest share of what is allowed.

All of it runs on CPU, over Gloo; the errors on GPUs are in `benchmarks/results`. The tests compare again: `make test`
each feature, and tensor parallelism beside each of context parallelism and replicas; `make test-nightly` every two
features, dtypes and options among them, and of what is the oldest every schedule.
`stretto train` warns of a setting that is not here, and `stretto verify` compares any combination.

| tensor | context | pipeline | replicas | experts | documents | trained | activations | {" | ".join(DTYPES)} | by |
|{"---|" * (len(FEATURES) + len(DTYPES))}---|
"""
_TEST = "[test_verify_matrix](../tests/verify/test_verify_matrix.py)"


KINDS = [
    [name for name in PIPELINE if FAMILIES.get(name) == kind] for kind in dict.fromkeys(map(FAMILIES.get, PIPELINE))
]
"""Schedules that are alike to all that is not a schedule: stages on a rank, how they lie, whether backwards split."""


def every_two() -> list[tuple[Combination, bool]]:
    """Combinations in which every two features stand together, each dtype among them, and options on and off.

    The schedules of a kind are one feature and take turns.
    """
    size, turns = len(FEATURES) + 1, {kind[0]: cycle(kind) for kind in KINDS}
    axes = [n for n, of in enumerate(FEATURES) if of in (TENSOR, CONTEXT, PIPELINE, DATA)]
    columns = [turns if of == PIPELINE else of for of in FEATURES]

    def said(row: Partial) -> Combination:
        return Combination(*("-" if value is None else str(value) for value in row[:size]))

    def possible(row: Partial) -> bool:
        free = [n for n in axes if row[n] is None]
        filled = (
            {n: FEATURES[n][k] for n, k in zip(free, more, strict=True)} for more in product((0, 1), repeat=len(free))
        )
        return any(exists(said(tuple(each.get(n, value) for n, value in enumerate(row)))) for each in filled)

    def cost(row: Partial) -> float:
        return layout_of(said(row)).world if exists(said(row)) else MOST

    rows = pairs.every_two([*map(list, columns), DTYPES, (True, False)], possible, cost)
    found = [(said(row), bool(row[size])) for row in rows]
    return [(replace(of, pipeline=next(turns[of.pipeline])), options) for of, options in found]


def all_at_once() -> list[Row]:
    """All combinations of what is the oldest, and every schedule with each of them."""
    whole = product(TENSOR, ("-", "1f1b", "gpipe"), ("-", "dp"), ACTIVATIONS)
    dense = [*whole, *map(tuple, AllPairs([TENSOR, PIPELINE, DATA, ACTIVATIONS]))]
    return [(t, "-", p, d, "-", "-", "-", a) for t, p, d, a in dict.fromkeys(dense)]


def page(measure: Measure, known: str = "") -> str:
    """The page, with what `measure` says of each combination; rows that are in `known` stay as they are."""
    found = []
    asked: dict[Row, dict[str, tuple[bool, ...]]] = {
        row: {d: options_of(Combination(*row, d)) for d in DTYPES} for row in all_at_once()
    }
    for of, options in every_two():
        asked.setdefault(astuple(of)[: len(FEATURES)], {}).setdefault(of.dtype, (options,))
    for row, dtypes in asked.items():
        begins = f"| {' | '.join(row)} | "
        line = next((line for line in known.splitlines() if line.startswith(begins)), None)
        figures = (measure(Combination(*row, d), dtypes[d]) if d in dtypes else "" for d in DTYPES)
        found.append(line or begins + " | ".join([*figures, f"{_TEST} |"]))
    return _INTRODUCTION + "".join(f"{line}\n" for line in found)


def options_of(of: Combination) -> tuple[bool, ...]:
    """With which options of the model it is measured, see `example`: on and off; where activations are dropped on,
    where they are only computed again off."""
    return (True, False) if of.activations == "-" else ("dropout" in of.activations,)


def verify(world: World, of: Combination, options: bool, steps: int) -> Comparison:
    """Compare one combination with one process."""
    return against_reference(example(of, options=options), layout_of(of), world, steps=steps)


def layout_of(of: Combination) -> Layout:
    """That of its example."""
    return Layout.of(**sizes(of))


def measured(pool: Pool, of: Combination, how: tuple[bool, ...]) -> str:
    """What the page says of it. Raises ArithmeticError when an error is too large."""
    steps = 2 if astuple(of)[: len(FEATURES)] in all_at_once() else 1
    found = [pool.run(layout_of(of).world, verify, of, options, steps, timeout=300.0)[0] for options in how]
    share = max(used_up(each) for each in found)
    if not share <= 1:
        raise ArithmeticError(f"{of}: {[d.name for each in found for d in each.failures][:5]}")
    if of.dtype in ROUNDING:
        return f"{share:.2f}"
    return f"{max(d.error for each in found for d in each.differences):.0e}"


if __name__ == "__main__":
    with Pool(8) as workers:

        def tell(of: Combination, how: tuple[bool, ...]) -> str:
            figure = measured(workers, of, how)
            print(f"{of}: {figure}", flush=True)
            return figure

        written = Path(sys.argv[1])
        written.write_text(page(tell, written.read_text() if "--missing" in sys.argv else ""))
