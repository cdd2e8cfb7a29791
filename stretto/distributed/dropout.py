"""Dropout for modules that know nothing of ranks: what falls away depends on an element's row in the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from stretto.random import chance, dropped, stream_key

M = TypeVar("M", bound=nn.Module)

NAMED: Final = 3
"""Modules that the line about them names."""


class Dropout(nn.Module):
    """`nn.Dropout` whose mask is a function of seed, name, the row's number in the run and the place in the row.

    So every layout draws its part of the same mask. x has the rows of a microbatch along its first dimension, each as
    often as the others: [b, ...], or [b * s, ...]. Which rows they are a `Trainer` says; after `shard` say it before
    each forward, `sharded.number(rows)`. Ranks that hold other parts of a row (heads under tensor parallelism) would
    draw alike: put it where the activation is whole. p is rounded to a multiple of 2^-16. Called twice in one forward
    it drops the same places both times.
    """

    def __init__(self, p: float = 0.5, name: str = "", seed: int = 0) -> None:
        super().__init__()
        self.p, self.name = p, name
        self.keys = stream_key(seed, f"dropout/{name}")
        self.rows: range | Tensor | None = None
        """Numbers in the run of the rows that come: int64 [b]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        if self.rows is None:
            raise ValueError(
                f"{self.name or 'Dropout'} drops with p={self.p:g}, but nobody said which rows of the run these are: "
                "a Trainer over batches of rows does; after shard call sharded.number(rows) before each forward; "
                "eval() drops nothing"
            )
        rows = self.rows
        numbers = torch.arange(rows.start, rows.stop, device=x.device) if isinstance(rows, range) else rows.to(x.device)
        if x.dim() == 0 or x.shape[0] % max(1, len(numbers)):
            raise ValueError(f"{self.name or 'Dropout'} got {list(x.shape)}, which are not the {len(numbers)} rows")
        first = torch.zeros(1, dtype=torch.int64, device=x.device)
        mask = dropped(self.keys, numbers, first, x.numel() // max(1, len(numbers)), self.p)
        return x.masked_fill(mask.view(x.shape), 0.0) * (1 / (1 - chance(self.p)))

    def extra_repr(self) -> str:
        return f"p={self.p:g}, {self.name}"


def number_rows(module: nn.Module, rows: range | Tensor) -> None:
    """Say to every `Dropout` of `module` which rows of the run come next."""
    for part in module.modules():
        if isinstance(part, Dropout):
            part.rows = rows


def replace_dropout(module: M, seed: int = 0, prefix: str = "") -> M:
    """Put a layout-independent `Dropout` in the place of each `nn.Dropout` of `module`; returns the module.

    Streams have the names of the modules, after `prefix`: of a stage of a pipeline they must be the same in every
    layout, as those of parameters.
    """
    if type(module) is nn.Dropout:
        raise ValueError("the module is itself an nn.Dropout: stretto.Dropout(p, name, seed) takes its place")
    for path, part in list(module.named_modules()):
        for name, child in part.named_children():
            if type(child) is nn.Dropout:
                setattr(part, name, Dropout(child.p, f"{prefix}{path}{'.' if path else ''}{name}", seed))
    return module


def warn_of_dropout(module: nn.Module) -> None:
    """One line where modules drop by the generator of each process: their masks depend on the layout."""
    if found := list(_drawing(module)):
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        logging.getLogger(__name__).warning(
            "dropout of %s%s draws from each process's own generator, so the layout changes the model: "
            "stretto.replace_dropout(model, seed) draws by row instead (of nn.Dropout), p=0 draws nothing",
            ", ".join(found[:NAMED]),
            more,
        )


def _drawing(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        # Attention and recurrent modules of torch have a number of that name.
        p = part.p if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0.0)
        if isinstance(p, float | int) and p > 0 and not isinstance(part, Dropout):
            yield name or type(part).__name__
