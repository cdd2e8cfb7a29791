"""P19: a device that is full says what was held beside what was foreseen, and changes that would fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.estimate import ledger
from stretto.report.device_full import ROOM, Held, device_full

pytestmark = pytest.mark.gloo

WORDS = ["--preset", "llama3-8b", "--nproc", "8", "--device", "cuda", "--micro-batch", "2", "--global-batch", "64"]
HELD = Held(90 * 2**30, 94 * 2**30, 95 * 2**30)


def said(*words: str) -> str:
    return device_full(parse([*WORDS, *words], files=False).args, 0, HELD, "CUDA out of memory")


@pytest.mark.parametrize("words", [("--sharding", "zero1"), ("--sharding", "fsdp", "--recompute", "selective"), ()])
def test_what_it_names_fits(words: tuple[str, ...]) -> None:
    """Catches: a change that a run rejects, or whose figure is that of another."""
    text = said(*words)
    assert "90.00 GiB in tensors, 94.00 reserved, of 95.00" in text
    args = parse([*WORDS, *words], files=False).args
    assert f"foreseen {ledger(args, 0).total / 2**30:.2f} GiB" in text
    named = re.findall(r"(--[a-z-]+(?: [a-z0-9]+)?) \(([\d.]+) GiB\)", text)
    for change, size in named:
        flag = change.split()[0]
        kept = [w for n, w in enumerate(words) if w != flag and (n == 0 or words[n - 1] != flag)]
        base = [w for n, w in enumerate(WORDS) if w != flag and (n == 0 or WORDS[n - 1] != flag)]
        found = ledger(parse([*base, *kept, *change.split()], files=False).args, 0).total
        assert float(size) == pytest.approx(found / 2**30, abs=0.06)
        assert found <= ROOM * HELD.total
    assert len(named) <= 3
    assert named or "no single change would fit: --" in text


def test_a_run_ends_with_it(tmp_path: Path) -> None:
    """Catches: the error of the allocator alone, as the last word."""
    program = f"""
import torch
from stretto.report.device_full import Held
from stretto.cli import main, training
def full(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 95 GiB")
training.train, Held.now = full, classmethod(lambda cls, device: cls(3 * 2**30, 4 * 2**30, 5 * 2**30))
main(["train", "--preset", "tiny", "--nproc", "1", "--tp", "1", "--pp", "1", "--out", {str(tmp_path / "run")!r}])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "the device is full: CUDA out of memory\n  at the peak 3.00 GiB in tensors" in ended.stderr
    assert ended.stderr.rstrip().endswith("ranks other layouts")
