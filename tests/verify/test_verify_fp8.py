"""A layout in fp8 is held against one process in fp8, by how far that is from fp64.

To show up here: a yardstick that is itself in fp8, or one that lets a product pass which is twice too large.
"""

from __future__ import annotations

import pytest
import torch

from stretto.arguments import parse
from stretto.layout import Layout
from stretto.tensor_parallel.fp8 import RECIPES
from stretto.testing import Pool
from stretto.verify import against_reference
from stretto.world import World

pytestmark = pytest.mark.gloo

SIZES = (
    "--hidden 64 --heads 4 --kv-heads 4 --ffn 96 --layers 2 --vocab 53 --seq-len 16 --global-batch 4 --micro-batch 1"
)
OTHER = "--kv-heads 1 --bias --norm layer --activation gelu --tied --qk-norm --position learned"


def verdict(world: World, words: str, wrong: str = "") -> list[str]:
    """The quantities that differ; `wrong` names a product that is twice too large where tp has more than one rank."""
    args = parse(f"--preset demo {SIZES} --dtype bf16 --nproc 2 --tp 2 --pp 1 {words}".split(), env={}).args
    with pytest.MonkeyPatch.context() as patch:
        recipe = RECIPES[args.run.fp8]
        add, back, make = recipe.add, recipe.backward, recipe.make

        def made(self, weight, *, column):
            assert weight.dtype == torch.bfloat16, "the run in fp64 is the exact one"
            return make(self, weight, column=column)

        def added_twice(self, total, fresh, dy, x):
            for again in range(self.tp.size):
                add(self, total, fresh and not again, dy, x)

        def doubled(self, dy, weight, *, column):
            dx, left = back(self, dy, weight, column=column)
            return dx * self.tp.size, left

        patch.setattr(recipe, "make", made)
        if wrong == "weight gradient":
            patch.setattr(recipe, "add", added_twice)
        elif wrong:
            patch.setattr(recipe, "backward", doubled)
        found = against_reference(args, Layout.of(tp=2), world)
    return [*found.unequal, *(d.quantity.kind for d in found.failures)]


AT_NIGHT = pytest.mark.nightly
RIGHT = [
    pytest.param("tensorwise", "", marks=AT_NIGHT),
    ("rowwise", "--sequence-parallel --recompute selective"),
    ("tensorwise", f"{OTHER} --sequence-parallel"),
    pytest.param("rowwise", "", marks=AT_NIGHT),
    pytest.param("tensorwise", "--sequence-parallel --recompute selective", marks=AT_NIGHT),
    pytest.param("rowwise", f"{OTHER} --sequence-parallel", marks=AT_NIGHT),
]


@pytest.mark.parametrize(("recipe", "more"), RIGHT)
def test_a_layout_in_fp8_is_one_process_in_fp8(pool: Pool, recipe: str, more: str) -> None:
    assert pool.run(2, verdict, f"--fp8 {recipe} {more}", timeout=140.0) == [[], []]


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        ("tensorwise", "gradient"),
        pytest.param("rowwise", "weight gradient", marks=AT_NIGHT),
        pytest.param("rowwise", "gradient", marks=AT_NIGHT),
        pytest.param("tensorwise", "weight gradient", marks=AT_NIGHT),
    ],
)
def test_a_product_that_is_twice_too_large_is_noticed(pool: Pool, recipe: str, wrong: str) -> None:
    found = pool.run(2, verdict, f"--fp8 {recipe}", wrong, timeout=140.0)[0]
    assert "gradient" in found
    assert ("activation gradient" in found) == (wrong == "gradient")
