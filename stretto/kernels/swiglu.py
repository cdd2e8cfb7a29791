"""The adjoint of SwiGLU: what it reads it reads once, although it writes two halves of one tensor.

A compiler makes the halves one after the other, and reads the gradient and the gate for each of them. Here each program
writes where it has read: the largest activation of a block and its gradient never exist together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stretto.kernels.launches import Launches, cdiv

_BLOCK = 1024
"""Elements of a program: with four warps 16 bytes of bf16 for a thread, the widest load there is."""


@Launches
@triton.jit  # which reads annotations, and knows no types but its own
def _kernel(dy, gate_up, inner, blocks, recompute: tl.constexpr, block: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * inner + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.sigmoid(gate)
    silu = gate * g
    d_gate, d_up = d * up * g * (1 + gate * (1 - g)), d * silu
    tl.store(gate_up + row * 2 * inner + at, d_gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(gate_up + row * 2 * inner + inner + at, d_up.to(gate_up.dtype.element_ty), mask=inside)
    if recompute:
        tl.store(dy + row * inner + at, (silu * up).to(dy.dtype.element_ty), mask=inside)


@Launches
@triton.jit
def _weighted(dy, gate_up, weights, dweights, inner, turns: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    products = tl.zeros([block], tl.float32)
    for turn in range(turns):
        at = turn * block + tl.arange(0, block)
        within = at < inner
        gate = tl.load(gate_up + row * 2 * inner + at, mask=within, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * inner + inner + at, mask=within, other=0.0).to(tl.float32)
        d = tl.load(dy + row * inner + at, mask=within, other=0.0).to(tl.float32)
        g = tl.sigmoid(gate)
        silu = gate * g
        y = (silu * up).to(dy.dtype.element_ty).to(tl.float32)  # what the forward has multiplied
        products += d * y
        d *= weight
        d_gate, d_up = d * up * g * (1 + gate * (1 - g)), d * silu
        tl.store(gate_up + row * 2 * inner + at, d_gate.to(gate_up.dtype.element_ty), mask=within)
        tl.store(gate_up + row * 2 * inner + inner + at, d_up.to(gate_up.dtype.element_ty), mask=within)
        tl.store(dy + row * inner + at, (y * weight).to(dy.dtype.element_ty), mask=within)
    tl.store(dweights + row, tl.sum(products, 0))


def backward(dy: Tensor, gate_up: Tensor) -> tuple[Tensor]:
    """`stretto.tensor_parallel.formulas.swiglu_backward`: dy [.., f], gate_up [.., 2f], which is used up."""
    return (_launch(dy, gate_up, recompute=False)[1],)


def both(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`stretto.tensor_parallel.formulas.swiglu_both`: the output once more, and the gradient; both are used up."""
    return _launch(dy, gate_up, recompute=True)


def weighted(dy: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`stretto.tensor_parallel.formulas.swiglu_weighted`: dy [m, f], gate_up [m, 2f], both used up, weight [m, 1]."""
    dy, gate_up, weight, (rows, inner) = dy.contiguous(), gate_up.contiguous(), weight.contiguous(), dy.shape
    dweight = torch.empty_like(weight)
    if rows:
        _weighted[(rows,)](dy, gate_up, weight, dweight, inner, cdiv(inner, _BLOCK), _BLOCK, num_warps=4)
    torch.autograd.graph.increment_version(gate_up)
    return dy, gate_up, dweight


def _launch(dy: Tensor, gate_up: Tensor, *, recompute: bool) -> tuple[Tensor, Tensor]:
    """(the output in the place of dy, or dy; the gradient in the place of gate_up)."""
    dy, gate_up, inner = dy.contiguous(), gate_up.contiguous(), dy.shape[-1]
    blocks = cdiv(inner, _BLOCK)
    _kernel[(blocks * (dy.numel() // inner),)](dy, gate_up, inner, blocks, recompute, _BLOCK, num_warps=4)
    torch.autograd.graph.increment_version(gate_up)  # whoever saved it as well hears that it is gone
    return dy, gate_up
