"""What is read of a directory, in which form, and what is passed over and counted (P28).

Faults to catch: a pipe that is taken for a file; an open that waits for a writer; names that steer the terminal; a
file that is not UTF-8 passed over in silence; JSON lines in a `.json` learnt as text; a key that is not looked under;
an archive that ends in the middle taken as whole; memory without bound for one line.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from stretto.arguments import ConfigError, parse
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.files import PassedOver, open_regular
from stretto.data.formats import LARGEST_TEXT, Piece, read
from stretto.data.prepare import prepare
from stretto.data.tokenizer import ByteTokenizer

pytestmark = [pytest.mark.pure, pytest.mark.timeout(60)]  # a pipe that is read blocks for ever

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def found(root: Path, **key: str) -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in Corpus.open(root, **key).documents()]


def account(root: Path, cache: Path) -> PassedOver:
    return prepare(Corpus.open(root), ByteTokenizer(), held_out=0, cache=cache).account.passed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("kept")
    return tmp_path / "text"


def test_everything_passed_over_is_counted_with_its_reason(root: Path, tmp_path: Path) -> None:
    """Catches: a reason that is lost, a pipe that is opened, counts that a cached corpus no longer has."""
    (root / ".git").mkdir()
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "gone.txt").symlink_to(root / "nowhere")
    (root / "also.txt").symlink_to(root / "a.txt")
    os.mkfifo(root / "pipe.txt")
    (root / "to-pipe.txt").symlink_to(root / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    (root / "x.png").write_bytes(b"\x89PNG\0")
    (root / "x.zip").write_bytes(b"PK\x03\x04rest")
    (root / "utf16.txt").write_bytes("ü".encode("utf-16"))
    for i in range(5):
        (root / f"latin{i}.txt").write_bytes("ü".encode("latin-1"))
    (root / "empty.txt").touch()
    expected = {
        "binary": (1, ("x.png",)),
        "compressed in a way that is not read": (1, ("x.zip",)),
        "empty": (1, ("empty.txt",)),
        "folder behind a link": (1, ("loop",)),
        "hidden": (1, (".git/",)),
        "link that leads nowhere": (1, ("gone.txt",)),
        "not UTF-8": (6, ("latin0.txt", "latin1.txt", "latin2.txt")),
        "pipe, socket or device": (3, ("pipe.txt", "socket", "to-pipe.txt")),
    }
    for _ in range(2):  # built, and from the cache
        assert account(root, tmp_path / "cache").reasons == expected
    assert [name for name, _ in found(root)] == ["a.txt", "also.txt"]


def test_names_of_files_do_not_steer_a_terminal() -> None:
    passed = PassedOver.of([("binary", "\x1b[2J"), ("binary", "x" * 500)])
    assert "\x1b" not in f"{passed}"
    assert len(f"{passed}") < 150


def test_a_pipe_that_took_the_place_of_a_file_is_not_read(tmp_path: Path) -> None:
    """Catches: an open that waits for a writer."""
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is a pipe, socket, device or directory now"):
        open_regular(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_a_pipe_and_a_device_are_no_corpus(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a pipe, socket or device"):
        Corpus.open(tmp_path / name)
    with pytest.raises(ConfigError, match="is a pipe, socket or device"):
        parse(["--data", str(tmp_path / name)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.Json"])
def test_lines_are_seen_by_any_of_their_names(name: str, root: Path) -> None:
    (root / name).write_bytes(LINES)
    assert found(root)[-2:] == sorted([(f"{name}:1", "one"), (f"{name}:2", "two")]) or found(root)[:2] == [
        (f"{name}:1", "one"),
        (f"{name}:2", "two"),
    ]


@pytest.mark.parametrize("text", ['{\n "text": "one"\n}', '{"title": "one"}\n', "[1]", '{"text": 3}'])
def test_other_json_is_a_text(text: str, root: Path) -> None:
    (root / "b.json").write_text(text)
    assert found(root)[-1] == ("b.json", text)


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def zst(raw: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(raw))


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_are_read(suffix: str, root: Path) -> None:
    """Catches: half a corpus that is passed over, or learnt as a whole file where it holds lines."""
    pack = PACK.get(suffix, zst)
    (root / f"b.jsonl.{suffix}").write_bytes(pack(LINES) + pack(b'{"text": "three"}\n'))
    (root / f"c.txt.{suffix}").write_bytes(pack(b"drei\n"))
    assert found(root)[1:] == [
        *((f"b.jsonl.{suffix}:{i}", text) for i, text in enumerate(("one", "two", "three"), 1)),
        (f"c.txt.{suffix}", "drei\n"),
    ]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda _: b"no archive at all", lambda _: b""])
def test_a_damaged_archive_is_told(suffix: str, damage: Callable[[bytes], bytes], root: Path) -> None:
    packed = PACK.get(suffix, zst)(LINES * 1000)
    (root / f"b.jsonl.{suffix}").write_bytes(damage(packed))
    if not damage(packed) and suffix in ("gz", "zst"):  # nothing unpacks to nothing
        assert [name for name, _ in found(root)] == ["a.txt"]
        return
    with pytest.raises(DataError, match=rf"cannot (unpack|read) .*b\.jsonl\.{suffix}"):
        found(root)


def test_a_mountain_in_a_small_archive_ends_in_a_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: memory without bound for one document, or one line."""
    monkeypatch.setattr("stretto.data.formats.LARGEST_TEXT", 1000)
    assert LARGEST_TEXT == 1 << 30
    (root / "b.txt.gz").write_bytes(gzip.compress(b"x" * 1001))
    with pytest.raises(DataError, match=r"b\.txt\.gz has more than 1,000 bytes, too much for one document"):
        found(root)
    (root / "b.txt.gz").unlink()
    (root / "b.jsonl.gz").write_bytes(gzip.compress(b"{" * 1001))
    with pytest.raises(DataError, match=r"b\.jsonl\.gz, line 1: more than 1,000 bytes"):
        found(root)


def test_brackets_in_brackets_are_no_record(root: Path) -> None:
    (root / "b.json").write_text('{"text":' * 100_000)
    assert found(root)[-1][0] == "b.json"
    (root / "c.jsonl").write_text('{"text":' * 100_000)
    with pytest.raises(DataError, match=r"c\.jsonl, line 1: not JSON"):
        found(root)


def test_the_text_may_stand_under_another_key(root: Path) -> None:
    """Catches: a key that is not used, or one with which a cached corpus of another is taken."""
    (root / "b.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}) + "\n")
    assert found(root, text_key="body")[-1] == ("b.jsonl:1", "yes")
    with pytest.raises(DataError, match=r"no title field with a string.*--text-key names another field"):
        found(root, text_key="title")
    keys = {Corpus.open(root, text_key=key).fingerprint() for key in ("text", "body")}
    assert len(keys) == 2


def test_a_piece_of_lines_keeps_their_numbers(root: Path) -> None:
    (root / "b.jsonl").write_bytes(LINES)
    half = len(LINES) // 2
    second = read(root, Piece("b.jsonl", half, 2 * half, 2), "text")
    assert [(d.name, d.text) for d in second] == [("b.jsonl:2", "two")]
    assert [d.name for d in read(root, Piece("b.jsonl", 0, half, 1), "text")] == ["b.jsonl:1"]
