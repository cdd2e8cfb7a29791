"""Texts in the columns of tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stretto.data import parts
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.parts import plan

pytestmark = pytest.mark.pure

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", None, "", "two\nlines", *(f"text {i}" for i in range(4, 40))]
FOUND = [(i, text) for i, text in enumerate(TEXTS, start=1) if text]


@pytest.fixture
def table() -> pa.Table:
    return pa.table({"id": list(range(len(TEXTS))), "text": TEXTS, "body": [f"body {i}" for i in range(len(TEXTS))]})


def found(path: Path, key: str = "text") -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in Corpus.open(path, key).documents()]


def test_a_row_of_a_parquet_file_is_a_document(table: pa.Table, tmp_path: Path) -> None:
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert found(tmp_path / "a.parquet") == [(f"a.parquet:{i}", text) for i, text in FOUND]
    assert found(tmp_path, "body")[1] == ("a.parquet:2", "body 1")


@pytest.mark.parametrize("part", [1, 200, 10**6])
def test_a_large_one_is_cut_between_row_groups(
    part: int, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    monkeypatch.setattr(parts, "_PART", part)
    pieces = [piece for each in plan(Corpus.open(tmp_path)) for piece in each.pieces]
    read = [(d.name, d.text) for piece in pieces for d in parts.read(tmp_path, piece, "text")]
    assert read == [(f"a.parquet:{i}", text) for i, text in FOUND]
    assert len(pieces) == (6 if part == 1 else len(pieces))


def test_a_dataset_on_disk_is_read_without_its_descriptions(table: pa.Table, tmp_path: Path) -> None:
    """Catches: the JSON of a dataset's description, learnt as a text."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        with pa.ipc.new_stream(str(tmp_path / split / "data-00000-of-00001.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=7)
        (tmp_path / split / "state.json").write_text("{}")
        (tmp_path / split / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    names = [f"{split}/data-00000-of-00001.arrow" for split in ("test", "train")]
    assert found(tmp_path) == [(f"{name}:{i}", text) for name in names for i, text in FOUND]
    assert Corpus.open(tmp_path).passed.reasons["description of a dataset"][0] == 5


def test_an_arrow_file_with_an_index_is_read(table: pa.Table, tmp_path: Path) -> None:
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    assert found(tmp_path / "a.arrow") == [(f"a.arrow:{i}", text) for i, text in FOUND]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_what_is_no_table_or_has_no_texts_is_told(name: str, table: pa.Table, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no table, but long enough")
    with pytest.raises(DataError, match=rf"cannot read .*{name}"):
        found(tmp_path / name)
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as file:
            file.write_table(table)
    with pytest.raises(
        DataError, match=r"has no column title, only \['id', 'text', 'body'\]; --text-key names another"
    ):
        found(tmp_path / name, "title")
    with pytest.raises(DataError, match=rf"{name}, row 1: no id field with a string \(id is a number\)"):
        found(tmp_path / name, "id")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "b.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"pip install 'stretto\[parquet\]'"):
        found(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"pip install 'stretto\[zstd\]'"):
        found(tmp_path / "b.jsonl.zst")
