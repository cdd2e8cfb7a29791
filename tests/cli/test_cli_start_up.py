"""From the command to the end of the first step: what is counted, and that workers import nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
from cli_programs import ENV

pytestmark = pytest.mark.gloo

IMPORTS = """
import sys, time
time.sleep(0.5)
from stretto.cli import main, training
from stretto.train.loop import Loop

before = set()
run_local, first_step = training.run_local, Loop._first_step

def run(*args, **more):
    before.update(sys.modules)
    return run_local(*args, **more)

def step(self):
    result = first_step(self)
    names = sorted(set(sys.modules) - before)
    print(f"imported {names}\\n", end="", flush=True)
    return result

training.run_local, Loop._first_step = run, step
sys.exit(main())
"""


def test_the_process_begins_the_start_and_workers_import_nothing(options: list[str], tmp_path: Path) -> None:
    """Catches: a clock that starts when torch is loaded; what torch and NumPy load late, loaded in each worker."""
    words = [*options, "--steps", "1", "--nproc", "2", "--out", str(tmp_path / "run")]
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTS, *words], env=ENV, capture_output=True, text=True, timeout=90, check=False
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    imported = [literal_eval(line.removeprefix("imported ")) for line in lines if line.startswith("imported ")]
    assert len(imported) == 2
    assert max(map(len, imported)) <= 3, imported  # a file or two of torch's profiler
    found = re.search(r"^start-up ([\d.]+) s: imports ([\d.]+) s, .*first step ([\d.]+) s$", ended.stdout, re.MULTILINE)
    assert found, ended.stdout
    total, imports, first = map(float, found.groups())
    assert imports >= 0.5
    assert total + 0.1 >= imports + first  # each rounded
