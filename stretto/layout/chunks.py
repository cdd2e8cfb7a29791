"""How the state of an optimizer that lies in the host's memory passes through the device: a chunk at a time.

The engine and the estimate of memory both read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

CHUNK: Final = 2**23
"""Elements that are copied and updated at a time: 100 MB of fp32 masters and two moments, 2 ms of PCIe 5. The engine
adds some 0.1 ms of the host's time to each."""

SLOTS: Final = 3
"""Chunks on the device at a time: one arrives, one is updated, one leaves."""

ALIGNED: Final = 256
"""Bytes: each vector of a slot begins at a multiple of so many."""


def chunks(size: int, most: int = CHUNK) -> Iterator[range]:
    """The ranges of at most `most` elements that make up a vector of `size`."""
    for start in range(0, size, most):
        yield range(start, min(size, start + most))


def slot_bytes(numel: int, itemsizes: Sequence[int]) -> int:
    """Bytes that vectors of `numel` elements of these sizes take in a slot."""
    return sum(-(-numel * item // ALIGNED) * ALIGNED for item in itemsizes)
