"""A tokenizer that does not give back its text is found out: no figure counts text that no model saw (P28).

Faults to catch: lost characters counted once each; lost text that is not held against its bound; bits over bytes that
no model saw.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis.strategies import sampled_from, text
from tokenizers import models

from stretto.data.baselines import bits_per_byte
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.lost import Lost
from stretto.data.prepare import Splits, prepare
from stretto.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.pure


@pytest.fixture
def no_umlauts(tmp_path: Path) -> Path:
    """A BPE of ASCII without an unknown token: other characters are dropped."""
    vocab = {"</s>": 0, **{chr(c): i for i, c in enumerate(range(32, 127), 1)}, "\n": 96}
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], fuse_unk=False)).save(str(path))
    said = json.loads(path.read_text())
    said["decoder"] = {"type": "Fuse"}
    path.write_text(json.dumps(said))
    return path


def build(tokenizer: Path, root: Path, cache: Path, most_lost: float = 1.0) -> Splits:
    return prepare(Corpus.open(root), load_tokenizer(str(tokenizer)), held_out=0.25, cache=cache, most_lost=most_lost)


def test_lost_text_is_measured_and_bounded(no_umlauts: Path, text_dir: Path, tmp_path: Path) -> None:
    """Catches: a share that is not measured, of bytes that do come back, or not held against its bound in a cache."""
    for _ in range(2):
        with pytest.raises(DataError, match=r"loses \d\.\d% of the text, above all '\\xdc' \(U\+00DC\): more than"):
            build(no_umlauts, text_dir, tmp_path / "cache", most_lost=0.01)
    splits = build(no_umlauts, text_dir, tmp_path / "cache")
    texts = [document.text for document in Corpus.open(text_dir).documents()]
    lost = splits.account.lost
    assert lost.bytes == sum(2 * Counter(each)["Ü"] for each in texts)
    assert lost.of == sum(len(each.encode()) for each in texts)


def test_a_tokenizer_of_bytes_loses_nothing(text_dir: Path, bpe_dir: Path, tmp_path: Path) -> None:
    assert build(bpe_dir, text_dir, tmp_path / "cache", most_lost=0).account.lost.bytes == 0


@given(whole=text(alphabet="aäüß€\n 🎵"), dropped=sampled_from("aäüß€\n 🎵"))
def test_what_is_dropped_is_counted_in_bytes(whole: str, dropped: str) -> None:
    left = whole.replace(dropped, "")
    lost = Lost.between(whole, left)
    assert lost.bytes == len(whole.encode()) - len(left.encode())
    assert lost.most == (dropped if dropped in whole else "")
    assert Lost.between(whole, " " + whole[::-1]).bytes == 0  # added and moved, but not lost
    assert Lost.from_json(json.loads(json.dumps(lost.as_json()))) == lost


def test_bits_count_bytes_that_were_seen_or_there_are_none() -> None:
    """Catches: bits of a text that the model never saw, spread over its bytes."""
    nat = math.log(256)
    assert bits_per_byte(nat, 1, Lost(0, 10**6)) == pytest.approx(8)
    assert bits_per_byte(nat, 1, Lost(500, 10**6)) == pytest.approx(8 / 0.9995)
    assert bits_per_byte(nat, 1, Lost(1100, 10**6)) is None
    assert bits_per_byte(nat, 0) is None
