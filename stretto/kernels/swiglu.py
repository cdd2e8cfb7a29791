"""The adjoint of SwiGLU: what it reads it reads once, although it writes two halves of one tensor.

A compiler makes the halves one after the other, and reads the gradient and the gate for each of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements of a program: with four warps 16 bytes of bf16 for a thread, the widest load there is."""


@triton.jit  # which reads annotations, and knows no types but its own
def _kernel(dy, gate_up, out, y, inner, blocks, again: tl.constexpr, block: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * inner + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.sigmoid(gate)
    silu = gate * g
    tl.store(out + row * 2 * inner + at, (d * up * g * (1 + gate * (1 - g))).to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * 2 * inner + inner + at, (d * silu).to(out.dtype.element_ty), mask=inside)
    if again:
        tl.store(y + row * inner + at, (silu * up).to(y.dtype.element_ty), mask=inside)


def backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor]:
    """`stretto.tensor_parallel.formulas.swiglu_backward`: dy [.., f], gate_up [.., 2f], contiguous."""
    return (_launch(dy, gate_up, again=False)[1],)


def both(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`stretto.tensor_parallel.formulas.swiglu_both`: the output once more, and the gradient."""
    return _launch(dy, gate_up, again=True)


def _launch(dy: Tensor, gate_up: Tensor, *, again: bool) -> tuple[Tensor, Tensor]:
    dy, gate_up, inner = dy.contiguous(), gate_up.contiguous(), dy.shape[-1]
    blocks = triton.cdiv(inner, _BLOCK)
    out = torch.empty_like(gate_up)
    y = torch.empty_like(dy) if again else dy
    _kernel[(blocks * (dy.numel() // inner),)](dy, gate_up, out, y, inner, blocks, again, _BLOCK, num_warps=4)
    return y, out
