"""Tiles whose rows are heads of tokens, each in two halves whose elements are rotated in pairs.

Rows follow each other, of one token or of several, so that models with few heads fill a tile as those with many do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # which reads annotations, and knows no types but its own
def place(tile, tokens, batch, heads, tall: tl.constexpr):
    """Of each row of a tile: whether there is such a row, the number of its token, and position, sample and head."""
    row = tile * tall + tl.arange(0, tall)[:, None]
    token = row // heads
    at = (token // batch).to(tl.int64), (token % batch).to(tl.int64), row % heads
    return row < tokens * heads, token.to(tl.int64), at


@triton.jit
def rows(x, at, steps):
    """Where they begin: `steps` from one position, sample and head to the next."""
    return x + at[0] * steps[0] + at[1] * steps[1] + at[2] * steps[2]


@triton.jit
def halves(row, inside, half: tl.constexpr):
    """Both of each row, as they lie in memory."""
    row += tl.arange(0, half)[None, :]
    return tl.load(row, mask=inside, other=0.0), tl.load(row + half, mask=inside, other=0.0)


@triton.jit
def wide(pair):
    """Both in fp32."""
    return pair[0].to(tl.float32), pair[1].to(tl.float32)


@triton.jit
def rotated(pair, cos, sin):
    """By an angle."""
    return pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin


@triton.jit
def rotated_back(pair, cos, sin):
    """Not by -sin, which would be computed for each element."""
    return pair[0] * cos + pair[1] * sin, pair[1] * cos - pair[0] * sin


@triton.jit
def put(row, pair, inside, half: tl.constexpr):
    """Write both halves of each row."""
    row += tl.arange(0, half)[None, :]
    tl.store(row, pair[0].to(row.dtype.element_ty), mask=inside)
    tl.store(row + half, pair[1].to(row.dtype.element_ty), mask=inside)
