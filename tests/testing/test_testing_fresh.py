"""Programs that are forked: exit codes, output, signals, and nothing left of one that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stretto.testing import Ended, Fresh

pytestmark = pytest.mark.gloo


def speak(code: int) -> int:
    print("out")
    print("err", file=sys.stderr)
    return code


def fail() -> int:
    raise ValueError("of the program")


def wait_for_ever(note: str) -> int:
    child = subprocess.Popen(["sleep", "600"])
    Path(note).write_text(str(child.pid))
    print("ready", flush=True)
    time.sleep(600)
    return 0


@pytest.mark.parametrize("code", [0, 3])
def test_exit_code_and_output(fresh: Fresh, code: int) -> None:
    ended = fresh.run(speak, code)
    assert ended == Ended(code, "out\n", "err\n", ended.seconds)


def test_an_exception_is_shown_as_the_interpreter_does(fresh: Fresh) -> None:
    ended = fresh.run(fail)
    assert ended.code == 1
    assert ended.err.endswith("ValueError: of the program\n")


def test_a_signal(fresh: Fresh, tmp_path: Path) -> None:
    program = fresh.start(wait_for_ever, str(tmp_path / "note"))
    program.until("ready")
    program.signal(signal.SIGTERM)
    assert program.wait(10).code == -signal.SIGTERM
    os.kill(int((tmp_path / "note").read_text()), signal.SIGKILL)


def test_what_hangs_is_ended_with_all_that_it_started(fresh: Fresh, tmp_path: Path) -> None:
    program = fresh.start(wait_for_ever, str(tmp_path / "note"))
    program.until("ready")
    with pytest.raises(TimeoutError, match="not done after 1 s"):
        program.wait(1)
    time.sleep(0.2)
    status = Path(f"/proc/{(tmp_path / 'note').read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
