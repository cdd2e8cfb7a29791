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
WEIGHTS_ALONE: Final = 16
_EVERYTHING: Final = 32
_FEWEST: Final = tl.constexpr(WEIGHTS_ALONE)
"""What is stored: numbers that Triton does not tell apart, so that one binary computes both, to the same bits."""


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
    stored,
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
    kept = inside & (stored > _FEWEST)
    tl.store(first + at, m, mask=kept)
    tl.store(second + at, v, mask=kept)
    tl.store(master + at, w, mask=kept)
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
    stored: int = _EVERYTHING,
) -> None:
    """`stretto.distributed.rules.adamw`, of contiguous vectors in fp32 and weights in any dtype.

    With `stored` of `WEIGHTS_ALONE` it is `adamw_weights`: masters and moments stay as they are.
    """
    size = master.numel()
    vectors = (master, master if rounded is None else rounded, grad, first, second)
    numbers = (size, 1 - betas[0], 1 - betas[1], eps, stored, rounded is not None, _BLOCK)
    _kernel[(cdiv(size, _BLOCK),)](*vectors, scale, keep, rate, correction, *numbers, num_warps=4)
