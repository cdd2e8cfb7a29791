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
    b, p = args.batch, args.parallel
    row = -(-args.model.vocab_size // p.tp) * b.micro_batch * BYTES[args.run.dtype]
    rows = local_tokens(args) // b.micro_batch
    pieces = -(-rows // max(1, HEAD // row))
    even = next((n for n in range(pieces, 2 * pieces) if rows % n == 0), pieces)
    return row * -(-rows // even)
