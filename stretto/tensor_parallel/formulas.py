"""Cheap operations in front of GEMMs, each as plain arithmetic beside its adjoint.

They say what is computed; who computes it, and in how many passes over memory, is another matter (`Build.fuse`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Forward = Callable[..., Tensor]
"""inputs -> output."""
Backward = Callable[..., tuple[Tensor, ...]]
"""gradient of the output, then the inputs -> gradient of each input.

With `dresidual`, the gradient that the first input gets from elsewhere, that is added before anything is rounded.
"""


@dataclass(frozen=True)
class Formula:
    """An operation as plain arithmetic: it says what is computed, and is what a kernel of it is held against."""

    forward: Forward
    backward: Backward
    both: Callable[..., tuple[Tensor, ...]]
    weighted: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    """As `weighted` below, where it is more than that of `both`."""


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, "GLU variants improve Transformer", 2020): [.., 2f] -> [.., f]."""
    gate, up = widened(gate_up).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor]:
    """Its adjoint: with g = sigmoid(gate), d silu = g (1 + gate (1 - g)). A kernel may use gate_up up."""
    d = widened(dy)
    gate, up = widened(gate_up).chunk(2, -1)
    g = gate.sigmoid()
    d_gate = d * up * g * (1 + gate * (1 - g))
    return (torch.cat([d_gate, d * gate * g], -1).to(gate_up.dtype),)


