"""A corpus becomes stores once, whoever else is at it, and again when it changes or the cache is damaged."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import floats

from stretto.data import parts
from stretto.data import prepare as room
from stretto.data.corpus import Corpus, position
from stretto.data.errors import DataError
from stretto.data.lock import Lock
from stretto.data.prepare import Splits, prepare
from stretto.data.store import TokenStore
from stretto.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

pytestmark = pytest.mark.pure


def build(root: Path, cache: Path, held_out: float = 0.25, tokenizer: Tokenizer | None = None) -> Splits:
    return prepare(Corpus.open(root), tokenizer or ByteTokenizer(), held_out=held_out, cache=cache)


def texts(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(store.document(i)) for i in range(store.header.documents)]


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_all_texts_come_back_on_their_sides(name: str, text_dir: Path, bpe_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("byte" if name == "byte" else str(bpe_dir))
    splits = build(text_dir, tmp_path, tokenizer=tokenizer)
    for store, held in ((splits.train, False), (splits.held_out, True)):
        documents = [d for d in Corpus.open(text_dir).documents() if (position(d.name) < 0.25) == held]
        assert documents
        assert texts(store, tokenizer) == [d.text for d in documents]
        assert store.header.bytes == sum(len(d.text.encode()) for d in documents)
        assert (store.header.vocab_size, store.header.eod) == (tokenizer.vocab_size, tokenizer.eod)


def test_chunks_do_not_change_the_store(text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(text_dir, tmp_path / "one").train.header
    monkeypatch.setattr(parts, "_CHUNK", 150)
    assert build(text_dir, tmp_path / "many").train.header == whole


def test_the_second_time_nothing_is_read(text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(text_dir, tmp_path)
    monkeypatch.setattr(parts, "read", lambda *_: pytest.fail("read again"))
    assert build(text_dir, tmp_path).train.header == first.train.header


def test_a_finished_cache_may_be_read_only(text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(text_dir, tmp_path)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("written to"))
    build(text_dir, tmp_path)


def test_what_the_tokens_depend_on_changes_the_cache(tmp_path: Path, bpe_dir: Path) -> None:
    (root := tmp_path / "text").mkdir()
    for i in range(20):
        (root / f"{i}.txt").write_text(f"text {i}")
    cache = tmp_path / "cache"
    seen = {build(root, cache).train.header.fingerprint}
    seen.add(build(root, cache, held_out=0.5).train.header.fingerprint)
    seen.add(build(root, cache, tokenizer=load_tokenizer(str(bpe_dir))).train.header.fingerprint)
    (root / "3.txt").write_text("changed")
    changed = build(root, cache)
    assert len({*seen, changed.train.header.fingerprint}) == 4
    assert "changed" in texts(changed.train, ByteTokenizer()) + texts(changed.held_out, ByteTokenizer())


def damage_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0" * 100)


def damage_fingerprint(path: Path) -> None:
    raw = path.read_bytes()
    said = json.loads(raw[:4096])
    name = "fingerprint" if "fingerprint" in said else "key"
    said[name] = "0" * len(said[name])
    path.write_bytes(json.dumps(said).encode().ljust(4096) + raw[4096:])


@pytest.mark.parametrize("name", ["train", "held_out", "account.json"])
@pytest.mark.parametrize("damage", [damage_cut, damage_header, damage_fingerprint, Path.unlink])
def test_a_damaged_or_stale_cache_is_built_again(text_dir: Path, tmp_path: Path, name: str, damage) -> None:  # type: ignore[no-untyped-def]
    first = build(text_dir, tmp_path)
    damage(first.train.path.with_name(name))
    again = build(text_dir, tmp_path)
    assert (again.train.header, again.held_out.header) == (first.train.header, first.held_out.header)
    assert again.train.intact()


def test_without_locks_the_work_is_doubled_but_right(
    text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert build(text_dir, tmp_path).train.intact()


def test_waiting_ends_and_names_the_builder(text_dir: Path, tmp_path: Path) -> None:
    folder = build(text_dir, tmp_path).train.path.parent
    (folder / "train").unlink()
    with Lock.opened(folder / "lock") as lock:
        assert lock.take()
        lock.say(1, 2)
        with pytest.raises(DataError, match=rf"waited 0\.1 s for process {os.getpid()} on .* to build"):
            prepare(Corpus.open(text_dir), ByteTokenizer(), held_out=0.25, cache=tmp_path, timeout=0.1)


def test_a_cache_that_cannot_be_written_is_told(text_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*; name a place with room by --cache"):
        build(text_dir, tmp_path / "file")


def documents(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).write_text("x")
    return root


def test_text_free_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"none of the 1 files in .* has any text \(1 binary \(a\.png\)\)"):
        build(tmp_path, tmp_path / "cache")


def test_a_single_document_is_told(tmp_path: Path) -> None:
    """Catches: no way out named, and the way out that leads nowhere."""
    (root := tmp_path / "text").mkdir()
    documents(root, "a.txt")
    with pytest.raises(DataError, match=r"has 1 document, which cannot be split; --held-out 0 trains on it"):
        build(root, tmp_path / "cache")
    assert build(root, tmp_path / "cache", held_out=0).train.header.documents == 1


def test_nothing_held_out_says_what_would_hold_out_one(tmp_path: Path) -> None:
    (root := tmp_path / "text").mkdir()
    documents(root, "a.txt", "b.txt", "c.txt")
    with pytest.raises(DataError, match=r"holds out none of the 3 documents") as said:
        build(root, tmp_path / "cache", held_out=0.0001)
    better = float(str(said.value).split("--held-out ")[2].split()[0])
    assert build(root, tmp_path / "cache", held_out=better).held_out.header.documents == 1


def test_everything_held_out_says_what_would_leave_some(tmp_path: Path) -> None:
    (root := tmp_path / "text").mkdir()
    documents(root, "a.txt", "b.txt", "c.txt")
    with pytest.raises(DataError, match=r"holds out all 3 documents") as said:
        build(root, tmp_path / "cache", held_out=0.9999)
    better = float(str(said.value).split("--held-out ")[2].split()[0])
    assert build(root, tmp_path / "cache", held_out=better).train.header.documents == 1


def test_none_may_be_held_out_on_purpose(text_dir: Path, tmp_path: Path) -> None:
    splits = build(text_dir, tmp_path, held_out=0)
    assert (splits.train.header.documents, splits.held_out.header.documents) == (40, 0)


@pytest.mark.parametrize("held_out", [-0.1, 1.0, 5.0, float("nan")])
def test_a_fraction_that_is_none_is_told(text_dir: Path, tmp_path: Path, held_out: float) -> None:
    with pytest.raises(DataError, match=r"is no fraction in \[0, 1\)"):
        build(text_dir, tmp_path, held_out=held_out)


@given(x=floats(0, 0.999))
def test_suggestions_lie_on_the_right_side(x: float) -> None:
    assert room._below(x) <= x < room._above(x)
