"""A small module in which every parameter is declared, and its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stretto.params import Init, ParamSpec, declare

ROWS, WIDTH = 30, 5
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}
"""How it is trained: a larger eps blows up no rounding."""


class Net(nn.Module):
    """Three layers in a list, and a scale that all of them use."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(3))
        self.scale = nn.Parameter(torch.empty(WIDTH, dtype=dtype))
        generator = torch.Generator().manual_seed(5)
        for module in self.modules():
            for name, param in module.named_parameters(recurse=False):
                declare(module, name, ParamSpec(tuple(param.shape), Init(), weight_decay=param.dim() > 1))
                param.data.copy_(torch.randn(param.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.scale
        return x.square().sum() / ROWS


def rows(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[ROWS, WIDTH]."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step)).to(dtype)


def adamw(net: Net) -> torch.optim.AdamW:
    """Torch's own, in which biases and the scale do not decay."""
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-2, **ADAMW)
