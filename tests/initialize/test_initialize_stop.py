"""The flag that signals and a time limit raise.

Faults to catch: a terminal that closes and has the run started again; a run under nohup that ends with its terminal.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from stretto.initialize.stop import MARK, REQUEUE, Interrupts, StopFlag, Stopped, ask_again

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGUSR1, REQUEUE)],
)
def test_a_signal_raises_the_flag_and_nothing_else(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert (stop(), stop.reason, stop.exit_code) == (False, "", 0)
        os.kill(os.getpid(), number)
        assert (stop(), stop.reason, stop.exit_code) == (True, number.name, code)
    assert signal.getsignal(number) is before


def test_a_time_limit_asks_to_be_started_again() -> None:
    now = [100.0]
    stop = StopFlag(after=60, clock=lambda: now[0])
    now[0] += 59.9
    assert not stop()
    now[0] += 0.1
    assert (stop(), stop.reason, stop.exit_code) == (True, "the time limit of 60 s", REQUEUE)


def test_an_order_to_leave_overrides_the_warning_before_it() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, stop.exit_code) == ("SIGTERM", 0)


def test_a_second_ctrl_c_insists_but_within_a_second_it_is_the_first() -> None:
    """Catches: a run that is killed without a save, since a launcher sent one Ctrl-C twice."""
    now = [100.0]
    with StopFlag(clock=lambda: now[0]) as stop:
        for then in (100.0, 100.0, 100.9):
            now[0] = then
            os.kill(os.getpid(), signal.SIGINT)
            assert (stop.reason, stop.ordered, stop.exit_code) == ("SIGINT", True, 0)
        now[0] = 101.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupts_are_counted_by_the_second() -> None:
    now = [0.0]
    interrupts = Interrupts(lambda: now[0])
    counted = []
    for now[0] in (0.0, 0.5, 0.99, 1.0, 1.5, 2.1):
        interrupts()
        counted.append(interrupts.count)
    assert counted == [1, 1, 1, 2, 2, 3]


def test_a_mark_asks_instead_of_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: 75 on ranks whose launcher ends the others for it; a mark by more ranks than the one that is asked."""
    monkeypatch.delenv(MARK, raising=False)
    assert ask_again(leave_mark=True) == (REQUEUE, "exit code 75")
    mark = tmp_path / "requeue"
    monkeypatch.setenv(MARK, str(mark))
    assert ask_again(leave_mark=False) == (0, str(mark))
    assert not mark.exists()
    assert ask_again(leave_mark=True) == (0, str(mark))
    assert mark.exists()


def test_a_mark_that_cannot_be_left_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(MARK, "/proc/no/such/requeue")
    assert ask_again(leave_mark=True) == (REQUEUE, "exit code 75")
    assert "/proc/no/such/requeue cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "marks"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_before_the_first_step_only_a_warning_leaves_the_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, marks: bool
) -> None:
    """Catches: a rank that another's failure ended with SIGTERM, which would have the failure started again."""
    monkeypatch.setenv(MARK, str(tmp_path / "requeue"))
    assert Stopped(number).say(rank=1) == REQUEUE
    assert (tmp_path / "requeue").exists() == marks


def test_a_hang_up_that_is_ignored_stays_so() -> None:
    """Catches: a run under `nohup` that ends with the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="of the body"), StopFlag():
        raise ValueError("of the body")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_before_somebody_asks_a_signal_ends_the_process_once(number: signal.Signals) -> None:
    """Catches: a second signal that breaks into the way out of the first."""
    with StopFlag(starting=True) as stop:
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert (caught.value.code, caught.value.number) == (REQUEUE, number)
        stop.started()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == ("SIGTERM" if number == signal.SIGUSR1 else number.name)
    with StopFlag(starting=True), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
