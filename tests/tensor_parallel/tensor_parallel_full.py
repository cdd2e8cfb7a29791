"""Whole weights into modules that are cut, and whole gradients out of them, by what their declarations say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stretto.params import Block, collect
from stretto.world import Axis


def draw(shape: tuple[int, ...], name: str, scale: float = 0.5) -> Tensor:
    """The same numbers on every rank and in the reference, by name."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 7919 + len(name))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def where(block: Block) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(block.offsets, block.shape, strict=True))


def set_full(model: nn.Module) -> None:
    """Fill each logical tensor with its part of `draw(shape, name)`, padding with zeros."""
    with torch.no_grad():
        for item in collect(model):
            item.param.zero_()
            for part in item.logical:
                part.view(item.param.data).copy_(draw(part.spec.shape, part.name)[where(part.block)])


def full_grads(model: nn.Module, tp: Axis) -> dict[str, Tensor]:
    """Whole gradients, by logical name.

    What `sum_grad` declares as partial is added up over the axis; of what is cut, one copy of each chunk; what every
    rank holds whole must be bitwise the same on all. Padding must have got none.
    """
    found = {}
    for item in collect(model):
        grad = item.param.grad
        assert grad is not None, item.name
        covered = torch.zeros_like(grad)
        for part in item.logical:
            covered_part = part.view(covered)
            covered_part.fill_(1)
            wide = torch.zeros(part.spec.shape, dtype=grad.dtype)
            wide[where(part.block)] = part.view(grad)
            copies = [s.copies for s in part.spec.shard if s.axis == "tp"]
            everyone = _everyone(wide, tp)
            if "tp" in part.spec.sum_grad:
                found[part.name] = torch.stack(everyone).sum(0)
            elif copies:  # of ranks that hold the same chunk, one has all of its gradient
                found[part.name] = torch.stack(everyone[:: copies[0]]).sum(0)
            else:
                assert all(torch.equal(g, wide) for g in everyone), f"{part.name} differs between ranks"
                found[part.name] = wide
        assert (grad[covered == 0] == 0).all(), f"padding of {item.name} got a gradient"
    return found


def mine(x: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """This rank's part of an activation outside the parallel region."""
    return x.chunk(tp.size)[tp.rank] if sequence_parallel else x


def compare(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys(), f"{what}: {sorted(found.keys() ^ wanted.keys())}"
    for name, want in wanted.items():
        error = (found[name] - want).abs().max().item() if want.numel() else 0.0
        assert error <= tolerance * max(1.0, want.abs().max().item()), f"{what}, {name}: {error:.1e}"


def _everyone(x: Tensor, tp: Axis) -> list[Tensor]:
    if tp.size == 1:
        return [x]
    found = [torch.empty_like(x) for _ in tp.ranks]
    dist.all_gather(found, x.contiguous(), group=tp.group)
    return found
