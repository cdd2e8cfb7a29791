"""The rows of each rank, in an order that is a function of the seed and of samples consumed alone.

Sample k of a run is a window of `seq_len` tokens: `order.windows_of` says which. Windows lie end to end in
the packed text and may hold parts of several documents, with an `eod` between them: the plain packing of
GPT-2 and GPT-3, where attention sees across documents and every prediction counts. With `packing` it is a row
of whole documents in place of a window, see `packed`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stretto.batch import Batch
from stretto.data.errors import DataError
from stretto.data.order import windows_of
from stretto.data.packed import PackedRows
from stretto.data.store import TokenStore


class Feed:
    """An endless stream of samples. `consumed` counts those of all ranks; it is the only thing that moves."""

    def __init__(self, store: TokenStore, *, seq_len: int, seed: int, consumed: int = 0, packing: bool = False):
        """Start at sample `consumed`. Raises DataError when the store has less than one window."""
        self.store, self.seq_len, self.seed, self.consumed = store, seq_len, seed, consumed
        self.packed = PackedRows(store, seq_len) if packing else None
        self.windows = (store.header.tokens - 1) // seq_len if self.packed is None else len(self.packed)
        if self.windows == 0:
            raise DataError(
                f"{store.path} has {store.header.tokens} tokens, a sample takes seq_len + 1 = {seq_len + 1}; "
                f"bring more text or set batch.seq_len to at most {store.header.tokens - 1}"
            )

    def batch(self, global_batch: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[Batch]:
        """This rank's microbatches of the next global batch, for which `consumed` moves by `global_batch`.

        The global batch is samples consumed..consumed + global_batch - 1, split microbatch-major: row i of
        microbatch j on rank r is sample consumed + (j * dp_size + r) * micro_batch + i. So all ranks'
        microbatches j together are a contiguous piece, and putting the pieces in order of (j, r) gives the
        same global batch for every dp_size and micro_batch. Raises ValueError when it does not divide.
        """
        windows = windows_of(self.consumed, global_batch, self.windows, seed=self.seed)
        mine = rows_of(global_batch, dp_rank, dp_size, micro_batch)
        samples = torch.arange(self.consumed, self.consumed + global_batch)
        self.consumed += global_batch
        return [replace(self._rows(windows[rows]), samples=samples[rows]) for rows in mine]

    def _rows(self, windows: NDArray[np.int64]) -> Batch:
        return as_batch(self.store, windows, self.seq_len) if self.packed is None else self.packed.batch(windows)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and what it is a stream of."""
        return {
            "consumed": self.consumed,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "digest": self.store.header.digest,
            "packing": self.packed is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises DataError when it is of another stream: `consumed` means nothing."""
        own, state = self.state_dict(), {"packing": False, **state}
        differ = [
            f"{key} was {state.get(key)!r}, is {own[key]!r}"
            for key in ("seed", "seq_len", "digest", "packing")
            if state.get(key) != own[key]
        ]
        if differ:
            raise DataError(
                f"cannot go on in the data where the run stopped: {'; '.join(differ)}; "
                "resume with the same text, tokenizer, held_out, seed, seq_len and packing"
            )
        self.consumed = int(state["consumed"])


def rows_of(global_batch: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[slice]:
    """The rows of a global batch that are this rank's microbatches, in order; see `Feed.batch`."""
    per_round = dp_size * micro_batch
    if global_batch % per_round:
        raise ValueError(f"global_batch={global_batch} is not a multiple of micro_batch*dp = {micro_batch}*{dp_size}")
    starts = range(dp_rank * micro_batch, global_batch, per_round)
    return [slice(start, start + micro_batch) for start in starts]


def as_batch(store: TokenStore, windows: NDArray[np.int64], seq_len: int) -> Batch:
    """The windows [b] of a store as a batch [b, seq_len]. A window past the text is masked where it is.

    Window w is the tokens w*s..w*s + s, one more than s: the last is only a label.
    """
    rows = np.full((len(windows), seq_len + 1), store.header.eod, dtype=np.int64)
    valid = np.zeros((len(windows), seq_len), dtype=bool)
    for row, mask, window in zip(rows, valid, windows, strict=True):
        piece = store.tokens[window * seq_len : (window + 1) * seq_len + 1]
        row[: len(piece)] = piece
        mask[: max(len(piece) - 1, 0)] = True
    tokens = torch.from_numpy(rows)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.from_numpy(valid))
