"""docs/verify.md: its example runs as it stands, and what it says of the command is so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.cli.verify import FORMS, main

pytestmark = pytest.mark.gloo

PAGE = Path(__file__).parents[2] / "docs" / "verify.md"
SMALL = ["--hidden", "32", "--heads", "4", "--layers", "2", "--vocab", "61", "--seq-len", "16", "--global-batch", "8"]
SMALL += ["--micro-batch", "2", "--pp", "1"]


def verify(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stretto", "verify", *SMALL, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_example_runs(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    script = tmp_path / "mine.py"
    script.write_text(found[1])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "20 gradients are equal\n"


@pytest.mark.nightly
def test_two_layouts_are_compared_and_written_down(tmp_path: Path) -> None:
    """A reference smaller than the world, three updates, everything in the file."""
    out = tmp_path / "differences.json"
    done = verify("--nproc", "4", "--tp", "2", "--against", "pp=2", "--updates", "3", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tp=2 x dp=2" in done.stdout
    assert "EQUAL" in done.stdout
    data = json.loads(out.read_text())
    assert data["equal"]
    assert data["against"]["pp"] == 2
    assert {d["step"] for d in data["differences"]} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "tp=8"], "has 8 ranks, the run 2"),
        (["--against", "tq=2"], "is no layout"),
        (["--against", "pp=2,pp=2"], "each once"),
        (["--against"], "--against LAYOUT"),
        (["--updates", "0"], "--updates: 0 is out of range, must be >= 1"),
        (["--against", "tp=2", "--heads", "1", "--kv-heads", "1"], "--against tp=2: "),
        (["--against", "tp=2", "--heads", "1", "--kv-heads", "1"], "model.heads = 1 (command line), parallel.tp = 2"),
        (["--against", "cp=2", "--seq-len", "1"], "parallel.cp = 2 (--against cp=2)"),
    ],
)
def test_a_wrong_word_is_rejected_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--nproc", "2", "--tp", "1", *words]) == 2
    assert said in capsys.readouterr().err


def test_options_are_taken_from_between_those_of_a_run() -> None:
    words = ["--tp", "2", "--against=pp=2", "--json", "x.json", "--pp", "1"]
    said = parse(words, env={}, form=FORMS[0], files=False)
    assert (said.own.against, said.own.json, said.own.comms) == ("pp=2", "x.json", False)
    assert (said.args.parallel.tp, said.args.parallel.pp) == (2, 1)
