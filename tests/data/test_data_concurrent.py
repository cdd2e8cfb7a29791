"""Ranks that start at the same time build one cache between them (P20). Real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gloo

BUILDER = """
import sys, time
from pathlib import Path
from stretto.data import corpus, parts, prepare, tokenizer
root, cache, log, start = sys.argv[1:]
make = parts.make
def counted(*args):
    with open(log, "a") as file: file.write("built\\n")
    time.sleep(0.3)  # so that the others certainly come while this one builds
    make(*args)
parts.make = counted
while not Path(start).exists(): time.sleep(0.001)
splits = prepare.prepare(corpus.Corpus.open(root), tokenizer.ByteTokenizer(), held_out=0.25, cache=cache)
print(splits.train.header.digest, splits.held_out.header.digest)
"""


def together(n: int, text_dir: Path, tmp_path: Path) -> tuple[set[str], int]:
    """What n processes that start at the same time print, and how many of them built."""
    log, start = tmp_path / "log", tmp_path / "start"
    command = [sys.executable, "-c", BUILDER, str(text_dir), str(tmp_path / "cache"), str(log), str(start)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(n)]
    start.touch()
    printed = {process.communicate(timeout=60)[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    return printed, log.read_text().count("built")


def test_many_processes_build_once(text_dir: Path, tmp_path: Path) -> None:
    printed, built = together(4, text_dir, tmp_path)
    assert len(printed) == 1
    assert built == 1
    assert not list(tmp_path.rglob("*.tmp"))
