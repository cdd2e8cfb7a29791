"""Gemms in fp8 on a GPU: its matrix units, and the kernels that make their factors, give what rounded factors do.

To show up here: an order of factors, a scale or an output that cuBLAS reads otherwise than the CPU does; numbers that
the compiler rounds otherwise than torch.
"""

from __future__ import annotations

import pytest
import torch
from tensor_parallel_full import draw
from test_tensor_parallel_fp8 import ALONE, Sums, rounded
from torch import Tensor

from stretto.kernels import fused
from stretto.params import Init
from stretto.tensor_parallel import Build, ColumnParallelLinear, unfused
from stretto.tensor_parallel.fp8 import (
    E4M3,
    E5M2,
    RECIPES,
    column_scale,
    quantize,
    quantize_both,
    quantize_columns,
    quantize_cut_rows,
    quantize_rows,
    quantize_transposed,
    row_scale,
    scale,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

N, IN, OUT = 256, 320, 192


@pytest.mark.parametrize("fuse", [unfused, fused])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_products_are_those_of_rounded_factors(recipe: str, fuse: object) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8")
    sums = Sums()
    gemms = RECIPES[recipe](ALONE, fuse)
    at = Build(ALONE, False, torch.bfloat16, "cuda", accumulators=sums, gemms=gemms)
    layer = ColumnParallelLinear(IN, OUT, at, bias=False, init=Init(std=1.0))
    w = draw((OUT, IN), "w").bfloat16()
    layer.weight.data.copy_(w)
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for step in range(2):
        x, dy = draw((N, IN), f"x{step}").bfloat16(), draw((N, OUT), f"dy{step}").bfloat16()
        there = x.cuda().requires_grad_()
        y = layer(there)
        y.backward(dy.cuda())
        flat, d, wide = x.float(), dy.float(), w.float()
        if recipe == "tensorwise":
            wanted = {"y": rounded(flat, E4M3) @ rounded(wide, E4M3).t(), "dx": rounded(d, E5M2) @ rounded(wide, E4M3)}
            total += rounded(d, E5M2).t() @ rounded(flat, E4M3)
        else:
            wanted = {
                "y": rounded(flat, E4M3, 1) @ rounded(wide, E4M3, 1).t(),
                "dx": rounded(d, E4M3, 1) @ rounded(wide, E4M3, 0),
            }
            total += d.double().t() @ flat.double()
        assert there.grad is not None
        found = {"y": y.detach().cpu().double(), "dx": there.grad.cpu().double()}
        for name, want in wanted.items():
            near(found[name], want)
    near(sums.total[layer.weight].cpu().double(), total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_way_to_narrow_gives_the_same_numbers(dtype: torch.dtype) -> None:
    """By hand and compiled, on the GPU and on the CPU, whole and with a scale that was agreed on: else a layout would
    round otherwise than one process."""
    x = draw((N, IN), "x").to(dtype)
    rows, columns = row_scale(x), column_scale(x)
    scales = ((row_scale,), (column_scale,), (quantize_rows,), (quantize_cut_rows, rows), (quantize_columns, columns))
    for formula, *more in scales:
        there = [x.cuda(), *(each.cuda() for each in more)]
        want = formula(x, *more)
        for fuse in (unfused, fused):
            same(fuse(formula)(*there), want)
    for small in (E4M3, E5M2):
        one = scale(x, dtype=small)
        for fuse in (unfused, fused):
            same(fuse(scale)(x.cuda(), dtype=small), one)
            for formula in (quantize, quantize_transposed, quantize_both):
                same(fuse(formula)(x.cuda(), one.cuda(), dtype=small), formula(x, one, dtype=small))
    assert torch.equal(quantize_rows(x)[0].float(), quantize_cut_rows(x, rows).float())


def same(found: Tensor | tuple[Tensor, ...], wanted: Tensor | tuple[Tensor, ...]) -> None:
    """To the bit."""
    for one, other in zip(*((t,) if isinstance(t, Tensor) else t for t in (found, wanted)), strict=True):
        assert torch.equal(one.cpu().float(), other.float())


def near(found: Tensor, want: Tensor) -> None:
    """To rounding in bf16; fp8 itself is ten times further from the exact product."""
    assert (found - want).norm() <= 2**-8 * want.norm()
