"""Several corpora as one: which of them sample k of the run is of, and which of its own samples that is.

Both are functions of the seed and k, computed for any k without those before it. With weights the corpora take turns in
a fixed pattern, so that every prefix of it has each corpus's share to within one sample: Tijdeman, "The chairman
assignment problem", 1980. The seed says where in the pattern a run begins. Where the user has changed the mix on the
way, both are functions of the `Stretch`, too: see `streams`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stretto.data.errors import DataError
from stretto.data.order import windows_of
from stretto.data.store import TokenStore
from stretto.data.streams import Stretch, Taken, fresh, hashed
from stretto.notation.corpora import period as period_of

Places = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Of each sample [n]: the number of its corpus, and its window there."""


@dataclass(frozen=True)
class Mix:
    """Token stores of one tokenizer, and the share of each; without weights all windows come once in an epoch."""

    stores: tuple[TokenStore, ...]
    weights: tuple[Fraction, ...] | None = None
    paths: tuple[str, ...] = ()
    """Of each corpus, as far as it has one."""
    tokenizer: str = ""
    """The fingerprint of the tokenizer."""

    @property
    def shares(self) -> tuple[Fraction, ...] | None:
        """The weights, where corpora take turns."""
        return self.weights if len(self.stores) > 1 else None

    @cached_property
    def begin(self) -> Stretch:
        """A run that begins with this mix."""
        paths = self.paths or ("",) * len(self.stores)
        return fresh(paths, [store.header.digest for store in self.stores], turns=self.shares is not None)

    def windows(self, seq_len: int) -> tuple[int, ...]:
        """How many whole samples each store has. Raises DataError where one has none."""
        for store in self.stores:
            if store.header.tokens <= seq_len:
                raise DataError(
                    f"{store.path} has {store.header.tokens} tokens, a sample takes seq_len + 1 = {seq_len + 1}; "
                    f"bring more text, or --seq-len {store.header.tokens - 1} at most"
                )
        return tuple((store.header.tokens - 1) // seq_len for store in self.stores)

    def order(self, seq_len: int, seed: int) -> Order:
        """Where each sample lies."""
        return self.order_of(self.windows(seq_len), seed)

    def order_of(self, windows: tuple[int, ...], seed: int, stretch: Stretch | None = None) -> Order:
        """The same, where each store has so many samples, from where `stretch` begins: DataError where one has none."""
        if empty := [store.path for store, n in zip(self.stores, windows, strict=True) if not n]:
            raise DataError(f"{empty[0]} has no document to train on; bring more text")
        stretch = stretch or self.begin
        if self.shares is None:
            return EndToEnd(windows, seed, stretch)
        return Turns(windows, self.shares, seed, stretch)


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

    def __init__(self, windows: Sequence[int], seed: int, stretch: Stretch | None = None) -> None:
        self._ends, self._seed, self._before = np.cumsum(np.array(windows, dtype=np.int64)), seed, 0
        if stretch is not None and len(windows) == 1:  # one corpus goes on in its own order
            (stream,) = stretch.streams
            self._seed, self._before = stream.seed(seed), stream.had - stretch.begun

    def places(self, first: int, count: int) -> Places:
        windows = windows_of(first + self._before, count, int(self._ends[-1]), seed=self._seed)
        corpora = np.searchsorted(self._ends, windows, side="right")
        begins = np.concatenate([[0], self._ends[:-1]])
        return corpora.astype(np.int64), windows - begins[corpora]

    def epochs(self, consumed: int) -> tuple[float, ...]:
        return ((consumed + self._before) / int(self._ends[-1]),) * len(self._ends)


class Turns:
    """Corpora take turns by their weights; each has epochs of its own, shuffled anew."""

    def __init__(
        self, windows: Sequence[int], weights: Sequence[Fraction], seed: int, stretch: Stretch | None = None
    ) -> None:
        stretch = stretch or fresh([""] * len(windows), [""] * len(windows), turns=True)
        self._windows, self._begun = tuple(windows), stretch.begun
        pattern = turns(weights)
        self._pattern, period = pattern, len(pattern)
        counts = np.zeros((period + 1, len(weights)), dtype=np.int64)
        counts[np.arange(1, period + 1), pattern] = 1
        self._before: NDArray[np.int64] = counts.cumsum(axis=0)
        """[period + 1, corpora]: samples of each corpus before each turn."""
        self._begin = hashed(f"stretto turns {seed}") % period
        # Two corpora of one size must not be shuffled alike.
        self._seeds = [stream.seed(seed) for stream in stretch.streams]
        self._had = np.array([stream.had for stream in stretch.streams], dtype=np.int64)

    def places(self, first: int, count: int) -> Places:
        at = np.arange(first - self._begun, first - self._begun + count, dtype=np.int64)
        rounds, turn = np.divmod(at + self._begin, len(self._pattern))
        corpora = self._pattern[turn].astype(np.int64)
        had = self._had - self._before[self._begin]
        mine = rounds * self._before[-1][corpora] + self._before[turn, corpora] + had[corpora]
        out = np.empty(count, dtype=np.int64)
        for corpus in np.unique(corpora):
            (here,) = np.nonzero(corpora == corpus)
            # Samples of one corpus in a stretch follow each other without a gap.
            low, n = int(mine[here[0]]), self._windows[corpus]
            out[here] = windows_of(low, len(here), n, seed=self._seeds[corpus])
        return corpora, out

    def taken(self, consumed: int) -> Taken:
        """Samples of each corpus that the run has had after so many in all."""
        rounds, turn = divmod(consumed - self._begun + self._begin, len(self._pattern))
        seen = rounds * self._before[-1] + self._before[turn] - self._before[self._begin] + self._had
        return tuple(int(count) for count in seen)

    def epochs(self, consumed: int) -> tuple[float, ...]:
        return tuple(count / n for count, n in zip(self.taken(consumed), self._windows, strict=True))


def taken(weights: Sequence[Fraction] | None, seed: int, stretch: Stretch, consumed: int) -> Taken:
    """Samples of each corpus of a stretch that the run has had after so many in all.

    Raises ValueError where they are shuffled together, so that those of a corpus are no stretch of its own order.
    """
    if weights is not None:
        return Turns([1] * len(weights), weights, seed, stretch).taken(consumed)
    (stream,) = stretch.streams
    return (stream.had + consumed - stretch.begun,)


def turns(weights: Sequence[Fraction]) -> NDArray[np.int32]:
    """Whose turn it is, over the shortest period in which all shares are whole: [period].

    After each n turns corpus c has had more than w_c n - 1 and fewer than w_c n + 1.
    """
    period = period_of(weights)
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
