"""Rotary position embedding (Su et al., "RoFormer", 2021), halves rotated against each other as in Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.autograd import Function, Region, Value, adjoint
from stretto.tensor_parallel import Build

Rotation = tuple[Tensor, Tensor]
"""cos and sin [s, 1 or b, 1, r]: the first r features of a head are rotated, r/2 pairs."""


def rotation(
    seq_len: int, frequency: Tensor, factor: float = 1.0, *, dtype: torch.dtype, device: torch.device | str
) -> Rotation:
    """cos and sin, times `factor`, of the angles of positions 0..s-1: pair i of a head turns by pos * frequency[i].

    Computed in fp64, so that every dtype gets the nearest value whatever the position.
    """
    angle = torch.arange(seq_len, dtype=torch.float64, device=device)[:, None] * frequency.to(device)
    angle = torch.cat([angle, angle], -1)[:, None, None, :]
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


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
        return _Rotate.apply((self, rotated, rest), x, *cos_sin)  # type: ignore[no-any-return, no-untyped-call]

    def record(self, region: Region, *inputs: Value, sizes: tuple[int, ...], rest: int) -> tuple[Value, ...]:
        """The same in a region, of x, cos and sin."""
        return region.add(_Rotate, (self, sizes, rest), *inputs, writes=len(sizes) + bool(rest))


class _Rotate(Function):
    @staticmethod
    def forward(
        ctx: Any, op: tuple[Rotate, tuple[int, ...], int], x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        rotate, sizes, rest = op
        ctx.op, ctx.rotated = rotate, len(sizes)
        ctx.save_for_backward(cos, sin)
        rotate.forward(x.detach(), cos, sin, sum(sizes))
        return tuple(x.split_with_sizes([*sizes, rest] if rest else sizes, dim=2))

    @staticmethod
    @adjoint
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.op.backward(*ctx.saved_tensors, ctx.rotated, *gradients), None, None


def apply_rotary_(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    """The first `rotated` heads of x [s, b, heads, d] turned in place by the angle of their position."""
    heads = x[:, :, :rotated, : cos.shape[-1]]
    heads.copy_(_whole(heads, cos, sin))


def apply_rotary_backward(cos: Tensor, sin: Tensor, rotated: int, *gradients: Tensor) -> Tensor:
    """The adjoint of a cut into parts of which the first `rotated` are turned: [s, b, all heads, d]."""
    back = [apply_rotary(dy, cos, -sin) for dy in gradients[:rotated]]
    return torch.cat([*back, *gradients[rotated:]], dim=2)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [s, b, heads, d] turned by the angle of their position; with -sin it is the adjoint of that."""
    r = cos.shape[-1]
    if r == x.shape[-1]:
        return _whole(x, cos, sin)
    return torch.cat([_whole(x[..., :r], cos, sin), x[..., r:]], -1)


def _whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
