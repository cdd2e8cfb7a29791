"""AdamW in one pass over memory: for a bf16 weight 30 bytes.

A compiler's kernel would do as well, but its guards take the host 80 to 150 microseconds a call, of which there is one
for each bucket, where the device takes 50. Each element is updated alike, wherever its bucket is cut.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv

_BLOCK: Final = 1024
"""Elements of a program: with four warps two loads of 16 bytes of fp32 for a thread and vector."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _kernel(
    master,
    rounded,
    grad,
    first,
    second,
    scale,
    keep,
    rate,
    correction,
    size,
    change_first,
    change_second,
    eps,
    with_rounded: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    g = tl.load(grad + at, mask=inside, other=1.0) * tl.load(scale)
    w = tl.load(master + at, mask=inside, other=1.0)
    m = tl.load(first + at, mask=inside, other=1.0)
    v = tl.load(second + at, mask=inside, other=1.0)
    m += change_first * (g - m)
    v += change_second * (g * g - v)
    w = w * tl.load(keep) - tl.div_rn(tl.load(rate) * m, tl.sqrt_rn(tl.div_rn(v, tl.load(correction))) + eps)
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    tl.store(master + at, w, mask=inside)
    if with_rounded:
        tl.store(rounded + at, w.to(rounded.dtype.element_ty), mask=inside)


def adamw(
    master: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    keep: Tensor,
    rate: Tensor,
    correction: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """`stretto.distributed.rules.adamw`, of contiguous vectors in fp32 and weights in any dtype."""
    size = master.numel()
    vectors = (master, master if rounded is None else rounded, grad, first, second)
    numbers = (size, 1 - betas[0], 1 - betas[1], eps, rounded is not None, _BLOCK)
    _kernel[(cdiv(size, _BLOCK),)](*vectors, scale, keep, rate, correction, *numbers, num_warps=4)
