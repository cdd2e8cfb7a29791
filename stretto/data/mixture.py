"""Several corpora as one: which of them sample k of the run is of, and which of its own samples that is.

Both are functions of the seed and k, computed for any k without those before it. With weights the corpora take turns in
a fixed pattern, so that every prefix of it has each corpus's share to within one sample: Tijdeman, "The chairman
assignment problem", 1980. The seed says where in the pattern a run begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stretto.data.errors import DataError
from stretto.data.order import windows_of
from stretto.data.store import TokenStore

Places = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Of each sample [n]: the number of its corpus, and its window there."""


@dataclass(frozen=True)
class Mix:
    """Token stores of one tokenizer, and the share of each; without weights all windows come once in an epoch."""

    stores: tuple[TokenStore, ...]
    weights: tuple[Fraction, ...] | None = None

    def windows(self, seq_len: int) -> tuple[int, ...]:
        """How many whole samples each store has. Raises DataError where one has none."""
        for store in self.stores:
            if store.header.tokens <= seq_len:
                raise DataError(
                    f"{store.path} has {store.header.tokens} tokens, a sample takes seq_len + 1 = {seq_len + 1}; "
                    f"bring more text or set batch.seq_len to at most {store.header.tokens - 1}"
                )
        return tuple((store.header.tokens - 1) // seq_len for store in self.stores)

    def order(self, seq_len: int, seed: int) -> Order:
        """Where each sample lies."""
        return self.order_of(self.windows(seq_len), seed)

    def order_of(self, windows: tuple[int, ...], seed: int) -> Order:
        """The same, where each store has so many samples. Raises DataError where one has none."""
        if empty := [store.path for store, n in zip(self.stores, windows, strict=True) if not n]:
            raise DataError(f"{empty[0]} has no document to train on; bring more text")
        if self.weights is None or len(windows) == 1:
            return EndToEnd(windows, seed)
        return Turns(windows, self.weights, seed)


class Order(Protocol):
    """The order of the samples of a run."""

    def places(self, first: int, count: int) -> Places:
        """Of samples `first`..`first + count - 1`."""
        ...

    def epochs(self, consumed: int) -> tuple[float, ...]:
        """How often each corpus was read after so many samples."""
        ...


class EndToEnd:
    """All windows of all corpora are shuffled together, anew in each epoch."""

    def __init__(self, windows: Sequence[int], seed: int) -> None:
        self._ends, self._seed = np.cumsum(np.array(windows, dtype=np.int64)), seed

    def places(self, first: int, count: int) -> Places:
        windows = windows_of(first, count, int(self._ends[-1]), seed=self._seed)
        corpora = np.searchsorted(self._ends, windows, side="right")
        begins = np.concatenate([[0], self._ends[:-1]])
        return corpora.astype(np.int64), windows - begins[corpora]

    def epochs(self, consumed: int) -> tuple[float, ...]:
        return (consumed / int(self._ends[-1]),) * len(self._ends)


class Turns:
    """Corpora take turns by their weights; each has epochs of its own, shuffled anew."""

    def __init__(self, windows: Sequence[int], weights: Sequence[Fraction], seed: int) -> None:
        self._windows = tuple(windows)
        pattern = turns(weights)
        self._pattern, period = pattern, len(pattern)
        counts = np.zeros((period + 1, len(weights)), dtype=np.int64)
        counts[np.arange(1, period + 1), pattern] = 1
        self._before: NDArray[np.int64] = counts.cumsum(axis=0)
        """[period + 1, corpora]: samples of each corpus before each turn."""
        self._begin = _hash(f"stretto turns {seed}") % period
        # Two corpora of one size must not be shuffled alike.
        self._seeds = [_hash(f"stretto corpus {seed} {corpus}") for corpus in range(len(weights))]

    def places(self, first: int, count: int) -> Places:
        rounds, turn = np.divmod(np.arange(first, first + count, dtype=np.int64) + self._begin, len(self._pattern))
        corpora = self._pattern[turn].astype(np.int64)
        begun = self._before[self._begin]
        mine = rounds * self._before[-1][corpora] + self._before[turn, corpora] - begun[corpora]
        out = np.empty(count, dtype=np.int64)
        for corpus in np.unique(corpora):
            (here,) = np.nonzero(corpora == corpus)
            # Samples of one corpus in a stretch follow each other without a gap.
            low, n = int(mine[here[0]]), self._windows[corpus]
            out[here] = windows_of(low, len(here), n, seed=self._seeds[corpus])
        return corpora, out

    def epochs(self, consumed: int) -> tuple[float, ...]:
        rounds, turn = divmod(consumed + self._begin, len(self._pattern))
        seen = rounds * self._before[-1] + self._before[turn] - self._before[self._begin]
        return tuple(float(count) / n for count, n in zip(seen, self._windows, strict=True))


def turns(weights: Sequence[Fraction]) -> NDArray[np.int32]:
    """Whose turn it is, over the shortest period in which all shares are whole: [period].

    After each n turns corpus c has had more than w_c n - 1 and fewer than w_c n + 1.
    """
    period = lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * period) for weight in weights]
    several = 2 * len(shares) - 2
    out = np.empty(period, dtype=np.int32)
    had = [0] * len(shares)
    for turn in range(period):
        # In units of 1 / (period * several). Among those that may have a turn without getting too far ahead, the one
        # that would first get too far behind.
        chosen = min(
            (
                (Fraction((several - 1) * period - several * (share * turn - period * had[c]), share), c)
                for c, share in enumerate(shares)
                if several * (share * (turn + 1) - period * had[c]) >= period
            )
        )[1]
        out[turn] = chosen
        had[chosen] += 1
    return out


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
