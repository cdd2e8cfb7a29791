"""Held-out text as batches: the same for every layout, each token predicted at most once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stretto.batch import Batch
from stretto.data.feed import as_batch, rows_of
from stretto.data.order import permute
from stretto.data.packed import PackedRows
from stretto.data.store import TokenStore


def held_out_batches(
    store: TokenStore,
    *,
    seq_len: int,
    global_batch: int,
    dp_rank: int,
    dp_size: int,
    micro_batch: int,
    limit: int | None = None,
    packed: PackedRows | None = None,
) -> Iterator[list[Batch]]:
    """This rank's microbatches of each held-out global batch; `limit` of them at most, all when None.

    Together all batches predict every token of the store exactly once. The order is shuffled, always the
    same way, so that the first few are drawn from all documents. What is missing to a full last window or
    a full last batch is padding with `loss_mask` False: all ranks get equally many rows in equal shapes,
    and an average over the mask is right. An empty store gives no batch. `packed` rows of the
    store take the place of its windows.
    """
    windows = -(-(store.header.tokens - 1) // seq_len) if packed is None else len(packed)
    batches = -(-windows // global_batch)
    mine = rows_of(global_batch, dp_rank, dp_size, micro_batch)
    for batch in range(batches if limit is None else min(limit, batches)):
        samples = np.arange(batch * global_batch, (batch + 1) * global_batch)
        # A sample past the last window keeps its number: it lies past the text and comes out masked.
        order = samples.copy()
        inside = samples < windows
        order[inside] = permute(samples[inside], windows, seed=0, epoch=0)
        if packed is not None:
            yield [packed.batch(order[rows]) for rows in mine]
            continue
        pieces = [store.window(int(window), seq_len) for window in order]
        yield [as_batch(pieces[rows], seq_len, eod=store.header.eod, unused=store.header.unused) for rows in mine]
