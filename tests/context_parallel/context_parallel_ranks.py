"""The ranks of cp as threads of one process: what they send each other passes through a table, and costs nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Barrier
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from stretto.world import AsyncTensor, Axis, Rows, RowSplits

SECONDS = 20.0


class Table:
    """Where the ranks of an axis, found by their numbers, lay what they send and take what is theirs."""

    def __init__(self) -> None:
        self._barriers: dict[tuple[int, ...], Barrier] = {}
        self._laid: defaultdict[tuple[int, ...], dict[int, Tensor]] = defaultdict(dict)

    def all(self, x: Tensor, axis: Axis) -> list[Tensor]:
        """What every rank of the axis has, in order."""
        if axis.size == 1:
            return [x]
        barrier = self._barriers.setdefault(axis.ranks, Barrier(axis.size))
        self._laid[axis.ranks][axis.rank] = x.detach().clone()
        barrier.wait(SECONDS)
        found = [self._laid[axis.ranks][rank] for rank in range(axis.size)]
        barrier.wait(SECONDS)
        return found

    def gather(self, x: Tensor, axis: Axis) -> AsyncTensor:
        return AsyncTensor(torch.cat(self.all(x, axis)))

    def scatter(self, x: Tensor, axis: Axis) -> AsyncTensor:
        return AsyncTensor(sum(each.chunk(axis.size)[axis.rank] for each in self.all(x, axis)))  # type: ignore[arg-type]

    def scatter_rows(self, rows: Rows, like: Tensor, axis: Axis) -> AsyncTensor:
        """The parts of the others are asked for with a place to write them to, as a peer buffer asks."""
        shape = (like.shape[0] // axis.size, *like.shape[1:])
        parts = [rows(to, None if to == axis.rank else like.new_empty(shape)) for to in range(axis.size)]
        return self.scatter(torch.cat(parts), axis)

    def shift(self, x: Tensor, axis: Axis) -> AsyncTensor:
        return AsyncTensor(self.all(x, axis)[(axis.rank - 1) % axis.size])

    def rows(self, x: Tensor, splits: RowSplits, axis: Axis, order: Tensor | None = None) -> AsyncTensor:
        """As ranks over a group; what leaves is in the order of their ranks."""
        if axis.size == 1:
            return AsyncTensor(x if order is None else x[order])
        x = x if order is None else x[order]
        axis.tell("all_to_all_rows", x)
        every = self.all(x, axis)
        assert splits.pairs is not None
        parts = [each.split(list(sent))[axis.rank] for each, sent in zip(every, splits.pairs, strict=True)]
        assert [len(part) for part in parts] == list(splits.received)
        return AsyncTensor(torch.cat(parts))

    def exchange(self, x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
        return _Exchange.apply(self, x, axis, split_dim, concat_dim)  # type: ignore[no-any-return, no-untyped-call]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Table, x: Tensor, axis: Axis, split_dim: int, concat_dim: int) -> Tensor:
        ctx.at = table, axis, split_dim, concat_dim
        return torch.cat([each.chunk(axis.size, split_dim)[axis.rank] for each in table.all(x, axis)], concat_dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        table, axis, split_dim, concat_dim = ctx.at
        parts = [each.chunk(axis.size, concat_dim)[axis.rank] for each in table.all(dy, axis)]
        return None, torch.cat(parts, split_dim), None, None, None


@contextmanager
def as_threads() -> Iterator[Callable[[int, Callable[[int], Any]], list[Any]]]:
    """Inside, `run(n, f)` calls f(rank) on n threads; their collectives meet each other."""
    table, at = Table(), "stretto.context_parallel"
    with (
        mock.patch(f"{at}.exchange.all_gather_async", table.gather),
        mock.patch(f"{at}.exchange.reduce_scatter_async", table.scatter),
        mock.patch(f"{at}.exchange.reduce_scatter_rows_async", table.scatter_rows),
        mock.patch(f"{at}.exchange.shift_async", table.shift),
        mock.patch(f"{at}.needed.all_to_all_rows_async", table.rows),
        mock.patch(f"{at}.attention.all_to_all", table.exchange),
    ):
        yield partial(_run, table)


def _run(_: Table, n: int, f: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(n) as threads:
        return [each.result(SECONDS) for each in [threads.submit(f, rank) for rank in range(n)]]


class Room:
    """A peer buffer that takes anything, of which nobody asks more."""

    def takes(self, size: int) -> bool:
        return size > 0


def axes(rank: int, cp: int, inner: int) -> tuple[Axis, Axis]:
    """The axes of a rank of cp along which heads and keys are exchanged."""
    own, group = rank % inner, rank // inner
    near = tuple(group * inner + i for i in range(inner))
    far = tuple(own + inner * j for j in range(cp // inner))
    return Axis("cp.0", own, near), Axis("cp.1", group, far)
