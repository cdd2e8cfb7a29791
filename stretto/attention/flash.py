"""Causal attention by the package flash-attn-4, whose kernels for Hopper follow Shah et al., "FlashAttention-3", 2024.

The package's own function of q, k and v gives its output in an order of its own; here it is written where the next
GEMM reads it, sequence first, as all else: else it would be copied, and kept twice for the backward.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.attention.dot_product import Attend, require_plain
from stretto.attention.scores import PLAIN, Scores
from stretto.structure import Structure

PACKAGE = "flash-attn-4"


def flash_attention(*, deterministic: bool) -> Attend:
    """`causal_attention` of `stretto.attention.dot_product` by this package; `deterministic` backwards are slower.

    Raises ModuleNotFoundError, with what to install, where it is not there.
    """
    try:
        kernels = import_module("flash_attn.cute.interface")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"attention = flash4 needs the package {PACKAGE}, of which {error.name} is not installed here: "
            "pip install 'stretto[flash4]', or say --attention torch"
        ) from error

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores = PLAIN,
        structure: Structure | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        require_plain(structure)
        if scores != PLAIN or sinks is not None:
            more = "" if sinks is None else " and sinks"
            raise ValueError(
                f"{PACKAGE} computes plain causal attention, not with {scores}{more}: say --attention torch"
            )
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        y: Tensor = _Flash.apply(*inputs, kernels, deterministic)  # type: ignore[no-untyped-call]
        return y.transpose(1, 2)

    return attend


class _Flash(Function):
    """q [b, s, heads, d], k and v [b, s, kv_heads, d] in any order of the first two in memory -> [b, s, heads, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernels: Any, deterministic: bool) -> Tensor:
        b, s, heads, d = q.shape
        y = torch.empty((s, b, heads, d), dtype=q.dtype, device=q.device).transpose(0, 1)
        _, lse, *_ = kernels._flash_attn_fwd(q, k, v, causal=True, return_lse=True, out=y)
        ctx.kernels, ctx.deterministic = kernels, deterministic
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        dq, dk, dv, *_ = ctx.kernels._flash_attn_bwd(q, k, v, y, dy, lse, causal=True, deterministic=ctx.deterministic)
        return dq, dk, dv, None, None
