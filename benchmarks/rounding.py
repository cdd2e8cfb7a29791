"""What rounding in bf16 does to right runs, and how many draws of it make a yardstick for a layout.

python -m benchmarks.rounding 100 30    # so many random models, and so many with a hidden size of 16
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from statistics import median
from typing import Literal

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import ROUNDING, Trace, build, differences, random_batch, random_weights, trace
from stretto.verify.reference import OTHERWISE, first_ranks, perturbed
from stretto.world import World

STEP = ROUNDING["bf16"]
LAYOUTS = ((2, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 2), (1, 1, 4), (1, 2, 1), (4, 1, 1))

Errors = list[tuple[bool, float, list[float]]]
"""Of each quantity: whether it is a gradient, the layout's error, and those of one process, draw by draw."""


def drawn(number: int, *, narrow: bool) -> Arguments:
    """A small model in a layout of two to four ranks."""
    r = random.Random(number)
    tp, pp, dp = r.choice(LAYOUTS)
    head_dim = r.choice((4, 8) if narrow else (8, 16, 32))
    heads = r.choice((4, 8))
    hidden = 16 if narrow else r.choice((32, 32, 48, 64, 128))
    bias, gelu = r.random() < 0.5, r.choice((True, False))
    model = ModelConfig(
        layers=r.choice((2, 3, 4)),
        hidden=hidden,
        heads=heads,
        kv_heads=r.choice((1, 2, 4)),
        head_dim=head_dim,
        ffn=r.choice((16, 24) if narrow else (32, 64, 96)),
        vocab=r.choice((53, 97, 256)),
        norm=r.choice(("rms", "layer")),
        position=r.choice(("rope", "learned")),
        activation="gelu" if gelu else "swiglu",
        bias=bias,
        tied=r.random() < 0.5,
        qk_norm=r.random() < 0.3,
        dropout=r.choice((0.0, 0.0, 0.1)),
    )
    sequence_parallel = tp > 1 and r.random() < 0.5
    return Arguments(
        model=model,
        parallel=ParallelConfig(tp=tp, pp=pp, dp=dp, sequence_parallel=sequence_parallel, bucket_mb=0.05),
        batch=BatchConfig(
            seq_len=r.choice((8, 16, 32)), micro_batch=r.choice((1, 2)), global_batch=4 * dp * r.choice((1, 2))
        ),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-3, clip_grad=r.choice((0.5, 1.0))),
        run=RunConfig(dtype="bf16", timeout=60.0, recompute=r.choice(("none", "none", "selective", "block"))),
    )


def measure(world: World, args: Arguments) -> Errors:
    """On the first rank the errors of the layout and of one process, each against fp64; nothing on the others."""
    p = args.parallel
    with build(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world) as session:
        weights = random_weights(session, 0)
        batches = [random_batch(args, 1 + step) for step in range(2)]
        tried = trace(session, weights, batches)
        alone = first_ranks(world, 1)
        if alone is None:
            return []

        def one(dtype: Literal["bf16", "fp64"], draw: int | None = None) -> Trace:
            start = weights if draw is None else perturbed(weights, STEP, draw)
            with build(replace(args, run=replace(args.run, dtype=dtype)), Layout.of(), alone) as process:
                return trace(process, start, batches)

        exact = one("fp64")
        found = differences(exact, tried, ord=2)
        usual = [differences(exact, one("bf16", draw), ord=2) for draw in (None, *range(OTHERWISE))]
        return [(q.kind == "gradient", error, [each[q] for each in usual]) for q, error in found.items()]


def share(errors: Errors, draws: int) -> float:
    """The largest share that an error of the layout takes up of twice the largest of so many draws."""
    return max(error / (2 * max(STEP, *usual[:draws])) for _, error, usual in errors)


if __name__ == "__main__":
    wide, narrow = (int(word) for word in sys.argv[1:])
    runs = [drawn(1040 + n, narrow=False) for n in range(wide)] + [drawn(1000 + n, narrow=True) for n in range(narrow)]
    every: list[Errors] = []
    with Pool(4) as pool:
        for args in runs:
            p = args.parallel
            every.append(pool.run(p.tp * p.pp * (p.dp or 1), measure, args, timeout=300.0)[0])
    print(f"{len(every)} right runs, {sum(map(len, every)):,} tensors and numbers")
    for draws in (1, 2, 3, 5, 7, 1 + OTHERWISE):
        shares = [share(errors, draws) for errors in every]
        larger = median(max(u[:draws]) / u[0] for errors in every for gradient, _, u in errors if gradient and u[0])
        wrong = sum(each > 1 for each in shares)
        print(f"{draws} draws: {wrong} exceed what they may, worst {max(shares):.2f} of it, yardstick x{larger:.2f}")
