"""Blocks of which two matrices are stored as one: what rules of single matrices must tell apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stretto.params import ParamSpec, declare

WIDTH = 6


class Block(nn.Module):
    """Two matrices that are stored as one, `up` and `down`, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.both = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.both.weight.chunk(2)
        return x + torch.tanh(x @ up + self.bias) @ down


def drawn(net: nn.Module) -> None:
    """Give all parameters of a module values in fp64, and say what its blocks store."""
    generator = torch.Generator().manual_seed(7)
    for param in net.parameters():
        param.data = torch.randn(param.shape, generator=generator).double()
    for block in (each for each in net.modules() if isinstance(each, Block)):
        declare(block.both, "weight", [ParamSpec((WIDTH, WIDTH), None, part=name) for name in ("up", "down")])
