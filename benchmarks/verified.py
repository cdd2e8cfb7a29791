"""The page of verified combinations, with the errors that are measured now.

python -m benchmarks.verified docs/verified.md             # all of them
python -m benchmarks.verified docs/verified.md --missing   # those that the page does not have yet
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

from allpairspy import AllPairs

from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import Comparison, against_reference
from stretto.verify.compare import ROUNDING, TOLERANCE
from stretto.verify.matrix import ACTIVATIONS, DTYPES, FEATURES, TENSOR, Combination, example, used_up
from stretto.verify.reference import OTHERWISE
from stretto.world import World

Measure = Callable[[Combination], str]
Row = tuple[str, str, str, str]

_INTRODUCTION = f"""\
# What is verified

Made by `make verified`; do not edit.

A run uses a combination of features: of tensor parallelism, a pipeline schedule, replicas or a kind of sharding,
dropout, recomputation, a dtype. The rows below hold every two of them together, and every one of tensor parallelism,
1F1B, GPipe, replicas, dropout and recomputation with all the others at once. Each is compared with one process, from
the same weights and batches, for two steps: initial weights, activations, losses, gradients, gradient norms, updates
and evaluations; replicas must be bitwise equal. It is run twice: with every other option of the model on (tied
embedding, biases, LayerNorm, learned positions, GELU, norms of queries and keys, one key/value head that two ranks hold
copies of, a pipeline stage without layers), and with every one off; with dropout only on, and with recomputation alone
only off. Sizes are not told apart here:
[test_verify_layouts](../tests/verify/test_verify_layouts.py) has every layout of up to 8 ranks,
[test_verify_random](../tests/verify/test_verify_random.py) draws layouts and options at random.

A figure is the largest relative error of all that is compared. It may be {TOLERANCE["fp64"]:g} in fp64 and
{TOLERANCE["fp32"]:g} in fp32. In bf16, rounding shows in one process too: there an error against fp64 may be twice that
of the same tensor on one process in bf16, the largest of {1 + OTHERWISE} runs that round differently, or twice a
rounding step of {ROUNDING["bf16"]:g}; and a figure is the largest share of what is allowed.

All of it runs on CPU, over Gloo; the errors on GPUs are in `benchmarks/results`. The tests compare every two
features again, dtypes and options among them: CI every schedule with each of the others, `make test` one of each kind.
`stretto train` warns of a setting that is not here, and `stretto verify` compares any combination.

| tensor | pipeline | replicas | activations | {" | ".join(DTYPES)} | verified by |
|---|---|---|---|{"---|" * len(DTYPES)}---|
"""
_TEST = "[test_verify_matrix](../tests/verify/test_verify_matrix.py)"


def rows() -> list[Row]:
    """All combinations of what is the oldest, and every two of all features."""
    whole = product(TENSOR, ("-", "1f1b", "gpipe"), ("-", "dp"), ACTIVATIONS)
    return list(dict.fromkeys([*whole, *map(tuple, AllPairs([*FEATURES]))]))


def page(measure: Measure, known: str = "") -> str:
    """The page, with what `measure` says of each combination; rows that are in `known` stay as they are."""
    found = []
    for row in rows():
        begins = f"| {' | '.join(row)} | "
        line = next((line for line in known.splitlines() if line.startswith(begins)), None)
        found.append(line or begins + " | ".join([*(measure(Combination(*row, d)) for d in DTYPES), f"{_TEST} |"]))
    return _INTRODUCTION + "".join(f"{line}\n" for line in found)


def options_of(of: Combination) -> tuple[bool, ...]:
    """With which options of the model it is measured, see `example`: on and off; where activations are dropped on,
    where they are only computed again off."""
    return (True, False) if of.activations == "-" else ("dropout" in of.activations,)


def verify(world: World, of: Combination, options: bool) -> Comparison:
    """Compare one combination with one process."""
    args = example(of, options=options)
    p = args.parallel
    return against_reference(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world)


def ranks_of(of: Combination) -> int:
    """Processes that its example takes."""
    p = example(of, options=False).parallel
    return p.tp * p.pp * (p.dp or 1)


def measured(pool: Pool, of: Combination) -> str:
    """What the page says of it. Raises ArithmeticError when an error is too large."""
    found = [pool.run(ranks_of(of), verify, of, options, timeout=300.0)[0] for options in options_of(of)]
    share = max(used_up(each) for each in found)
    if not share <= 1:
        raise ArithmeticError(f"{of}: {[d.name for each in found for d in each.failures][:5]}")
    if of.dtype in ROUNDING:
        return f"{share:.2f}"
    return f"{max(d.error for each in found for d in each.differences):.0e}"


if __name__ == "__main__":
    with Pool(8) as workers:

        def tell(of: Combination) -> str:
            figure = measured(workers, of)
            print(f"{of}: {figure}", flush=True)
            return figure

        written = Path(sys.argv[1])
        written.write_text(page(tell, written.read_text() if "--missing" in sys.argv else ""))
