"""Tokens that are made elsewhere are mapped as they are, and nothing in their index is believed.

Faults to catch: a place outside the file that is believed; tokens that the index does not account for; an id that no
vocabulary has; a document that ends where a sequence does.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import binary, data, integers, lists, sampled_from

from stretto.arguments import Arguments, ConfigError, parse
from stretto.arguments.schema import DataConfig
from stretto.data.errors import DataError
from stretto.data.indexed import IndexedTokens, prepare_indexed
from stretto.data.prepare import Splits
from stretto.data.text import Text
from stretto.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.pure

CODES = {"u1": 1, "i2": 3, "i4": 4, "i8": 5, "u2": 8}
DOCUMENTS = [[1, 2, 3, 256], [4, 256], [256], [5, 6, 7, 8, 256], [9, 256]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "u2", per_document: int = 1) -> IndexedTokens:
    """As Megatron-LM's IndexedDatasetBuilder writes it: each document in `per_document` sequences."""
    pieces = [np.array_split(np.array(document, dtype), per_document) for document in documents]
    lengths = np.array([len(piece) for document in pieces for piece in document], "<i4")
    places = np.concatenate([[0], np.cumsum(lengths.astype("<i8"))[:-1]]) * np.dtype(dtype).itemsize
    first = np.arange(len(documents) + 1, dtype="<i8") * per_document
    Path(f"{prefix}.bin").write_bytes(b"".join(piece.tobytes() for document in pieces for piece in document))
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(first))
    raw = head + lengths.tobytes() + places.astype("<i8")[: len(lengths)].tobytes() + first.tobytes()
    Path(f"{prefix}.idx").write_bytes(raw)
    return IndexedTokens(prefix)


def prepare(made: IndexedTokens, cache: Path, held_out: float = 0.4) -> Splits:
    return prepare_indexed(made, ByteTokenizer(), held_out=held_out, cache=cache, tell=lambda _: None)


@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "u2"])
@pytest.mark.parametrize("per_document", [1, 3])
def test_documents_keep_their_bounds_and_nothing_is_copied(dtype: str, per_document: int, tmp_path: Path) -> None:
    made = write(tmp_path / "made", DOCUMENTS, dtype, per_document)
    for _ in range(2):  # read, and from the cache
        splits = prepare(made, tmp_path / "cache")
        for store, documents in ((splits.train, DOCUMENTS[:3]), (splits.held_out, DOCUMENTS[3:])):
            assert store.tokens.tolist() == [token for document in documents for token in document]
            assert [store.document(i).tolist() for i in range(store.header.documents)] == [d[:-1] for d in documents]
            assert store.intact()
            assert isinstance(store.tokens.base, np.memmap | np.ndarray)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == ["digests.json", "lock"]
    assert sum(path.stat().st_size for path in kept) < 1000


def test_equal_tokens_have_equal_digests(tmp_path: Path) -> None:
    one = prepare(write(tmp_path / "one", DOCUMENTS), tmp_path / "cache")
    other = prepare(write(tmp_path / "other", [[1, *DOCUMENTS[0][1:]], *DOCUMENTS[1:]]), tmp_path / "cache")
    changed = prepare(write(tmp_path / "changed", [[7, *DOCUMENTS[0][1:]], *DOCUMENTS[1:]]), tmp_path / "cache")
    assert one.train.header.digest == other.train.header.digest != changed.train.header.digest


@pytest.mark.parametrize("name", ["made", "made.bin", "made.idx"])
def test_a_run_names_them_by_either_file(name: str, tmp_path: Path) -> None:
    write(tmp_path / "made", DOCUMENTS)
    args = Arguments(data=DataConfig(data=str(tmp_path / name), cache=str(tmp_path / "cache"), held_out=0.2))
    text = Text.open(args)
    assert (text.sources[0].name, text.mix.stores[0].header.documents) == ("made", 4)
    assert parse(["--data", str(tmp_path / name)]).args.data.data == str(tmp_path / name)


def test_half_of_the_two_files_is_told(tmp_path: Path) -> None:
    write(tmp_path / "made", DOCUMENTS).index.unlink()
    with pytest.raises(DataError, match=r"made\.bin are tokens without .*made\.idx; both files are needed"):
        IndexedTokens.at(str(tmp_path / "made.bin"))
    with pytest.raises(ConfigError, match="does not exist"):
        parse(["--data", str(tmp_path / "made")])


