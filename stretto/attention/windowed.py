"""Attention to a window of the keys before a query, by the kernels that torch has of FlashAttention 2.

They pass over the tiles that no query of theirs sees, so a window of 512 in a row of 4,096 is an eighth of the work; a
kernel that is given a mask computes all of them (Dao, "FlashAttention-2", 2023; Jiang et al., "Mistral 7B", 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """[b, heads, s, d] of q and [b, kv_heads, s, d] of k and v: each position sees `window` at most.

    Itself is the last of them.
    """
    return _Windowed.apply(q, k, v, window, scale)  # type: ignore[no-any-return, no-untyped-call]


def takes_window(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take whole rows of these: a GPU, two bytes a number, heads of one size that they know."""
    d = q.shape[-1]
    fits = d % 8 == 0 and d <= 256 and v.shape[-1] == d and q.shape[2] == k.shape[2]
    return fits and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


class _Windowed(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
        ctx.sees = {"scale": scale, "window_size_left": window - 1, "window_size_right": 0}
        tensors, s = [x.transpose(1, 2) for x in (q, k, v)], q.shape[2]
        y, lse, *_ = torch.ops.aten._flash_attention_forward(*tensors, None, None, s, s, 0.0, False, False, **ctx.sees)
        ctx.save_for_backward(q, k, v, y, lse)
        heads: Tensor = y.transpose(1, 2)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        tensors, s = [x.transpose(1, 2) for x in (dy, q, k, v)], q.shape[2]
        none = torch.empty(0, device=q.device, dtype=torch.uint64)  # nothing is dropped
        found = torch.ops.aten._flash_attention_backward(
            *tensors, y, lse, None, None, s, s, 0.0, False, none, none, **ctx.sees
        )
        return *(x.transpose(1, 2) for x in found), None, None
