"""Which documents there are, on which side they fall, and what is said of bad input."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import text

from stretto.data.corpus import Corpus, position
from stretto.data.errors import DataError

pytestmark = pytest.mark.pure
Jsonl = Callable[..., Path]


def names(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus.documents()]


def test_the_default_is_the_standard_library_without_its_tests() -> None:
    corpus = Corpus.open(None)
    assert list(corpus.files) == sorted(corpus.files)
    assert {"abc.py", "json/decoder.py"} <= set(corpus.files)
    assert not [f for f in corpus.files if {"test", "tests", "site-packages"} & set(f.split("/"))]
    assert 5e6 < sum(len(document.text) for document in corpus.documents()) < 50e6
    assert corpus.label.startswith("python-3.")


def test_a_directory_gives_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "one.md").write_text("one")
    (tmp_path / "a.txt").write_bytes("zwei\r\nüber".encode())
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("über".encode("latin-1"))
    (tmp_path / "image.png").write_bytes(b"PNG\0\0\1")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git" / "config").write_text("no")
    found = [(document.name, document.text) for document in Corpus.open(tmp_path).documents()]
    assert found == [("a.txt", "zwei\r\nüber"), ("b/one.md", "one")]


def test_a_jsonl_gives_a_document_a_line(jsonl: Jsonl) -> None:
    path = jsonl({"text": "one", "id": 7}, "", {"text": ""}, {"text": "two\nlines"})
    found = [(document.name, document.text) for document in Corpus.open(path).documents()]
    assert found == [("texts.jsonl:1", "one"), ("texts.jsonl:4", "two\nlines")]


def test_a_directory_may_hold_jsonl_shards(jsonl: Jsonl) -> None:
    path = jsonl({"text": "one"}, {"text": "two"}, name="shard0.jsonl")
    assert names(Corpus.open(path.parent)) == ["shard0.jsonl:1", "shard0.jsonl:2"]


@given(text())
def test_a_position_is_a_fraction(name: str) -> None:
    assert 0 <= position(name) < 1


def test_positions_are_spread_evenly_and_frozen() -> None:
    places = sorted(position(f"file{i}.py") for i in range(2000))
    assert max(abs(place - i / 2000) for i, place in enumerate(places)) < 0.04  # Kolmogorov-Smirnov, 1.8/sqrt(n)
    assert position("abc.py") == 0.9646837170054966  # else held-out text would leak into training


def test_a_document_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("x")
    before = {name for name in names(Corpus.open(tmp_path)) if position(name) < 0.3}
    for i in range(20, 40):
        (tmp_path / f"{i}.txt").write_text("x")
    after = {name for name in names(Corpus.open(tmp_path)) if position(name) < 0.3}
    assert before == {name for name in after if int(name.removesuffix(".txt")) < 20}


def test_a_fingerprint_sees_new_changed_and_touched_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    seen = set()

    def look() -> None:
        seen.add(Corpus.open(tmp_path).fingerprint())

    file.write_text("one")
    os.utime(file, ns=(1, 1))
    look()
    look()
    assert len(seen) == 1
    file.write_text("three")
    os.utime(file, ns=(1, 1))
    look()
    os.utime(file, ns=(2, 2))
    look()
    (tmp_path / "b.txt").write_text("")
    look()
    assert len(seen) == 4


BAD_LINES = [
    ('{"text": ', r"line 2: not JSON .*each line must be an object with a text field"),
    ("[1, 2]", r'line 2: a list, but each line must be \{"text": "\.\.\."\}'),
    ('"text"', r"line 2: a text"),
    ('{"body": "x", "id": 3}', r"line 2: no text field with a string \(has only \['body', 'id'\]\)"),
    ('{"text": 5}', r"line 2: no text field with a string \(text is a number\)"),
    ('{"text": null}', r"line 2: no text field with a string \(text is null\)"),
    ('{"text": "\\ud800"}', r"line 2: text is not valid Unicode \(half a surrogate pair at 0\)"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named(jsonl: Jsonl, line: str, message: str) -> None:
    with pytest.raises(DataError, match=r"texts\.jsonl, " + message):
        list(Corpus.open(jsonl({"text": "fine"}, line)).documents())


def test_bytes_that_are_no_utf8_in_a_jsonl_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: not UTF-8 \(invalid start byte at byte 10 of the line\)"):
        list(Corpus.open(tmp_path).documents())


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data '.*nowhere' does not exist"):
        Corpus.open(tmp_path / "nowhere")


def test_an_empty_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(DataError, match=r"has no files \(hidden ones do not count\)"):
        Corpus.open(tmp_path)


def test_a_single_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("x")
    assert names(Corpus.open(tmp_path / "book.txt")) == ["book.txt"]


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    corpus = Corpus.open(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: No such file"):
        list(corpus.documents())
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: No such file"):
        corpus.fingerprint()


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match=r"this Python has no source files in .*; name a directory"):
        Corpus.open(None)
