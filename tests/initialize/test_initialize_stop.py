"""The flag that signals and a time limit raise."""

from __future__ import annotations

import os
import signal

import pytest

from stretto.initialize.stop import REQUEUE, StopFlag, Stopped

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGUSR1, REQUEUE)])
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


def test_a_second_ctrl_c_insists() -> None:
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_ctrl_c_that_a_launcher_sends_twice_is_one() -> None:
    with StopFlag(impatient=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.reason, stop.ordered, stop.exit_code) == ("SIGINT", True, 0)


def test_the_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="of the body"), StopFlag():
        raise ValueError("of the body")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_somebody_asks_a_signal_ends_the_process_once(number: signal.Signals) -> None:
    """Catches: a second signal that breaks into the way out of the first."""
    with StopFlag(starting=True) as stop:
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert (caught.value.code, caught.value.number) == (REQUEUE, number)
        stop.started()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    with StopFlag(starting=True), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
