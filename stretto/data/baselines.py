"""What a model must beat on held-out text: a bigram of bytes, and zlib. All in bits per byte.

Bits per byte do not depend on the tokenizer: all bits spent on a text, the ends of its documents included,
over the bytes of that text in UTF-8. With byte tokens the bigram answers exactly the questions that the
model is asked: the same stream `eod, text, eod, text, eod`, the same 257 choices.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stretto.data.corpus import Corpus, position
from stretto.data.errors import DataError
from stretto.data.lost import Lost

_VOCAB = 257
_EOD = 256
COMPARABLE = 0.001
"""The share of a text that may be lost where bits per byte are still given."""
_BLOCK = 1 << 22  # bytes counted at a time: one histogram of 257 x 257 for many short documents


@dataclass(frozen=True)
class Baselines:
    """Held-out bits per byte of a bigram model and of zlib, and on how much text they stand."""

    bigram: float
    zlib: float
    train_bytes: int
    held_out_bytes: int


def baselines(corpus: Corpus, held_out: float, *, alpha: float = 0.1, limit: int = 1 << 26) -> Baselines:
    """Fit on the train documents, measure on the held-out ones (the split of `prepare`).

    `alpha` is added to every count of a pair. On each side documents are read until `limit` bytes (64 MiB)
    are there: more changes 257 x 257 counts no longer, and start-up must stay short. Raises DataError when
    nothing is held out.
    """
    train, held = _sides(corpus, held_out, limit)
    if not held:
        raise DataError(f"--held-out {held_out} holds out nothing of {corpus.root} to measure on")
    text = b"".join(held)
    bits = bigram_bits(pair_counts(train), pair_counts(held), alpha)
    return Baselines(
        bigram=bits / len(text),
        zlib=8 * len(zlib.compress(text, level=9)) / len(text),
        train_bytes=sum(map(len, train)),
        held_out_bytes=len(text),
    )


def bits_per_byte(nats_per_token: float, bytes_per_token: float, lost: Lost | None = None) -> float | None:
    """Mean loss in nats per token as bits per byte, with the `TokenStore.bytes_per_token` of that text.

    Bytes that the tokenizer has `lost` do not count. Beyond a thousandth the rest is another text than that of
    `baselines`, and there is no such figure: None; nor where the bytes are not known, 0 for each token.
    """
    share = lost.share if lost else 0.0
    seen = bytes_per_token * (1 - share)
    return None if seen == 0 or share > COMPARABLE else nats_per_token / math.log(2) / seen


def pair_counts(texts: Iterable[bytes]) -> NDArray[np.int64]:
    """How often token j follows token i in `eod, text, eod, text, eod`: [257, 257]."""
    counts = np.zeros(_VOCAB * _VOCAB, dtype=np.int64)
    for stream in _streams(texts):
        counts += np.bincount(stream[:-1] * _VOCAB + stream[1:], minlength=_VOCAB * _VOCAB)
    return counts.reshape(_VOCAB, _VOCAB)


def bigram_bits(train: NDArray[np.int64], held_out: NDArray[np.int64], alpha: float) -> float:
    """Bits that a bigram with the smoothed counts `train` [v, v] spends on the pairs `held_out` [v, v]."""
    smoothed = train + alpha
    log_p = np.log2(smoothed) - np.log2(smoothed.sum(axis=1, keepdims=True))
    return float(-(held_out * log_p).sum())


def _streams(texts: Iterable[bytes]) -> Iterator[NDArray[np.int64]]:
    """The token stream in blocks, each beginning with the `eod` that ended the one before."""
    eod, parts, size = np.array([_EOD], dtype=np.int64), [], 0
    for text in texts:
        parts += [np.frombuffer(text, dtype=np.uint8).astype(np.int64), eod]
        size += len(text)
        if size >= _BLOCK:
            yield np.concatenate([eod, *parts])
            parts, size = [], 0
    yield np.concatenate([eod, *parts])


def _sides(corpus: Corpus, held_out: float, limit: int) -> tuple[list[bytes], list[bytes]]:
    """The texts to train on and the held-out ones, each side until it has `limit` bytes."""
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    sizes = [0, 0]
    for document in corpus.documents():
        side = int(position(document.name) < held_out)
        if sizes[side] < limit:
            raw = document.text.encode("utf-8")
            sides[side].append(raw)
            sizes[side] += len(raw)
        elif min(sizes) >= limit:
            break
    return sides
