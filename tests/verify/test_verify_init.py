"""P11: from a seed, bitwise the same full initial weights in every layout.

Each rank of a layout is built in this process, one after the other; what they own is put together.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from verify_checks import small

from stretto.arguments.schema import Arguments
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Slice
from stretto.train.build import build
from stretto.verify import gather_full
from stretto.world import Axis

pytestmark = pytest.mark.gloo

LAYOUTS = [(t, p, d) for t, p, d in product((1, 2, 4, 8), (1, 2, 4), (1, 2)) if t * p * d <= 8]
SWITCHES = {"tied": True, "bias": True, "qk_norm": True, "position": "learned", "norm": "layer", "heads": 8}


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.nightly)])
def test_every_layout_starts_from_the_same_bits(dtype: str) -> None:
    """Catches numbers drawn by a local index, by the strides of a block, by the stage, or by a layer's local number."""
    expected = initial(1, 1, 1, dtype)
    assert len(expected) == 4 * 20 + 4  # 20 tensors in a block with biases; embedding, positions, final norm
    for sizes in LAYOUTS[1:]:
        for sequence_parallel in {False, sizes[0] > 1}:
            found = initial(*sizes, dtype, sp=sequence_parallel)
            assert set(found) == set(expected), sizes
            assert [n for n in expected if not torch.equal(found[n], expected[n])] == [], sizes


def test_the_seed_and_the_name_decide() -> None:
    """Catches a seed that is not used, and two tensors that draw the same numbers."""
    one, other = initial(1, 1, 1, "fp32"), initial(1, 1, 1, "fp32", seed=2)
    drawn = [n for n, t in one.items() if t.unique().numel() > 2]
    assert len(drawn) == 4 * 7 + 2
    assert all(not torch.equal(one[n], other[n]) for n in drawn)
    assert len({tuple(one[n].flatten()[:4].tolist()) for n in drawn}) == len(drawn)


def test_parameters_are_their_masters_rounded() -> None:
    """Catches bf16 parameters drawn apart from the fp32 masters."""
    args = small(dtype="bf16")
    with ParallelState.inspect(Layout.of(), 0) as state:
        built = build(args, state)
        masters = {s.name: s.tensor for s in built.optimizer.slices()}
        for item in built.weights.declared:
            for part in item.logical:
                assert torch.equal(part.view(item.param.data), masters[f"model/{part.name}"].bfloat16()), part.name


def initial(tp: int, pp: int, dp: int, dtype: str, *, sp: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """The initial weights of a layout, put together from what each rank owns."""
    args = small(tp=tp, pp=pp, dp=dp, dtype=dtype, sp=sp, **SWITCHES)
    args = replace(args, run=replace(args.run, seed=seed))
    pieces = [piece for rank in range(tp * pp * dp) for piece in _owned(args, Layout.of(tp=tp, pp=pp, dp=dp), rank)]
    return gather_full(pieces, Axis("world", 0, (0,)))


def _owned(args: Arguments, layout: Layout, rank: int) -> list[Slice]:
    with ParallelState.inspect(layout, rank) as state:
        return [s for s in build(args, state).optimizer.slices() if s.owner and s.name.startswith("model/")]
