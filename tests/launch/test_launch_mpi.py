"""`mpirun` for real: ranks meet, and rank 0, to which Open MPI gives a terminal of its own, writes plain lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launchers

STARTS = {
    "mpirun.openmpi": ["--allow-run-as-root", "--oversubscribe", "-n", "2", "-x", "PYTHONPATH"],
    "mpirun.mpich": ["-n", "2"],
}


@pytest.mark.parametrize("launcher", STARTS)
def test_ranks_of_mpirun_train_and_rank_0_writes_plain_lines(tmp_path: Path, launcher: str) -> None:
    """Catches: colours and a live bar in a file, where rank 0 of Open MPI sees a terminal."""
    if not shutil.which(launcher):
        pytest.skip(f"{launcher} is not installed here")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"over the hills and far away {i}\n" * 20)
    out = tmp_path / "out"
    train = [
        "--preset",
        "tiny",
        "--steps",
        "6",
        "--held-out",
        "0.2",
        "--data",
        str(text),
        "--cache",
        str(out),
        "--out",
        str(out / "run"),
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    tell = "import sys; print('a terminal:', sys.stdout.isatty(), flush=True)"
    program = f"{tell}; from stretto.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [launcher, *STARTS[launcher], sys.executable, "-c", program, "train", *train]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("a terminal: True" in done.stdout) == (launcher == "mpirun.openmpi")
    assert "started by mp" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.count("  loss ") == 6
