"""Signals that come before the first step: no rank is killed by them, and the exit code is that of the signal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_programs import ENV

from stretto.cli import main, training
from stretto.initialize import process
from stretto.initialize.stop import REQUEUE
from stretto.launch import local, worker
from stretto.testing import Fresh

pytestmark = pytest.mark.gloo


def told_in(place: str, number: int, argv: Sequence[str]) -> int:
    """`stretto ARGV`, told to stop in a phase of its start that then takes long."""

    def tell(whom: Callable[[], int], real: Any, then: float) -> Any:
        def told(*args: Any, **more: Any) -> Any:
            if os.environ.get("RANK") in (None, "1"):  # in the parent, or from one of the workers
                os.kill(whom(), number)
                time.sleep(then)
            return real(*args, **more)

        return told

    if place == "text":
        training.Text.open = tell(os.getpid, training.Text.open, 30)  # type: ignore[method-assign]
    elif place == "fork":  # while signals are blocked; a worker is slow to make itself ready for them
        local.serve_on = tell(os.getpid, local.serve_on, 0)
        settle = worker._settle
        worker._settle = lambda parent: (time.sleep(0.5), settle(parent))[1]  # type: ignore[func-returns-value]
    else:
        whom = os.getppid if place == "rendezvous" else os.getpid
        process.rendezvous = tell(whom, process.rendezvous, 30)  # its peers wait for it
    return main(argv)


def warned_before_python_listens(argv: Sequence[str]) -> int:
    """`stretto ARGV` by a launcher that holds the warning back; what comes after the run is held back again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    os.kill(os.getpid(), signal.SIGUSR1)
    code = main(argv)
    os.kill(os.getpid(), signal.SIGUSR1)
    return code


def test_a_warning_that_was_held_back_until_python_listens_is_heard(
    fresh: Fresh, options: list[str], tmp_path: Path
) -> None:
    """Catches: a warning that stays held back, and one that ends a process which has nothing left to do."""
    mark = tmp_path / "requeue"
    env = {**ENV, "STRETTO_REQUEUE": str(mark)}
    ended = fresh.run(warned_before_python_listens, [*options, "--out", str(tmp_path / "run")], env=env)
    assert (ended.code, mark.exists()) == (REQUEUE, True), ended.err
    assert f"nothing is saved; {mark} asks to be started again" in ended.err


@pytest.mark.parametrize(
    ("place", "number", "code"),
    [
        ("text", signal.SIGUSR1, REQUEUE),
        ("fork", signal.SIGUSR1, REQUEUE),
        ("rendezvous", signal.SIGTERM, REQUEUE),
        ("one rank", signal.SIGUSR1, REQUEUE),
        ("rendezvous", signal.SIGINT, 130),
    ],
)
def test_a_signal_during_the_start_ends_it_cleanly(
    fresh: Fresh, options: list[str], tmp_path: Path, place: str, number: signal.Signals, code: int
) -> None:
    """Catches: a worker without a handler yet, which the signal kills; a rank that waits for one that has left."""
    out = tmp_path / "run"
    ended = fresh.run(told_in, place, number, [*options, "--nproc", "2", "--out", str(out)], env=ENV)
    assert ended.code == code, ended.err
    said = f"stopped by {number.name} before the first step: nothing was done, nothing is saved; exit code 75"
    assert ended.err.count("\n") == ended.err.count(said) == (number != signal.SIGINT), ended.err
    assert not out.exists()
    assert ended.seconds < 15
