"""Rows of whole documents, of which none sees another.

A document is read behind the `eod` in front of it, so its first token is predicted, too, and its own closing `eod` is
the last that is: that is a label alone, and nothing of a document predicts what comes after it. A row's last slots may
hold nothing; they are a document of their own that does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from stretto.batch import Batch
from stretto.data.store import TokenStore
from stretto.sequence import Piece, pack, waste


class PackedRows:
    """The documents of a store, packed into rows of `seq_len` by best fit, each token predicted in exactly one row.

    The index is in memory: some 16 bytes for each document and row.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        self.store, self.seq_len = store, seq_len
        offsets = np.asarray(store.offsets)
        begins, ends = offsets[:-1], offsets[1:]
        # Text that another program tokenized may have nothing between documents: then the first token is not predicted.
        before = store.tokens[np.maximum(begins - 1, 0)].astype(np.int64) & ~store.header.unused
        ended = (begins > 0) & (before == store.header.eod)
        firsts = begins - ended
        self._rows = pack(np.maximum(ends - 1 - firsts, 0), firsts, seq_len)
        self.waste = waste(self._rows, seq_len)
        """Share of all slots that holds no token."""

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Sequence[Piece]:
        """What is in it; nothing in one that is not there."""
        return self._rows[number] if number < len(self._rows) else ()

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """The rows of these numbers [b]; one that is not there has no token that counts."""
        return packed_batch([(self, number) for number in numbers.tolist()])


def mean_waste(rows: Sequence[PackedRows], shares: Sequence[Fraction] | None) -> float:
    """Share of the slots that hold no token, over the samples of a run: by shares, or over all rows alike."""
    weights = [float(share) for share in shares] if shares is not None else [float(len(each)) for each in rows]
    return sum(each.waste * weight for each, weight in zip(rows, weights, strict=True)) / max(sum(weights), 1e-9)


def packed_batch(chosen: Sequence[tuple[PackedRows, int]]) -> Batch:
    """Rows [b, s] of one or several stores, by their numbers."""
    seq_len, eod = chosen[0][0].seq_len, chosen[0][0].store.header.eod
    shape = len(chosen), seq_len
    tokens, labels = (np.full(shape, eod, dtype=np.int64) for _ in range(2))
    counts, starts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
    for n, (rows, number) in enumerate(chosen):
        end = 0
        for first, length in rows.row(number):
            at = slice(end, end + length)
            said, unused = rows.store.tokens[first : first + length + 1].astype(np.int64), rows.store.header.unused
            tokens[n, at], labels[n, at] = said[:-1] & ~unused, said[1:] & ~unused
            counts[n, at], starts[n, at] = said[1:] & unused == 0, end
            end += length
        starts[n, end:] = end
    read, after, counted, begins = (torch.from_numpy(each) for each in (tokens, labels, counts, starts))
    return Batch(read, after, counted, starts=begins)
