"""P1, P4, P5, P8, P11, P13: every layout of up to eight ranks gives what one process gives.

Both runs live in the same processes at once. Sizes are awkward on purpose: a vocabulary and a layer count that do not
divide, fewer key/value heads than ranks, masks that differ by row with one row masked altogether.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch._dynamo  # noqa: F401  # the optimizer imports it: once here, not in each worker

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import Comparison, against_reference
from stretto.world import World

pytestmark = pytest.mark.gloo

LAYOUTS = [(tp, pp, dp) for tp, pp, dp in product(range(1, 9), repeat=3) if tp * pp * dp <= 8]
COMMIT = [
    *[(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 2)],
    *[(3, 1, 1), (2, 3, 1), (1, 3, 2), (1, 1, 5), (1, 8, 1)],
]
"""The others are for the night."""


def arguments(tp: int, pp: int, dp: int, *, variant: int, dtype: str = "fp64") -> Arguments:
    """A small model whose switches turn with `variant`, so that the layouts together try all of them."""
    bit = [bool(variant >> n & 1) for n in range(8)]
    heads = tp * (2 if tp < 5 else 1)
    return Arguments(
        model=ModelConfig(
            layers=5,
            hidden=24,
            heads=heads,
            kv_heads=1 if tp % 2 or bit[4] else 2,
            head_dim=6,
            ffn=4 * tp,
            vocab=53,
            norm="layer" if bit[1] else "rms",
            position="learned" if bit[2] else "rope",
            activation="gelu" if bit[3] else "swiglu",
            bias=bit[1],
            tied=bit[0],
            qk_norm=bit[5],
        ),
        parallel=ParallelConfig(
            tp=tp,
            pp=pp,
            dp=dp,
            sequence_parallel=bit[6] and tp > 1,
            schedule="gpipe" if bit[7] else "1f1b",
            bucket_mb=0.01,
        ),
        batch=BatchConfig(seq_len=2 * tp, micro_batch=2, global_batch=6 * dp),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4, clip_grad=0.5),
        run=RunConfig(dtype=dtype, timeout=30.0),
    )


def _prove(world: World, args: Arguments, steps: int) -> Comparison:
    p = args.parallel
    return against_reference(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world, steps=steps)


def prove(pool: Pool, args: Arguments, *, steps: int = 2) -> None:
    """Run both, and fail with what differs."""
    p = args.parallel
    for rank, found in enumerate(pool.run(p.tp * p.pp * (p.dp or 1), _prove, args, steps)):
        assert not found.unequal, f"rank {rank}: replicas differ: {found.unequal}"
        assert not found.failures, f"rank {rank}: {[f'{d.name}: {d.error:.1e}' for d in found.failures[:8]]}"


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(each, marks=[] if each in COMMIT else pytest.mark.nightly) for each in LAYOUTS],
    ids=[f"tp{t}-pp{p}-dp{d}" for t, p, d in LAYOUTS],
)
def test_every_layout_equals_one_process_in_fp64(pool: Pool, sizes: tuple[int, int, int]) -> None:
    """Gradients and updates to 1e-10; the variant goes through all switches as the layouts go by."""
    prove(pool, arguments(*sizes, variant=variant_of(sizes)))


def variant_of(sizes: tuple[int, int, int]) -> int:
    return (LAYOUTS.index(sizes) * 37 + 11) % 256


def test_a_commit_turns_every_switch_over_every_axis() -> None:
    """Catches a choice of layouts in which a switch is never on, or never off, where an axis is cut."""
    for axis, bit in product(range(3), range(8)):
        assert {variant_of(sizes) >> bit & 1 for sizes in COMMIT if sizes[axis] > 1} == {0, 1}
