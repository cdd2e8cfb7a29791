"""The rows of each rank, in an order that is a function of the seed and of samples consumed alone.

Sample k of a run is a window of `seq_len` tokens: `mixture.Order` says which, of which corpus. Windows lie end
to end in the packed text and may hold parts of several documents, with an `eod` between them: the plain packing of
GPT-2 and GPT-3, where attention sees across documents and every prediction counts. With `packing` it is a row of
whole documents in place of a window, see `packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stretto.batch import Batch
from stretto.data.errors import DataError
from stretto.data.mixture import Mix, taken
from stretto.data.packed import PackedRows, mean_waste, packed_batch
from stretto.data.store import TokenStore
from stretto.data.streams import Stretch, Taken, gone_on
from stretto.notation.corpora import LONGEST_PERIOD, period


class Feed:
    """An endless stream of samples. `consumed` counts those of all ranks; it is the only thing that moves."""

    def __init__(self, text: TokenStore | Mix, *, seq_len: int, seed: int, consumed: int = 0, packing: bool = False):
        """Start at sample `consumed`. Raises DataError when a store has less than one window."""
        self.mix = text if isinstance(text, Mix) else Mix((text,))
        self.seq_len, self.seed, self.consumed = seq_len, seed, consumed
        self.packed = tuple(PackedRows(store, seq_len) for store in self.mix.stores) if packing else ()
        self._windows = tuple(map(len, self.packed)) or self.mix.windows(seq_len)
        self.windows = sum(self._windows)
        self.stretch = self.mix.begin
        self.order = self.mix.order_of(self._windows, seed)

    @property
    def waste(self) -> float | None:
        """Share of the slots of the run's samples that holds no token, where rows are packed."""
        return mean_waste(self.packed, self.mix.shares) if self.packed else None

    def batch(self, global_batch: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[Batch]:
        """This rank's microbatches of the next global batch, for which `consumed` moves by `global_batch`.

        The global batch is samples consumed..consumed + global_batch - 1, split microbatch-major: row i of
        microbatch j on rank r is sample consumed + (j * dp_size + r) * micro_batch + i. So all ranks'
        microbatches j together are a contiguous piece, and putting the pieces in order of (j, r) gives the
        same global batch for every dp_size and micro_batch. Raises ValueError when it does not divide.
        """
        mine = rows_of(global_batch, dp_rank, dp_size, micro_batch)
        own = np.concatenate([np.arange(rows.start, rows.stop) for rows in mine])
        corpora, windows = self.order.places(self.consumed, global_batch)
        made = replace(self._rows(corpora[own], windows[own]), samples=torch.from_numpy(own + self.consumed))
        self.consumed += global_batch
        return [made.rows(slice(start, start + micro_batch)) for start in range(0, len(own), micro_batch)]

    def _rows(self, corpora: NDArray[np.int64], windows: NDArray[np.int64]) -> Batch:
        if self.packed:
            return packed_batch([(self.packed[c], int(w)) for c, w in zip(corpora, windows, strict=True)])
        stores = self.mix.stores
        pieces = [stores[corpus].window(window, self.seq_len) for corpus, window in zip(corpora, windows, strict=True)]
        return as_batch(pieces, self.seq_len, eod=stores[0].header.eod, unused=stores[0].header.unused)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and what it is a stream of."""
        digests = [store.header.digest for store in self.mix.stores]
        state = {
            "consumed": self.consumed,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "digest": digests if len(digests) > 1 else digests[0],
            "packing": bool(self.packed),
            "tokenizer": self.mix.tokenizer,
            "stretch": self.stretch.as_json(),
        }
        return state if self.mix.weights is None else {**state, "weights": [str(w) for w in self.mix.weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, perhaps with another mix: then each corpus goes on where it stood, and new ones begin.

        Raises DataError when it is of another stream, in which `consumed` means nothing.
        """
        own, state = self.state_dict(), {"packing": False, **state}
        if not state.get("tokenizer") or not self.mix.tokenizer:  # some stores are nobody's who would know
            state["tokenizer"] = own["tokenizer"]
        fixed = ["seed", "seq_len", "packing", "tokenizer"]
        mixed = [key for key in ("digest", "weights") if state.get(key) != own.get(key)]
        before = Stretch.from_json(state["stretch"]) if "stretch" in state else None
        differ = [
            f"{key} was {state.get(key)!r}, is {own.get(key)!r}"
            for key in (*fixed, *(mixed if before is None else ()))
            if state.get(key) != own.get(key)
        ]
        try:
            if differ:
                raise DataError("; ".join(differ))
            consumed = int(state["consumed"])
            stretch = before or self.mix.begin
            if mixed:
                taken = self._taken(state, stretch, consumed)
                stretch = gone_on(stretch, taken, consumed, self.mix.begin)
        except DataError as error:
            raise DataError(
                f"cannot go on in the data where the run stopped: {error}; resume with the same text, tokenizer, "
                "held_out, seed, seq_len and packing"
            ) from error
        self.consumed, self.stretch = consumed, stretch
        self.order = self.mix.order_of(self._windows, self.seed, stretch)

    def _taken(self, state: Mapping[str, Any], before: Stretch, consumed: int) -> Taken:
        """Samples of each corpus that a run had, which goes on with another mix. Raises DataError."""
        said = state.get("weights")
        try:
            weights = None if said is None or len(before.streams) == 1 else tuple(map(Fraction, said))
            if weights and (len(weights) != len(before.streams) or period(weights) > LONGEST_PERIOD):
                raise ValueError(f"weights {said}")
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise DataError(f"the checkpoint does not say what the mix was: {error}") from error
        mixes = ((len(before.streams), weights), (len(self.mix.stores), self.mix.shares))
        if together := [corpora for corpora, shares in mixes if corpora > 1 and shares is None]:
            raise DataError(
                f"another mix, and {together[0]} corpora without shares, which are shuffled together: a corpus has no "
                "place of its own there; give shares, as in a/:0.7,b.jsonl:0.3, or begin anew"
            )
        return taken(weights, self.seed, before, consumed)


def rows_of(global_batch: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[slice]:
    """The rows of a global batch that are this rank's microbatches, in order; see `Feed.batch`."""
    per_round = dp_size * micro_batch
    if global_batch < 1 or micro_batch < 1:
        raise ValueError(f"global_batch={global_batch}, micro_batch={micro_batch}: both must be at least 1")
    if global_batch % per_round:
        raise ValueError(f"global_batch={global_batch} is not a multiple of micro_batch*dp = {micro_batch}*{dp_size}")
    starts = range(dp_rank * micro_batch, global_batch, per_round)
    return [slice(start, start + micro_batch) for start in starts]


def as_batch(pieces: Sequence[NDArray[Any]], seq_len: int, *, eod: int, unused: int = 0) -> Batch:
    """Windows of tokens as a batch [b, seq_len]. What is missing of one, past the end of the text, is masked, as are
    predictions of tokens that have the bit `unused`.

    A window has s + 1 tokens: the last is only a label.
    """
    rows = np.full((len(pieces), seq_len + 1), eod | unused, dtype=np.int64)
    valid = np.zeros((len(pieces), seq_len), dtype=bool)
    for row, mask, piece in zip(rows, valid, pieces, strict=True):
        row[: len(piece)] = piece
        mask[: max(len(piece) - 1, 0)] = True
    if unused:
        valid &= rows[:, 1:] & unused == 0
        rows &= unused - 1
    tokens = torch.from_numpy(rows)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.from_numpy(valid))
