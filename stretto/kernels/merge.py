"""Two outputs of attention merged by their log-sum-exps, in one pass.

As torch has it there is a pass for each operation, most of them in fp32. Here each number is read once as a tile's
kernel left it, and the sum is written once, wherever it lies and in whatever dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv, next_power_of_2

_ELEMENTS = 4096
"""Of a program: heads of some tokens."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _merge(
    y, lse, one, one_lse, two, two_lse, rows, heads, batch, width,
    y_b, y_h, y_n, lse_b, lse_h, one_b, one_h, one_n, one_lse_b, one_lse_h,
    two_b, two_h, two_n, two_lse_b, two_lse_h, tall: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # Heads of a token lie side by side in memory, or nearly so.
    row = tl.program_id(0).to(tl.int64) * tall + tl.arange(0, tall)
    here = row < rows
    h, b, n = row % heads, row // heads % batch, row // heads // batch
    column = tl.arange(0, block)[None, :]
    inside = here[:, None] & (column < width)
    s = tl.load(one_lse + b * one_lse_b + h * one_lse_h + n, mask=here, other=0.0).to(tl.float32)
    t = tl.load(two_lse + b * two_lse_b + h * two_lse_h + n, mask=here, other=0.0).to(tl.float32)
    most = tl.maximum(s, t)
    # Where no key was seen, neither here: minus infinity from itself is no number.
    base = tl.where(most == -float("inf"), 0.0, most)
    p, q = tl.exp(s - base), tl.exp(t - base)
    unseen = p + q == 0.0
    total = tl.where(unseen, 1.0, p + q)
    x = tl.load(one + (b * one_b + h * one_h + n * one_n)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(two + (b * two_b + h * two_h + n * two_n)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    out = x * (p / total)[:, None] + z * (q / total)[:, None]
    tl.store(y + (b * y_b + h * y_h + n * y_n)[:, None] + column, out.to(y.dtype.element_ty), mask=inside)
    tl.store(lse + b * lse_b + h * lse_h + n, tl.where(unseen, -float("inf"), base + tl.log(total)), mask=here)


def merge_(y: Tensor, lse: Tensor, one: Tensor, one_lse: Tensor, two: Tensor, two_lse: Tensor) -> None:
    """`stretto.context_parallel.merge.merge_`."""
    b, heads, n, width = y.shape
    if not y.numel():
        return
    block = next_power_of_2(width)
    tall = max(1, _ELEMENTS // block)
    _merge[(cdiv(n * b * heads, tall),)](
        *(y, lse, one, one_lse, two, two_lse, n * b * heads, heads, b, width, *y.stride()[:3], *lse.stride()[:2]),
        *(*one.stride()[:3], *one_lse.stride()[:2], *two.stride()[:3], *two_lse.stride()[:2], tall, block),
        num_warps=4,
    )