def test_ids_outside_the_vocabulary_are_told(tmp_path: Path) -> None:
    """Catches: a lookup of row 0, or of nothing, for a token of another tokenizer."""
    for dtype, ids in (("i4", [-1, 5]), ("u2", [5, 257])):
        with pytest.raises(DataError, match=rf"ids {ids[0]}\.\.{ids[1]}, but the tokenizer byte has 257 entries"):
            prepare(write(tmp_path / dtype, [ids, ids], dtype), tmp_path / "cache")


@pytest.mark.parametrize(("held_out", "kept"), [(0, 5), (0.01, 4), (0.4, 3), (0.89, 1)])
def test_the_last_documents_are_held_out(held_out: float, kept: int, tmp_path: Path) -> None:
    splits = prepare(write(tmp_path / "made", DOCUMENTS), tmp_path / "cache", held_out)
    assert (splits.train.header.documents, splits.held_out.header.documents) == (kept, 5 - kept)


def test_a_side_that_would_be_empty_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"leaves none of the 1 documents.*--held-out 0 trains on all"):
        prepare(write(tmp_path / "made", DOCUMENTS[:1]), tmp_path / "cache")
    with pytest.raises(DataError, match="has no documents"):
        prepare(write(tmp_path / "none", []), tmp_path / "cache")


WRONG = {
    "its name": lambda raw: b"X" + raw[1:],
    "its version": lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:],
    "its dtype": lambda raw: raw[:17] + b"\x07" + raw[18:],
    "a count of sequences": lambda raw: raw[:18] + struct.pack("<Q", 1 << 62) + raw[26:],
    "a count of documents": lambda raw: raw[:26] + struct.pack("<Q", 1 << 63) + raw[34:],
    "a length": lambda raw: raw[:34] + struct.pack("<i", -4) + raw[38:],
    "a place": lambda raw: raw[: 34 + 20] + struct.pack("<q", 1 << 60) + raw[34 + 28 :],
    "a first sequence": lambda raw: raw[:-16] + struct.pack("<q", -1) + raw[-8:],
    "the last sequence": lambda raw: raw[:-8] + struct.pack("<q", 1 << 40),
    "its end": lambda raw: raw[:-1],
    "its beginning": lambda raw: raw[:20],
    "everything": lambda _: b"",
}


@pytest.mark.parametrize("what", WRONG)
def test_an_index_that_lies_is_rejected(what: str, tmp_path: Path) -> None:
    made = write(tmp_path / "made", DOCUMENTS)
    made.index.write_bytes(WRONG[what](made.index.read_bytes()))  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match="is no index of tokens that can be used"):
        made.offsets()


@pytest.mark.parametrize("damage", [lambda raw: raw + b"\0\0", lambda raw: raw[:-2], lambda _: b""])
def test_tokens_that_are_not_those_of_the_index_are_rejected(damage: Any, tmp_path: Path) -> None:
    made = write(tmp_path / "made", DOCUMENTS)
    made.tokens.write_bytes(damage(made.tokens.read_bytes()))
    with pytest.raises(DataError, match=r"14 tokens of 2 bytes are not the \d+ bytes of .*made\.bin"):
        made.offsets()


@given(
    documents=lists(lists(integers(0, 256), max_size=5), max_size=6), draw=data(), noise=binary(min_size=1, max_size=9)
)
def test_any_damage_is_told_or_harmless(
    documents: list[list[int]], draw: Any, noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Catches: a place outside the file that is believed."""
    made = write(tmp_path_factory.mktemp("made") / "made", documents, draw.draw(sampled_from(["u2", "i4"])))
    raw = made.index.read_bytes()
    at = draw.draw(integers(0, len(raw)))
    made.index.write_bytes(raw[:at] + noise + raw[at + len(noise) :])
    try:
        dtype, offsets = made.offsets()
    except DataError:
        return
    assert offsets[0] == 0
    assert (np.diff(offsets) >= 0).all()
    assert offsets[-1] * np.dtype(dtype).itemsize == made.size()
