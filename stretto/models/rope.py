"""Rotary position embedding (Su et al., "RoFormer", 2021), halves rotated against each other as in Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.tensor_parallel import Build


def rotation(
    seq_len: int, dim: int, base: float, *, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin [s, 1, 1, dim] of the angles of positions 0..s-1: pair i of a head turns by pos / base^(2i/dim).

    Computed in fp64, so that every dtype gets the nearest value whatever the position.
    """
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = torch.arange(seq_len, dtype=torch.float64, device=device)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[:, None, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


@dataclass(frozen=True)
class Rotate:
    """Turns heads by the angle of their position, and puts gradients side by side in the pass that turns them back."""

    forward: Callable[..., None]
    backward: Callable[..., Tensor]

    @classmethod
    def of(cls, build: Build) -> Rotate:
        """As `build` wants it computed."""
        return cls(build.fuse(apply_rotary_), build.fuse(apply_rotary_backward))

    def __call__(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], *rotated: int, rest: int = 0) -> tuple[Tensor, ...]:
        """Cut x [s, b, heads, d] into `rotated` heads, and a `rest` that is left as it is and comes last.

        x is used up: the heads are turned where they lie, so that they do not lie there twice until the backward.
        """
        return _Rotate.apply(self, x, *cos_sin, rotated, rest)  # type: ignore[no-any-return, no-untyped-call]


class _Rotate(Function):
    @staticmethod
    def forward(
        ctx: Any, op: Rotate, x: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...], rest: int
    ) -> tuple[Tensor, ...]:
        ctx.op, ctx.rotated = op, len(sizes)
        ctx.save_for_backward(cos, sin)
        op.forward(x.detach(), cos, sin, sum(sizes))
        return tuple(x.split_with_sizes([*sizes, rest] if rest else sizes, dim=2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.op.backward(*ctx.saved_tensors, ctx.rotated, *gradients), None, None, None, None


def apply_rotary_(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    """The first `rotated` heads of x [s, b, heads, d] turned in place by the angle of their position."""
    heads = x[:, :, :rotated]
    heads.copy_(_rotated(heads, cos, sin))


def apply_rotary_backward(cos: Tensor, sin: Tensor, rotated: int, *gradients: Tensor) -> Tensor:
    """The adjoint of a cut into parts of which the first `rotated` are turned: [s, b, all heads, d]."""
    back = [_rotated(dy, cos, -sin) for dy in gradients[:rotated]]
    return torch.cat([*back, *gradients[rotated:]], dim=2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
