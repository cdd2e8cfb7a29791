"""Logits, of which the head's loss makes a piece at a time."""

from __future__ import annotations

from typing import Final

from stretto.arguments.schema import Arguments
from stretto.estimate.sizes import BYTES, local_tokens

AT_ONCE: Final = 2**28
"""Bytes of logits that exist at once, at most, where they are those of `TOKENS` tokens."""

TOKENS: Final = 2048
"""That are taken at once at least, in `MOST` bytes. Each piece reads and writes the gradient of the head's weight, in
fp32: on an H200 that takes as long as the GEMM of 750 tokens."""

MOST: Final = 2**30


def rows_at_once(rows: int, batch: int, words: int, itemsize: int, limit: int | None = None) -> int:
    """Rows of a sequence [rows, batch] whose logits over so many words exist at once: at least one, in `limit` bytes.

    As many each time, where fewer than twice the pieces do: a shorter last piece makes the compiler take kernels of
    any size for all of them.
    """
    row = max(1, batch * words * itemsize)
    most = max(1, (limit or min(max(AT_ONCE, TOKENS * words * itemsize), MOST)) // row)
    pieces = -(-rows // most)
    even = next((n for n in range(pieces, 2 * pieces) if rows % n == 0), pieces)
    return -(-rows // even)


def logits(args: Arguments) -> int:
    """Bytes of a piece of logits, or of all where they are fewer."""
    return _words(args) * args.batch.micro_batch * BYTES[args.run.dtype] * _rows(args)


def of_tokens(args: Arguments) -> int:
    """Bytes of numbers of each token beside them: what it counts for, in fp64 and in fp32 or wider, the place of its
    label, its loss; of a piece three statistics, what they add to sums over tp, and these."""
    wide = max(4, BYTES[args.run.dtype])
    several = args.parallel.tp > 1
    piece = _rows(args) * args.batch.micro_batch
    return (8 + 9 + 2 * wide) * local_tokens(args) + piece * wide * (3 + 2 + 3 * several)


def _words(args: Arguments) -> int:
    return -(-args.model.vocab_size // args.parallel.tp)


def _rows(args: Arguments) -> int:
    """Of the sequence, that are taken at a time."""
    batch = args.batch.micro_batch
    return rows_at_once(local_tokens(args) // batch, batch, _words(args), BYTES[args.run.dtype])
