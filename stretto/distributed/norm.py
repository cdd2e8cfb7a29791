"""The norm of the gradient, each logical parameter counted once, and clipping by it."""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.collectives import all_reduce_, all_reduce_max
from stretto.distributed.data_parallel import DataParallel
from stretto.world import Axis, Done, Work


class NormSum:
    """The norm of the whole model's gradient, on its way: the squares of this rank's are being added to the others'.

    Of the ranks that hold the same rectangle one counts it; the squares are summed over the ranks that hold others.
    """

    def __init__(self, weights: DataParallel) -> None:
        state = weights.state
        # Data-parallel ranks with whole gradients hold equal ones: of dense layers alone they need not be summed over.
        everyone = weights.sharding.state or state.has("edp")
        repeated = () if everyone else ("cp", "dp")
        position = {name: at for name, at in weights.position().items() if name.partition(".")[0] not in repeated}
        own = [
            (each.of.name, view)
            for each in weights.gradients
            if each.of.spec.owner(position)
            for _, view in each.pieces
            if view.numel()
        ]
        self.squares = torch.zeros((), dtype=torch.float64, device=state.world.device)
        weights.norms = [name for name, _ in own], self.squares.new_zeros(0)
        if own:
            weights.norms = weights.norms[0], _norms([view for _, view in own])
        axis = state.axis(*(("tp", "cp", "dp", "pp") if everyone else ("tp", "pp")))
        self._work: Work = Done()
        if state.ordered:
            self.squares = exact_squares([view for _, view in own], axis, self.squares)
        else:
            self.squares += weights.norms[1].square().sum()
            self._work = all_reduce_(self.squares, axis)

    def wait(self) -> Tensor:
        """The norm [] in fp64, the same bits on every rank."""
        self._work.wait()
        return self.squares.sqrt()


def grad_norm(weights: DataParallel) -> Tensor:
    """L2 norm [] in fp64 of the whole model's gradient, the same bits on every rank."""
    return NormSum(weights).wait()


DIGITS, BITS = 3, 24
"""Digits of a fixed-point number, and bits of a digit: 2^39 squares of at most 1 add up in int64."""


def exact_squares(gradients: list[Tensor], axis: Axis, like: Tensor) -> Tensor:
    """The sum [] of all squares over the ranks of an axis, to 2^-72 of the largest one: a sum of integers, to the same
    bits in any order and however the tensors are cut. NaN where an element is not finite."""
    found = [torch.nan_to_num(g, 0.0, 0.0, 0.0).abs().amax().to(like) for g in gradients]
    largest = all_reduce_max(torch.stack([like, *found]).amax(), axis)
    _, exponent = torch.frexp(largest)
    up, down = _power(exponent), _power(-exponent)
    digits = torch.zeros(DIGITS + 1, dtype=torch.int64, device=like.device)
    for flat in (part for g in gradients for part in torch.split(g.reshape(-1), 2**24)):
        finite = flat.isfinite()
        digits[DIGITS] += (~finite).sum()
        rest = (torch.where(finite, flat, 0.0).to(like.dtype) * down).square()
        for n in range(DIGITS):
            rest = rest * 2.0**BITS
            whole = rest.floor()
            digits[n] += whole.to(torch.int64).sum()
            rest = rest - whole
    all_reduce_(digits, axis).wait()
    places = [digits[n].to(like) * 2.0 ** (-BITS * (n + 1)) for n in range(DIGITS)]
    total = (places[0] + (places[1] + places[2])) * up * up
    return torch.where(digits[DIGITS] > 0, torch.nan, total)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent [] in fp64, by its bits."""
    return (exponent.to(torch.int64).clamp(-1022, 1023) + 1023 << 52).view(torch.float64)


def _norms(gradients: list[Tensor]) -> Tensor:
    """[n] in fp64, of each of them."""
    if gradients[0].is_cuda:  # all in a few kernels, which add up by blocks
        return torch.stack(torch._foreach_norm(gradients)).double()
    # Row by row: over 16 million elements torch's fp32 norm on the CPU loses the fourth digit, over a row none.
    rows = [torch.linalg.vector_norm(g, dim=-1).double() for g in gradients]
    return torch.stack([torch.linalg.vector_norm(row) for row in rows])


def clip_factor(norm: Tensor, limit: float) -> Tensor | None:
    """What scales a gradient of norm `norm` [] down to `limit` where it is longer (Pascanu et al., 2013).

    None without a limit, which 0 means. The factor is torch's own, limit / (norm + 1e-6), and stays on the device: the
    host does not wait. The optimizer multiplies by it as it reads the gradient.
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else None
