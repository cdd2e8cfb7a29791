"""A corpus is tokenized in parts that survive a kill, by any number of processes, into the same tokens.

Faults to catch: a part made again after a kill; temporary files that stay; a waiter that gives up while the builder
gets on; a line that is twice where a file is cut; lines that get other numbers; a file that changes while it is read.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from stretto.data import parts, workers
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.lock import Lock, Progress
from stretto.data.parts import plan
from stretto.data.prepare import Splits, prepare
from stretto.data.tokenizer import ByteTokenizer

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(120)]

DIES = """
import os, signal, sys
from stretto.data import corpus, parts, prepare, tokenizer
root, cache = sys.argv[1:]
parts._PART = 400
make, made = parts.make, []
def dies(job, part, done):
    if len(made) == 2:
        parts._documents = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # its files are open
    made.append(part)
    make(job, part, done)
parts.make = dies
prepare.prepare(corpus.Corpus.open(root), tokenizer.ByteTokenizer(), held_out=0.25, cache=cache)
"""


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"Line {i}. " * (1 + i % 4)}) + "\n" for i in range(60)))
    return path


def build(path: Path, cache: Path, workers: int = 1, timeout: float = 600, tell=lambda _: None) -> Splits:  # type: ignore[no-untyped-def]
    return prepare(
        Corpus.open(path), ByteTokenizer(), held_out=0.25, cache=cache, workers=workers, timeout=timeout, tell=tell
    )


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


LEFT = ["account.json", "held_out", "lock", "train"]


def test_a_killed_builder_loses_one_part_and_leaves_nothing(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a restart from the beginning, temporary files that stay, parts in another order."""
    command = [sys.executable, "-c", DIES, str(lines), str(tmp_path / "cache")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [name for name in files(tmp_path / "cache") if name.endswith(".tmp")]
    next((tmp_path / "cache").iterdir()).joinpath("train.other-1.tmp").touch()  # of one who was killed while joining
    monkeypatch.setattr(parts, "_PART", 400)
    made, make = [], parts.make

    def counted(job: parts.Job, part: int, done: parts.Done) -> None:
        made.append(part)
        make(job, part, done)

    monkeypatch.setattr(parts, "make", counted)
    again = build(lines, tmp_path / "cache")
    assert made == list(range(2, len(plan(Corpus.open(lines)))))
    assert files(tmp_path / "cache") == LEFT
    monkeypatch.undo()
    whole = build(lines, tmp_path / "whole")
    assert (again.train.header, again.held_out.header) == (whole.train.header, whole.held_out.header)
    assert again.account == whole.account
    assert list(again.train.offsets) == list(whole.train.offsets)


def test_many_workers_make_the_same_tokens(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(lines, tmp_path / "whole")
    monkeypatch.setattr(parts, "_PART", 400)
    told: list[Progress] = []
    several = build(lines, tmp_path / "cache", workers=2, tell=told.append)
    assert several.train.header == whole.train.header
    assert several.train.intact()
    assert files(tmp_path / "cache") == LEFT
    assert told[0].done == 0
    assert all(one.done <= two.done <= two.total for one, two in pairwise(told))


TWO = """
import sys, time
from pathlib import Path
from stretto.data import corpus, parts, prepare, tokenizer
root, cache, start = sys.argv[1:]
parts._PART = 400
while not Path(start).exists(): time.sleep(0.001)
made = prepare.prepare(corpus.Corpus.open(root), tokenizer.ByteTokenizer(), held_out=0.25, cache=cache, workers=2)
print(made.train.header.digest, made.held_out.header.digest)
"""


def test_two_builders_share_the_work(lines: Path, tmp_path: Path) -> None:
    """As on two nodes with one cache. Catches: a second builder that fails, or makes other tokens."""
    whole = build(lines, tmp_path / "whole")
    command = [sys.executable, "-c", TWO, str(lines), str(tmp_path / "cache"), str(tmp_path / "start")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    (tmp_path / "start").touch()
    printed = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert printed == {f"{whole.train.header.digest} {whole.held_out.header.digest}\n"}
    assert files(tmp_path / "cache") == LEFT


def test_what_a_worker_finds_wrong_is_told_once(lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART", 400)
    with lines.open("a") as file:
        file.write("no json\n")
    with pytest.raises(DataError, match=r"texts\.jsonl, line 61: not JSON"):
        build(lines, tmp_path / "cache", workers=2)
    assert files(tmp_path / "cache") == ["lock"]


def test_a_killed_worker_is_told_and_its_parts_stay(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_PART", 400)
    killed = tmp_path / "killed.py"
    killed.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    run = subprocess.Popen
    monkeypatch.setattr(workers.subprocess, "Popen", lambda _, **how: run([sys.executable, str(killed)], **how))
    with pytest.raises(DataError, match=r"has ended \(killed by SIGKILL\); what is done is kept"):
        build(lines, tmp_path / "cache", workers=2)


def test_one_who_waits_does_so_as_long_as_there_is_progress(lines: Path, tmp_path: Path) -> None:
    """Catches: a time-out that counts from the beginning."""
    folder = build(lines, tmp_path / "cache").train.path.parent
    (folder / "train").rename(folder / "kept")
    holder = """
import sys, time
from pathlib import Path
from stretto.data.lock import Lock
folder = Path(sys.argv[1])
with Lock.opened(folder / "lock") as lock:
    assert lock.take()
    print("taken", flush=True)
    for i in range(10):
        lock.say(i, 10)
        time.sleep(0.3)
    (folder / "kept").rename(folder / "train")
"""
    with subprocess.Popen([sys.executable, "-c", holder, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        told: list[Progress] = []
        begin = time.monotonic()
        build(lines, tmp_path / "cache", timeout=2, tell=told.append)
        assert time.monotonic() - begin > 2
    assert {progress.who for progress in told if progress.total == 10} == {
        f"process {process.pid} on {os.uname().nodename}"
    }


@given(sizes=lists(integers(0, 40), max_size=30), part=integers(1, 100), block=integers(1, 50), end=integers(0, 1))
def test_parts_hold_every_line_once(
    sizes: list[int], part: int, block: int, end: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Catches: a line that is lost or twice where a file is cut, or that gets another number."""
    root = tmp_path_factory.mktemp("lines")
    raw = "\n".join(json.dumps({"text": "x" * size}) if size else "" for size in sizes) + "\n" * end
    (root / "a.jsonl").write_text(raw)
    corpus = Corpus.open(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_PART", part)
        patch.setattr(parts, "_BLOCK", block)
        planned = plan(corpus)
        found = [d for one in planned for piece in one.pieces for d in parts.read(root, piece, "text")]
    assert found == list(corpus.documents())
    assert sum(one.size for one in planned) == len(raw.encode())


def test_a_progress_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    with Lock.opened(tmp_path / "lock") as lock, Lock.opened(tmp_path / "lock") as other:
        assert lock.take()
        (tmp_path / "lock").write_bytes(b"\xff\x1b[2J" * 200)
        with pytest.raises(DataError, match="waited 0 s for another process"):
            other.wait(0, lambda _: None)


def test_a_file_that_changes_while_it_is_read_is_told(lines: Path, tmp_path: Path) -> None:
    """Catches: a store under the name of a corpus that it is not of."""

    def touch(_: Progress) -> None:
        os.utime(lines, ns=(1, time.time_ns()))

    with pytest.raises(DataError, match="changed while they were read"):
        build(lines, tmp_path / "cache", tell=touch)
