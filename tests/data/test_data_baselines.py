"""The baselines against their definitions, byte by byte."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import binary, floats, lists

from stretto.data import baselines as room
from stretto.data.baselines import baselines, bigram_bits, bits_per_byte, pair_counts
from stretto.data.corpus import Corpus, position
from stretto.data.errors import DataError

pytestmark = pytest.mark.pure

TEXTS = lists(binary(max_size=20), max_size=5)


def pairs(texts: list[bytes]) -> list[tuple[int, int]]:
    stream = [256, *(token for text in texts for token in (*text, 256))]
    return list(pairwise(stream))


@given(TEXTS)
def test_pairs_are_counted_over_the_whole_stream(texts: list[bytes]) -> None:
    expected = np.zeros((257, 257), dtype=int)
    for pair in pairs(texts):
        expected[pair] += 1
    assert np.array_equal(pair_counts(texts), expected)


def test_blocks_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [b"abc", b"", b"defgh", b"i" * 10, b"j"]
    whole = pair_counts(texts)
    monkeypatch.setattr(room, "_BLOCK", 4)
    assert np.array_equal(pair_counts(texts), whole)


@given(train=TEXTS, held=TEXTS, alpha=floats(0.01, 10))
def test_bits_are_those_of_the_definition(train: list[bytes], held: list[bytes], alpha: float) -> None:
    seen = pairs(train)
    bits = sum(
        -math.log2((seen.count((a, b)) + alpha) / (sum(p[0] == a for p in seen) + 257 * alpha)) for a, b in pairs(held)
    )
    assert bigram_bits(pair_counts(train), pair_counts(held), alpha) == pytest.approx(bits)


def test_bits_per_byte_of_a_uniform_guess() -> None:
    assert bits_per_byte(math.log(256), bytes_per_token=1) == pytest.approx(8)
    assert bits_per_byte(math.log(256), bytes_per_token=4) == pytest.approx(2)


def test_they_stand_on_the_split_of_the_run(text_dir: Path) -> None:
    held = [d.text.encode() for d in Corpus.open(text_dir).documents() if position(d.name) < 0.25]
    measured = baselines(Corpus.open(text_dir), 0.25)
    assert measured.held_out_bytes == sum(map(len, held))
    assert measured.zlib == 8 * len(zlib.compress(b"".join(held), 9)) / measured.held_out_bytes
    assert 0 < measured.bigram < 3


def test_a_large_corpus_is_read_up_to_the_limit(text_dir: Path) -> None:
    measured = baselines(Corpus.open(text_dir), 0.25, limit=300)
    assert 300 <= measured.train_bytes < 600
    assert 300 <= measured.held_out_bytes < 600


def test_nothing_to_measure_on_is_told(text_dir: Path) -> None:
    with pytest.raises(DataError, match=r"--held-out 0 holds out nothing of .* to measure on"):
        baselines(Corpus.open(text_dir), 0)
