"""RMSNorm of each head of queries and keys with rotary embedding behind it, as in Qwen3 and Gemma 3, in one pass.

Queries and keys are read where their GEMM left them, beside the values. Apart, a norm and a rotation read and write
them twice, the backward copies what lies apart for each norm, and the gradients of q, k and v are put side by side in
one more pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stretto.autograd import Function, Region, Value, adjoint
from stretto.models.rope import Rotation, apply_rotary
from stretto.tensor_parallel import Build, formulas
from stretto.tensor_parallel.formulas import widened


def norm_and_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, centre: float
) -> tuple[Tensor, Tensor]:
    """q [s, b, heads, d] and k [s, b, kv_heads, d] of qkv [s, b, heads + 2 kv_heads, d], rounded once.

    Norms multiply by `centre` + weight [d]; cos and sin are a `Rotation`.
    """

    def made(x: Tensor, weight: Tensor) -> Tensor:
        return apply_rotary(formulas.rms_norm(widened(x), centre + widened(weight), eps), cos, sin).to(x.dtype)

    q, k, _ = _parts(qkv, heads)
    return made(q, q_weight), made(k, k_weight)


def norm_and_rotate_backward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    eps: float,
    centre: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its adjoint, and that of the cut: the gradients of qkv and of both weights."""

    def back(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw = formulas.rms_norm_backward(
            apply_rotary(widened(dy), cos, -sin), widened(x), centre + widened(weight), eps
        )
        return dx.to(x.dtype), dw.to(weight.dtype)

    q, k, _ = _parts(qkv, dq.shape[2])
    (dq, dq_weight), (dk, dk_weight) = back(dq, q, q_weight), back(dk, k, k_weight)
    return torch.cat([dq, dk, dv], dim=2), dq_weight, dk_weight


@dataclass(frozen=True)
class NormAndRotate:
    """Both formulas as a build wants them computed. Only qkv is kept for the backward, of which v is a part."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, build: Build, *, eps: float, zero_centered: bool) -> NormAndRotate:
        """As `build` wants it; `zero_centered` weights are those of which each head is multiplied by 1 + weight."""
        there, back = (
            build.fuse(partial(each, eps=eps, centre=float(zero_centered)))
            for each in (norm_and_rotate, norm_and_rotate_backward)
        )
        return cls(there, back)

    def __call__(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Rotation, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of qkv [s, b, heads + 2 kv_heads, d]."""
        return _NormAndRotate.apply((self, heads), qkv, q_weight, k_weight, *rotation)  # type: ignore[no-any-return, no-untyped-call]

    def record(self, region: Region, *inputs: Value, heads: int) -> tuple[Value, ...]:
        """The same in a region."""
        return region.add(_NormAndRotate, (self, heads), *inputs, writes=3)


class _NormAndRotate(Function):
    @staticmethod
    def forward(ctx: Any, op: tuple[NormAndRotate, int], *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.op, heads = op
        ctx.save_for_backward(*tensors)
        q, k = ctx.op.forward(*tensors, heads)
        return q, k, _parts(tensors[0], heads)[2]

    @staticmethod
    @adjoint
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.op.backward(*ctx.saved_tensors, *gradients), None, None


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    kv_heads = (qkv.shape[2] - heads) // 2
    return qkv.split_with_sizes([heads, kv_heads, kv_heads], dim=2)
