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

from stretto.attention.scores import Scores
from stretto.attention.tile import Exact, Flash
from stretto.sequence import Tile


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """[b, heads, s, d] of q and [b, kv_heads, s, d] of k and v: each position sees the window.

    Itself is the last in it.
    """
    return _Windowed.apply(q, k, v, scores)  # type: ignore[no-any-return, no-untyped-call]


def takes_window(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take whole rows of these: a GPU, two bytes a number, heads of one size that they know."""
    d = q.shape[-1]
    fits = d % 8 == 0 and d <= 256 and v.shape[-1] == d and q.shape[2] == k.shape[2]
    return fits and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


class _Windowed(Function):
    """The whole square of a row is one tile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        row = slice(0, q.shape[2])
        ctx.of = Tile(row, row, 0, scores.window), scores
        y, lse = Flash(Exact()).forward(q, k, v, *ctx.of)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *Flash(Exact()).backward(dy, *ctx.saved_tensors, *ctx.of), None
