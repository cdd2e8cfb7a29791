"""Both tokenizers give back the text they were given, and a bad file is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis.strategies import characters, text

from stretto.data.errors import DataError
from stretto.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

pytestmark = pytest.mark.pure

UNICODE = text(characters(exclude_categories=["Cs"]))


@given(UNICODE)
def test_bytes_come_back(words: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(words)
    assert ids.dtype == np.int64
    assert len(ids) == len(words.encode())
    assert tokenizer.decode(ids) == words
    assert tokenizer.decode(np.append(ids, tokenizer.eod)) == words


def test_bytes_and_one_more() -> None:
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("aü").tolist() == [97, 0xC3, 0xBC]
    assert tokenizer.decode(np.array([97, 0xC3])) == "a\ufffd"


def test_a_trained_bpe_comes_back(bpe_dir: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(str(bpe_dir))
    assert tokenizer.vocab_size == 300
    assert tokenizer.eod == 0

    @given(UNICODE)
    def comes_back(words: str) -> None:
        ids = tokenizer.encode(words)
        assert ids.dtype == np.int64
        assert tokenizer.decode(ids) == words
        assert tokenizer.decode(np.append(ids, tokenizer.eod)) == words
        assert (ids < 300).all()

    comes_back()
    assert len(tokenizer.encode("Über the hills")) < len("Über the hills")


def test_a_text_that_quotes_the_end_does_not_end(bpe_dir: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_dir))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_truncation_and_padding_of_the_file_are_off(bpe_dir: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=5)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = "over the hills and far away"
    ours, before = load_tokenizer(str(tmp_path)), load_tokenizer(str(bpe_dir))
    assert [ids.tolist() for ids in ours.encode_all([words, "a"])] == [
        ids.tolist() for ids in before.encode_all([words, "a"])
    ]
    assert ours.decode(ours.encode(words)) == words


def test_a_file_and_its_directory_are_the_same_tokenizer(bpe_dir: Path) -> None:
    by_file = load_tokenizer(str(bpe_dir / "tokenizer.json"))
    assert by_file.fingerprint == load_tokenizer(str(bpe_dir)).fingerprint != ByteTokenizer().fingerprint


def copy(bpe_dir: Path, tmp_path: Path, config: str | None = None, end: str = "<|endoftext|>") -> Path:
    raw = (bpe_dir / "tokenizer.json").read_text().replace("<|endoftext|>", end)
    (tmp_path / "tokenizer.json").write_text(raw)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    return tmp_path


@pytest.mark.parametrize("said", ["<end>", {"content": "<end>", "lstrip": False}])
def test_the_configuration_says_which_token_ends_a_document(bpe_dir: Path, tmp_path: Path, said: object) -> None:
    root = copy(bpe_dir, tmp_path, json.dumps({"eos_token": said}), end="<end>")
    assert load_tokenizer(str(root)).eod == 0


def test_another_end_of_document_is_another_tokenizer(bpe_dir: Path, tmp_path: Path) -> None:
    root = copy(bpe_dir, tmp_path, json.dumps({"eos_token": "!"}))
    other = load_tokenizer(str(root))
    assert other.eod != 0
    assert other.fingerprint != load_tokenizer(str(bpe_dir)).fingerprint


def test_a_vocabulary_with_holes_counts_to_its_largest_id(tmp_path: Path, bpe_dir: Path) -> None:
    tokenizer = json.loads((bpe_dir / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 999, "content": "<far>"})
    tokenizer["model"]["vocab"]["<far>"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_tokenizer(str(tmp_path)).vocab_size == 1000


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read tokenizer .*: No such file.*or use --tokenizer byte"):
        load_tokenizer(str(tmp_path / "gpt2.json"))


def test_a_file_of_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"hello": 1}')
    with pytest.raises(DataError, match=r"is no tokenizer\.json of the tokenizers library"):
        load_tokenizer(str(tmp_path))


def test_no_end_of_document_is_told(bpe_dir: Path, tmp_path: Path) -> None:
    root = copy(bpe_dir, tmp_path, end="<fin>")
    with pytest.raises(DataError, match=r"has no token that ends a document.*tokenizer_config\.json"):
        load_tokenizer(str(root))


BAD_CONFIGS = [
    ('{"eos_token": "<none>"}', r"says eos_token='<none>', which tokenizer\.json does not have"),
    ('{"eos_token": 5}', r"eos_token must be a string, not 5"),
    ("[]", r"tokenizer_config\.json cannot be read"),
    ("{", r"tokenizer_config\.json cannot be read"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_a_bad_configuration_is_told(bpe_dir: Path, tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(copy(bpe_dir, tmp_path, config)))


def test_a_configuration_without_an_end_leaves_the_well_known_name(bpe_dir: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(copy(bpe_dir, tmp_path, "{}"))).eod == 0


def test_other_files_say_the_end_where_the_configuration_does_not(bpe_dir: Path, tmp_path: Path) -> None:
    root = copy(bpe_dir, tmp_path, "{}", end="<fin>")
    (root / "config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(str(root)).eod == 7
    (root / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_tokenizer(str(root)).eod == 9
    (root / "special_tokens_map.json").write_text('{"eos_token": "<fin>"}')
    assert load_tokenizer(str(root)).eod == 0


@pytest.mark.parametrize(
    ("config", "processor", "begins"),
    [
        ({"bos_token": "!", "add_bos_token": True}, False, True),
        ({"bos_token": "!", "add_bos_token": False}, True, False),
        ({"bos_token": "!"}, True, True),
        ({"bos_token": "!"}, False, False),
        ({}, True, False),  # what a classifier wraps around a text is not for a model that goes on with it
        ({"bos_token": "<|endoftext|>", "add_bos_token": True}, False, False),  # it ends the document before
    ],
)
def test_a_document_begins_as_the_model_was_trained(
    bpe_dir: Path, tmp_path: Path, config: dict[str, object], processor: bool, begins: bool
) -> None:
    """Catches: a Gemma or a Llama that goes on training without the token that stood before each of its texts."""
    root = copy(bpe_dir, tmp_path, json.dumps(config))
    inner = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
    first = inner.token_to_id("!")
    if processor:
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="! $A", special_tokens=[("!", first)])
        inner.save(str(root / "tokenizer.json"))
    ours, plain = load_tokenizer(str(root)), load_tokenizer(str(bpe_dir))
    wanted = [*([first] if begins else []), *plain.encode("over the hills").tolist()]
    assert ours.encode("over the hills").tolist() == wanted
    assert ours.encode_all(["over the hills"])[0].tolist() == wanted
    assert ours.decode(ours.encode("over the hills")) == "over the hills"
    assert (ours.fingerprint == plain.fingerprint) is (not begins and not processor)
