"""Which window of the text is sample k of the run: a seeded permutation that needs no memory.

A shuffled index of 10^10 windows would be 80 GB on every node. `permute` computes one entry of it instead:
a Feistel network over the grid Z_a x Z_b with a*b just above n, made a permutation of 0..n-1 by walking
each cycle until it is back inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002,
their generalized Feistel and cycle-walking constructions).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

# Four rounds are the least that look random to an adversary who may also ask for the inverse (Luby and
# Rackoff, 1988); the rest is for tiny grids, where a round has little to mix.
_ROUNDS = 8


def permute(index: NDArray[np.int64], n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The images of `index` [k] under the permutation of 0..n-1 that (seed, epoch) names; [k] int64.

    Raises ValueError when an index lies outside 0..n-1.
    """
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise ValueError(f"indices {int(index.min())}..{int(index.max())} lie outside 0..{n - 1}")
    keys = _round_keys(seed, epoch)
    rows = math.isqrt(max(n - 1, 0)) + 1  # a = ceil(sqrt n), so a*b - n < a: a walk is rarely needed
    cols = -(-n // rows)
    out = _feistel(index.astype(np.uint64), rows, cols, keys)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], rows, cols, keys)
    return out.astype(np.int64)


def windows_of(first: int, count: int, n: int, *, seed: int) -> NDArray[np.int64]:
    """The windows [count] that are samples `first`..`first + count - 1` of a run over n windows.

    Sample k belongs to epoch k // n. Each epoch sees every window once, in an order of its own.
    """
    samples = np.arange(first, first + count, dtype=np.int64)
    epochs, places = samples // n, samples % n
    out = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = permute(places[here], n, seed=seed, epoch=int(epoch))
    return out


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """One 64-bit key for each round. Hashed, so that no two (seed, epoch) are related by arithmetic."""
    digest = hashlib.blake2b(f"stretto order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(x: NDArray[np.uint64], rows: int, cols: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of 0..rows*cols-1: either half in turn is shifted by a hash of the other."""
    left, right = x // np.uint64(cols), x % np.uint64(cols)
    for i, key in enumerate(keys):
        if i % 2 == 0:
            left = (left + _mix(right ^ key) % np.uint64(rows)) % np.uint64(rows)
        else:
            right = (right + _mix(left ^ key) % np.uint64(cols)) % np.uint64(cols)
    return left * np.uint64(cols) + right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