def swiglu_both(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Itself and its adjoint. A kernel may use up both that it is given."""
    return swiglu(gate_up), *swiglu_backward(dy, gate_up)


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """(up + 1) gate sigmoid(alpha gate), both clamped first, as gpt-oss has it: [.., 2f] -> [.., f]."""
    gate, up = widened(gate_up).chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * (alpha * gate).sigmoid()).to(gate_up.dtype)


def clamped_swiglu_backward(dy: Tensor, gate_up: Tensor, alpha: float, limit: float) -> tuple[Tensor]:
    """Its adjoint: with g = sigmoid(alpha gate), d (gate g) = g (1 + alpha gate (1 - g)); none beyond a clamp."""
    d = widened(dy)
    gate, up = widened(gate_up).chunk(2, -1)
    within = (gate <= limit, up.abs() <= limit)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    g = (alpha * gate).sigmoid()
    d_gate = d * (up + 1) * g * (1 + alpha * gate * (1 - g)) * within[0]
    return (torch.cat([d_gate, d * gate * g * within[1]], -1).to(gate_up.dtype),)


def clamped_swiglu_both(dy: Tensor, gate_up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    """Itself and its adjoint."""
    return clamped_swiglu(gate_up, alpha, limit), *clamped_swiglu_backward(dy, gate_up, alpha, limit)


def swiglu_weighted(dy: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted` of SwiGLU. A kernel may use up dy and gate_up."""
    return weighted(swiglu_both, dy, gate_up, weight)


def weighted(
    both: Callable[..., tuple[Tensor, ...]], dy: Tensor, x: Tensor, weight: Tensor, **bound: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows y = f(x) count with a weight [m, 1], and dy is the gradient of what they add up to: weight y, the
    gradient of x, and that of the weight, <dy, y>."""
    wide = dy.to(weight.dtype)
    y, dx = both((wide * weight).to(dy.dtype), x, **bound)
    return (y * weight).to(y.dtype), dx, (wide * y).sum(-1, keepdim=True)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), with the normal distribution function by erf (Hendrycks and Gimpel, 2016)."""
    return F.gelu(x)


def gelu_backward(dy: Tensor, x: Tensor) -> tuple[Tensor]:
    """Its adjoint: dy (Phi(x) + x phi(x))."""
    return (torch.ops.aten.gelu_backward(dy, x),)


def gelu_both(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Itself and its adjoint."""
    return gelu(x), *gelu_backward(dy, x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with Phi approximated by tanh (as above, section 2), as GPT-2 has it; up to 5e-4 from the exact one."""
    return F.gelu(x, approximate="tanh")


def gelu_tanh_backward(dy: Tensor, x: Tensor) -> tuple[Tensor]:
    """Its adjoint."""
    return (torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),)


def gelu_tanh_both(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Itself and its adjoint."""
    return gelu_tanh(x), *gelu_tanh_backward(dy, x)


def _geglu(gate_up: Tensor, approximate: str) -> Tensor:
    gate, up = widened(gate_up).chunk(2, -1)
    return (F.gelu(gate, approximate=approximate) * up).to(gate_up.dtype)


def _geglu_backward(dy: Tensor, gate_up: Tensor, approximate: str) -> tuple[Tensor]:
    d = widened(dy)
    gate, up = widened(gate_up).chunk(2, -1)
    d_gate = torch.ops.aten.gelu_backward(d * up, gate, approximate=approximate)
    return (torch.cat([d_gate, d * F.gelu(gate, approximate=approximate)], -1).to(gate_up.dtype),)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up (Shazeer, as above): [.., 2f] -> [.., f]."""
    return _geglu(gate_up, "none")


def geglu_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor]:
    """Its adjoint."""
    return _geglu_backward(dy, gate_up, "none")


def geglu_both(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Itself and its adjoint."""
    return geglu(gate_up), *geglu_backward(dy, gate_up)


def geglu_tanh(gate_up: Tensor) -> Tensor:
    """The same with the GELU approximated by tanh, as Gemma has it."""
    return _geglu(gate_up, "tanh")


def geglu_tanh_backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor]:
    """Its adjoint."""
    return _geglu_backward(dy, gate_up, "tanh")


def geglu_tanh_both(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Itself and its adjoint."""
    return geglu_tanh(gate_up), *geglu_tanh_backward(dy, gate_up)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019), in fp32 or wider."""
    wide = widened(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Its adjoint: with n = x / rms, dx = (dn - n mean(dn n)) / rms."""
    d, wide = widened(dy), widened(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n, dn = wide * scale, d * weight
    dx = (dn - n * (dn * n).mean(-1, keepdim=True)) * scale
    return _joined(dx, dresidual).to(x.dtype), _over_rows(d * n).to(weight.dtype)


def rms_norm_both(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Itself and its adjoint."""
    return rms_norm(x, weight, eps), *rms_norm_backward(dy, x, weight, eps, dresidual)


def zero_centered_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm that multiplies by 1 + weight, as in Gemma; the sum is in fp32 or wider."""
    return rms_norm(x, 1 + widened(weight), eps)


def zero_centered_rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Its adjoint."""
    dx, dw = rms_norm_backward(dy, x, 1 + widened(weight), eps, dresidual)
    return dx, dw.to(weight.dtype)


def zero_centered_rms_norm_both(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Itself and its adjoint."""
    return zero_centered_rms_norm(x, weight, eps), *zero_centered_rms_norm_backward(dy, x, weight, eps, dresidual)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al., 2016), in fp32 or wider."""
    n, _ = _normalised(x, eps)
    return (n * weight + bias).to(x.dtype)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Its adjoint: dx = (dn - mean(dn) - n mean(dn n)) / std."""
    d = widened(dy)
    n, scale = _normalised(x, eps)
    dn = d * weight
    dx = (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True)) * scale
    return _joined(dx, dresidual).to(x.dtype), _over_rows(d * n).to(weight.dtype), _over_rows(d).to(bias.dtype)


def layer_norm_both(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Itself and its adjoint."""
    return layer_norm(x, weight, bias, eps), *layer_norm_backward(dy, x, weight, bias, eps, dresidual)


def shift(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias: [.., h] -> the same."""
    return x + bias


def shift_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Its adjoint."""
    del x
    return dy, _over_rows(widened(dy)).to(bias.dtype)


def shift_both(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Itself and its adjoint."""
    return shift(x, bias), *shift_backward(dy, x, bias)


def _joined(dx: Tensor, dresidual: Tensor | None) -> Tensor:
    return dx if dresidual is None else dx + dresidual


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = widened(x)
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * scale, scale


def widened(x: Tensor) -> Tensor:
    """In fp32, or as wide as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _over_rows(x: Tensor) -> Tensor:
    """Sum over all dimensions but the last."""
    return x.flatten(0, -2).sum(0)


SWIGLU = Formula(swiglu, swiglu_backward, swiglu_both, swiglu_weighted)
CLAMPED_SWIGLU = Formula(clamped_swiglu, clamped_swiglu_backward, clamped_swiglu_both)
GEGLU = Formula(geglu, geglu_backward, geglu_both)
GEGLU_TANH = Formula(geglu_tanh, geglu_tanh_backward, geglu_tanh_both)
GELU = Formula(gelu, gelu_backward, gelu_both)
GELU_TANH = Formula(gelu_tanh, gelu_tanh_backward, gelu_tanh_both)
RMS_NORM = Formula(rms_norm, rms_norm_backward, rms_norm_both)
ZERO_CENTERED_RMS_NORM = Formula(zero_centered_rms_norm, zero_centered_rms_norm_backward, zero_centered_rms_norm_both)
SHIFT = Formula(shift, shift_backward, shift_both)
LAYER_NORM = Formula(layer_norm, layer_norm_backward, layer_norm_both)


def add_rows_(total: Tensor, dy: Tensor, ids: Tensor, mine: Tensor) -> Tensor:
    """total [n, h] plus, at the row of each id [..], the row of dy [.., h], where that row is `mine` [..]."""
    masked = (dy * mine.unsqueeze(-1)).to(total.dtype)
    return total.add_(torch.ops.aten.embedding_dense_backward(masked, ids, total.shape[0], -1, False))
