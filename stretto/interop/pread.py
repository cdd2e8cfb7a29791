"""Rectangles of tensors out of files, by some threads, each with a small buffer of its own.

Where the tensor to fill has the dtype of the file and is contiguous there, bytes go straight into it; else through a
buffer of `CHUNK` bytes a thread. So a read needs no memory that grows with the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from math import prod
from pathlib import Path
from threading import local
from typing import Any, Final

import torch
from torch import Tensor

CHUNK: Final = 1 << 24
"""Bytes that one thread reads at a time, unless a single row is longer."""
THREADS: Final = 4
"""One waits for the disk while others cast: a disk is kept busy by several, and a page cache is copied by several."""


class Reads:
    """Reads under way, and the files that they come from."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="weights")
        self._under_way: list[Future[int]] = []
        self._own = local()

    def begin(
        self,
        path: Path,
        offset: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        dims: Sequence[tuple[int, int]],
        into: Tensor,
        step: int = 1,
    ) -> None:
        """Read the rectangle `dims` (first, length) of a row-major tensor at `offset` into a tensor of its shape.

        Of the last dimension, which is not the first, `into` has each `step`-th.
        """
        if not dims or not into.numel():
            dims, shape, into = ((0, into.numel()),), (into.numel(),), into.reshape(-1)
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        first, count = dims[0]
        rows = max(1, CHUNK // max(1, dtype.itemsize * prod(n for _, n in dims[1:])))
        for row in range(0, count, rows):
            n = min(rows, count - row)
            part = ((first + row, n), *dims[1:])
            work = (self._files[path], offset, shape, dtype, part, into[row : row + n], step)
            self._under_way.append(self._pool.submit(self._read, *work))

    def wait(self) -> int:
        """Until all is there: bytes read. Raises OSError."""
        begun, self._under_way = self._under_way, []
        return sum([each.result() for each in begun])

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    @torch.no_grad()
    def _read(
        self,
        file: int,
        offset: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        dims: Sequence[tuple[int, int]],
        into: Tensor,
        step: int,
    ) -> int:
        straight = into.dtype == dtype and into.is_contiguous() and into.device.type == "cpu" and step == 1
        sizes = tuple(n for _, n in dims)
        rectangle = into if straight else self._buffer(prod(sizes) * dtype.itemsize).view(dtype).view(sizes)
        array: Any = rectangle.view(-1).view(torch.uint8).numpy()
        bytes_of = memoryview(array)
        at = 0
        for begin, count in runs(shape, dims):
            length = count * dtype.itemsize
            _fill(file, offset + begin * dtype.itemsize, bytes_of[at : at + length])
            at += length
        if not straight:
            into.copy_(rectangle[..., ::step])
        return at

    def _buffer(self, size: int) -> Tensor:
        """This thread's, of at least a chunk."""
        held: Tensor | None = getattr(self._own, "held", None)
        if held is None or held.numel() < size:
            held = self._own.held = torch.empty(max(size, CHUNK), dtype=torch.uint8)
        return held[:size]


def runs(shape: Sequence[int], dims: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The rectangle `dims` of a row-major tensor as runs of elements that lie one behind the other: begin, count."""
    inner = len(shape) - 1
    while inner > 0 and dims[inner] == (0, shape[inner]):
        inner -= 1
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    first, count = dims[inner]
    for index in product(*(range(a, a + n) for a, n in dims[:inner])):
        begin = sum(i * stride for i, stride in zip(index, strides, strict=False)) + first * strides[inner]
        yield begin, count * strides[inner]


def _fill(file: int, offset: int, into: memoryview) -> None:
    while into:
        n = os.preadv(file, [into], offset)
        if not n:
            raise OSError(f"it ends {len(into):,} bytes too early")
        into, offset = into[n:], offset + n
