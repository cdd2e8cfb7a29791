"""Small corpora, tokenizers and stores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from stretto.data.corpus import Corpus
from stretto.data.prepare import Splits, prepare
from stretto.data.tokenizer import ByteTokenizer

TEXTS = {f"songs/{i}.txt": f"Song {i}\n" + f"Über the hills, {i} times. " * (3 + i % 5) for i in range(40)}


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 40 texts."""
    root = tmp_path_factory.mktemp("corpus") / "songbook"
    for name, text in TEXTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a real tokenizer.json: byte-level BPE, trained on the texts, 300 tokens."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(TEXTS.values(), trainer)
    root = tmp_path_factory.mktemp("bpe")
    trained.save(str(root / "tokenizer.json"))
    return root


@pytest.fixture(scope="session")
def splits(text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """The 40 texts as bytes, a quarter held out."""
    cache = tmp_path_factory.mktemp("cache")
    return prepare(Corpus.open(text_dir), ByteTokenizer(), held_out=0.25, cache=cache)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines (an object, or raw text) to a .jsonl."""

    def write(*lines: object, name: str = "texts.jsonl") -> Path:
        path = tmp_path / name
        raw = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("".join(f"{line}\n" for line in raw), encoding="utf-8")
        return path

    return write
