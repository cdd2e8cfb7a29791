"""Products in fp8 on a GPU: its matrix units, and the kernels that make their factors, give what rounded factors do.

To show up here: an order of factors, a scale or an output that cuBLAS reads otherwise than the CPU does.
"""

from __future__ import annotations

import pytest
import torch
from tensor_parallel_full import draw
from test_tensor_parallel_fp8 import ALONE, Sums, rounded
from torch import Tensor

from stretto.params import Init
from stretto.tensor_parallel import Build, ColumnParallelLinear, unfused
from stretto.tensor_parallel.fp8 import E4M3, E5M2, RECIPES
from stretto.train.build import fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

N, IN, OUT = 256, 320, 192


@pytest.mark.parametrize("fuse", [unfused, fused])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_products_are_those_of_rounded_factors(recipe: str, fuse: object) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8")
    sums = Sums()
    products = RECIPES[recipe](ALONE, fuse)
    at = Build(ALONE, False, torch.bfloat16, "cuda", accumulators=sums, products=products)
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
            near(found[name], want, 2**-7 if name == "y" else 2**-8)
    near(sums.total[layer.weight].cpu().double(), total)


def near(found: Tensor, want: Tensor, limit: float = 2**-8) -> None:
    """To rounding in bf16; fp8 itself is ten times further from the exact product.

    The forward leaves its sums in the matrix unit, which cuts bits off: rowwise 1.16 times that, on an H200.
    """
    assert (found - want).norm() <= limit * want.norm()
