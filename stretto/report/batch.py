"""What a batch holds: which piece of which corpus each of its samples is, and how its text begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from stretto.arguments.schema import Arguments
from stretto.data.packed import PackedRows, mean_waste
from stretto.data.store import TokenStore
from stretto.data.text import Text
from stretto.sequence import Piece
from stretto.terminal import printable

ROWS: Final = 8
"""Samples that are shown."""

_CHARACTERS: Final = 40


def first_batch(args: Arguments, text: Text, consumed: int = 0) -> Table:
    """The first samples of the global batch that follows so many samples."""
    mix, seq_len, size = text.mix, args.batch.seq_len, args.batch.global_batch
    pieces, lengths, packed = _pieces(args, text)
    corpora, windows = mix.order_of(lengths, args.run.seed).places(consumed, size)
    counts = np.bincount(corpora, minlength=len(text.sources))
    shares = ", ".join(f"{source.name} {count}" for source, count in zip(text.sources, counts, strict=True))
    masked = any(store.header.masked for store in mix.stores)
    title = f"The first batch, samples {consumed:,} to {consumed + size - 1:,} of {seq_len} tokens{packed}: {shares}"
    table = Table(title=title, title_justify="left")
    for name in ("sample", "corpus", "from token", "documents", *["counted"] * masked):
        table.add_column(name, justify="left" if name == "corpus" else "right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for i, (corpus, window) in enumerate(zip(corpora[:ROWS].tolist(), windows[:ROWS].tolist(), strict=True)):
        store, row = mix.stores[corpus], pieces(corpus, window)
        counted = [f"{sum(_counted(store, piece) for piece in row):,}"] * masked
        found = (f"{row[0].first:,}", ", ".join(_documents(store, piece) for piece in row), *counted)
        table.add_row(f"{consumed + i:,}", text.sources[corpus].name, *found, _beginning(text, store, row))
    if size > ROWS:
        table.caption = f"and {size - ROWS} more"
    return table


def _pieces(args: Arguments, text: Text) -> tuple[Callable[[int, int], Sequence[Piece]], tuple[int, ...], str]:
    """What a window of a corpus is made of, how many each corpus has, and what is said of rows that are packed."""
    stores, seq_len = text.mix.stores, args.batch.seq_len
    if not args.data.packing:
        return lambda _, window: (Piece(window * seq_len, seq_len),), text.mix.windows(seq_len), ""
    rows = [PackedRows(store, seq_len) for store in stores]
    empty = f", packed ({mean_waste(rows, text.mix.shares):.1%} of all slots are empty)"
    return lambda corpus, window: rows[corpus].row(window), tuple(map(len, rows)), empty


def _counted(store: TokenStore, piece: Piece) -> int:
    """Predictions of a piece that count."""
    labels = store.tokens[piece.first + 1 : piece.first + 1 + piece.length]
    return int(np.count_nonzero((labels & store.header.unused) == 0))


def _documents(store: TokenStore, piece: Piece) -> str:
    """Those that a piece holds something of; the `eod` that it begins with is read for the document behind it."""
    begin, end = piece.first, piece.first + piece.length - 1
    begin += int(store.tokens[begin]) & ~store.header.unused == store.header.eod
    first, last = np.searchsorted(store.offsets, [begin, max(begin, end)], side="right") - 1
    return f"{max(first, 0):,}" + (f"..{last:,}" if last > max(first, 0) else "")


def _beginning(text: Text, store: TokenStore, row: Sequence[Piece]) -> str:
    """How the text of a sample begins; a bar is where a document ends."""
    said = [store.tokens[piece.first : piece.first + min(piece.length, _CHARACTERS)] for piece in row[:_CHARACTERS]]
    ids: NDArray[np.int64] = np.concatenate(said).astype(np.int64)[:_CHARACTERS] & ~store.header.unused
    pieces = np.split(ids, np.flatnonzero(ids == text.tokenizer.eod) + 1)
    line = printable("|".join(text.tokenizer.decode(piece) for piece in pieces))
    return line.replace("\n", " ").replace("\t", " ")[:_CHARACTERS]
