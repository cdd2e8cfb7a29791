"""Logits, of which the head's loss makes a piece at a time."""

from __future__ import annotations

from typing import Final

from stretto.arguments.schema import Arguments
from stretto.estimate.sizes import BYTES, local_tokens

HEAD: Final = 2**28
"""Bytes of logits that exist at once, at most (one row of tokens at least)."""


def logits(args: Arguments) -> int:
    """Bytes of a piece of logits, or of all where they are fewer: pieces are even where that makes fewer than twice as
    many of them."""
    return _row(args) * _rows(args)


def of_tokens(args: Arguments) -> int:
    """Bytes of numbers of each token beside them: what it counts for, in fp64; of a piece the place of its label, and
    in fp32 or wider three statistics, their sums over tp as they are put together, the loss."""
    wide = max(4, BYTES[args.run.dtype])
    several = args.parallel.tp > 1
    piece = _rows(args) * args.batch.micro_batch
    return 8 * local_tokens(args) + piece * (9 + wide * (3 + 2 + 2 + 5 * several))


def _row(args: Arguments) -> int:
    return -(-args.model.vocab_size // args.parallel.tp) * args.batch.micro_batch * BYTES[args.run.dtype]


def _rows(args: Arguments) -> int:
    """Of the sequence, that are taken at a time."""
    b = args.batch
    row = _row(args)
    rows = local_tokens(args) // b.micro_batch
    pieces = -(-rows // max(1, HEAD // row))
    even = next((n for n in range(pieces, 2 * pieces) if rows % n == 0), pieces)
    return -(-rows // even)
