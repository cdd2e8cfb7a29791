"""What a batch holds: which piece of which corpus each of its samples is, and how its text begins."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from stretto.arguments.schema import Arguments
from stretto.data.text import Text
from stretto.terminal import printable

ROWS: Final = 8
"""Samples that are shown."""

_CHARACTERS: Final = 40


def first_batch(args: Arguments, text: Text, consumed: int = 0) -> Table:
    """The first samples of the global batch that follows so many samples."""
    mix, seq_len, size = text.mix, args.batch.seq_len, args.batch.global_batch
    corpora, windows = mix.order(seq_len, args.run.seed).places(consumed, size)
    counts = np.bincount(corpora, minlength=len(text.sources))
    shares = ", ".join(f"{source.name} {count}" for source, count in zip(text.sources, counts, strict=True))
    title = f"The first batch, samples {consumed:,} to {consumed + size - 1:,} of {seq_len} tokens: {shares}"
    table = Table(title=title, title_justify="left")
    for name in ("sample", "corpus", "from token", "documents"):
        table.add_column(name, justify="left" if name == "corpus" else "right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for i, (corpus, window) in enumerate(zip(corpora[:ROWS].tolist(), windows[:ROWS].tolist(), strict=True)):
        store, begin = mix.stores[corpus], window * seq_len
        ids = store.window(window, seq_len)[:-1].astype(np.int64)
        first, last = np.searchsorted(store.offsets, [begin, begin + seq_len - 1], side="right") - 1
        documents = f"{max(first, 0):,}" + (f"..{last:,}" if last > max(first, 0) else "")
        name = text.sources[corpus].name
        table.add_row(f"{consumed + i:,}", name, f"{begin:,}", documents, _beginning(text, ids))
    if size > ROWS:
        table.caption = f"and {size - ROWS} more"
    return table


def _beginning(text: Text, ids: NDArray[np.int64]) -> str:
    """How the text of a sample begins; a bar is where a document ends."""
    ids = ids[:_CHARACTERS]
    pieces = np.split(ids, np.flatnonzero(ids == text.tokenizer.eod) + 1)
    line = printable("|".join(text.tokenizer.decode(piece) for piece in pieces))
    return line.replace("\n", " ").replace("\t", " ")[:_CHARACTERS]
