"""Cheap operations in front of a matrix product: little work on much memory, each beside its adjoint.

A GPU spends on them what it takes to read and write, so each is one kernel (`Build.fuse`), and what they make need not
be kept for the backward: doing them once more costs one write, which the matrix product's backward reads anyway
(Korthikanti et al., "Reducing activation recomputation", 2022, do the same with attention).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stretto.tensor_parallel.build import Build

Forward = Callable[..., Tensor]
"""inputs -> output."""
Backward = Callable[..., tuple[Tensor, ...]]
"""gradient of the output, then the inputs -> gradient of each input."""


@dataclass(frozen=True)
class Pointwise:
    """An operation with its adjoint. `both` gives the output once more and the gradients, in one pass over memory."""

    forward: Forward
    backward: Backward
    both: Callable[..., tuple[Tensor, ...]]
    again: bool

    @classmethod
    def of(cls, forward: Forward, backward: Backward, build: Build) -> Pointwise:
        """The pair as `build` wants it computed."""

        def both(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return forward(*inputs), *backward(dy, *inputs)

        return cls(build.fuse(forward), build.fuse(backward), build.fuse(both), build.again)

    def __call__(self, *inputs: Tensor) -> Tensor | Lazy:
        """The output, or where it is not to be kept, how to make it."""
        return Lazy(self, inputs) if self.again else self.now(*inputs)

    def now(self, *inputs: Tensor) -> Tensor:
        """The output as a tensor, whoever takes it."""
        y: Tensor = _Apply.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return y


@dataclass(frozen=True)
class Lazy:
    """An output that is not made yet. The matrix product that takes it makes it, forward and backward."""

    made_by: Pointwise
    inputs: tuple[Tensor, ...]


class _Apply(Function):
    @staticmethod
    def forward(ctx: Any, op: Pointwise, *inputs: Tensor) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(*inputs)
        return op.forward(*(x.detach() for x in inputs))  # autograd looks no further, nor should the compiler

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.op.backward(dy, *ctx.saved_tensors)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, "GLU variants improve Transformer", 2020): [.., 2f] -> [.., f]."""
    gate, up = _wide(gate_up).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor]:
    """Its adjoint: with g = sigmoid(gate), d silu = g (1 + gate (1 - g))."""
    d = _wide(dy)
    gate, up = _wide(gate_up).chunk(2, -1)
    g = gate.sigmoid()
    d_gate = d * up * g * (1 + gate * (1 - g))
    return (torch.cat([d_gate, d * gate * g], -1).to(gate_up.dtype),)


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh form (Hendrycks and Gimpel, 2016)."""
    return F.gelu(x, approximate="tanh")


def gelu_backward(dy: Tensor, x: Tensor) -> tuple[Tensor]:
    """Its adjoint."""
    return (torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019), in fp32 or wider."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Its adjoint: with n = x / rms, dx = (dn - n mean(dn n)) / rms."""
    d, wide = _wide(dy), _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n, dn = wide * scale, d * weight
    dx = (dn - n * (dn * n).mean(-1, keepdim=True)) * scale
    return dx.to(x.dtype), _over_rows(d * n).to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al., 2016), in fp32 or wider."""
    n, _ = _normalised(x, eps)
    return (n * weight + bias).to(x.dtype)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its adjoint: dx = (dn - mean(dn) - n mean(dn n)) / std."""
    d = _wide(dy)
    n, scale = _normalised(x, eps)
    dn = d * weight
    dx = (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True)) * scale
    return dx.to(x.dtype), _over_rows(d * n).to(weight.dtype), _over_rows(d).to(bias.dtype)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * scale, scale


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over_rows(x: Tensor) -> Tensor:
    """Sum over all dimensions but the last."""
    return x.flatten(0, -2).sum(0)
