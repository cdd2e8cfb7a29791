"""Local workers: how they start, how one's failure ends all, and what signals do."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import time

import launch_programs as ranks
import pytest
import stop_programs as stops

from stretto.testing import Ended, Fresh

pytestmark = pytest.mark.gloo

ENV = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def run(fresh: Fresh, what: str, nproc: int) -> Ended:
    return fresh.run(ranks.main, what, nproc, env=ENV)


def test_ranks_meet_as_under_torchrun(fresh: Fresh) -> None:
    ended = run(fresh, "add", 4)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"sum 4 source stretto device cpu threads {max(1, len(os.sched_getaffinity(0)) // 4)}\n"
    assert ended.seconds < 5


def test_a_world_can_be_left_and_entered_again(fresh: Fresh) -> None:
    ended = run(fresh, "twice", 3)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("sum 3") == 2


def test_the_traceback_of_the_faulty_rank_comes_last(fresh: Fresh) -> None:
    ended = run(fresh, "raise_on_two", 4)
    assert ended.code == 1
    assert ended.err.endswith("ValueError: the fault of rank 2\n")
    assert ended.err.count("Traceback") == 1
    assert "Rank 2 of 4 failed:" in ended.err


def test_one_failure_ends_all_within_15_s_even_ranks_that_ignore_sigterm(fresh: Fresh) -> None:
    """P15. Catches: waiting for ranks that compute, or trusting SIGTERM."""
    ended = run(fresh, "raise_while_others_compute", 3)
    assert ended.code == 1
    assert ended.err.endswith("ValueError: the fault of rank 2\n")
    assert ended.seconds < 15


@pytest.mark.parametrize("what", ["raise_on_one", "raise_while_another_is_stuck"])
def test_without_a_launcher_too_all_end_and_show_the_first_cause_last(fresh: Fresh, what: str, port: int) -> None:
    """P15 under a launcher that does nothing. Catches: a rank that nobody tells, or that shows its own loss only."""
    ended = fresh.run(ranks.both_by_hand, what, port, env=ENV)
    assert ended.code == 0
    # Two processes write at once, and a line and its end are not one write.
    assert ended.err.rstrip("\n").endswith("ValueError: the fault of rank 1")
    assert ended.err.count("ValueError: the fault of rank 1") == 2  # of each process, its own last words
    assert ended.seconds < 15


def test_a_rank_that_is_killed_is_named(fresh: Fresh) -> None:
    ended = run(fresh, "killed", 3)
    assert ended.code == 128 + signal.SIGKILL
    assert "Rank 1 of 3 was ended by SIGKILL" in ended.err.splitlines()[-1]
    assert ended.seconds < 15


@pytest.mark.parametrize(
    ("where", "victim"),
    [
        pytest.param("rendezvous", 0, marks=pytest.mark.nightly),
        pytest.param("default group", 2, marks=pytest.mark.nightly),
        ("groups", 2),
        pytest.param("groups", 0, marks=pytest.mark.nightly),
        pytest.param("after the last save", 2, marks=pytest.mark.nightly),
        ("after all", 0),
    ],
)
def test_a_rank_that_is_stopped_is_named_alone_in_every_phase(fresh: Fresh, where: str, victim: int) -> None:
    """Catches: a raw error of the store, an accusation of who waits, and a command that never ends."""
    ended = fresh.run(stops.main, where, victim, env=ENV)
    assert ended.code in (1, 128 + signal.SIGKILL)
    said = ended.err.splitlines()
    named = rf"rank {victim} does not answer: its process \(pid \d+ on .*\) is stopped|Rank {victim} of 4 was stopped"
    assert re.match(named, said[-1]), ended.err
    assert "Traceback" not in ended.err
    assert sum(" does not answer" in line or " was stopped" in line for line in said) == 1, ended.err
    assert ended.seconds < 20


def test_the_same_exit_code_of_all_is_the_exit_code_without_a_word(fresh: Fresh) -> None:
    ended = run(fresh, "usage", 2)
    assert (ended.code, ended.out, ended.err) == (2, "", "")


def test_a_target_without_exit_code_is_an_error_that_stays_in_the_worker(fresh: Fresh) -> None:
    ended = run(fresh, "nothing", 2)
    assert (ended.code, ended.out) == (1, "")
    assert "returned None: it must return its exit code, 0 for success" in ended.err


def test_ranks_may_run_programs(fresh: Fresh) -> None:
    ended = run(fresh, "children", 2)
    assert (ended.code, ended.out, ended.err) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_every_rank_once(fresh: Fresh, number: signal.Signals) -> None:
    program = fresh.start(ranks.main, "count_signals", 3, env=ENV)
    program.until("ready", 3)
    program.signal(number)
    ended = program.wait()
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()[3:]) == [f"rank {rank} saw ['{number.name}']" for rank in range(3)]


def test_ctrl_c_on_a_terminal_reaches_every_rank_once(fresh: Fresh) -> None:
    """Catches: workers in the terminal's foreground group, which get it from there and from us."""
    keyboard, terminal = pty.openpty()
    program = fresh.start(ranks.main, "count_signals", 2, env=ENV, terminal=terminal)
    program.until("ready", 2)
    os.write(keyboard, b"\x03")
    ended = program.wait()
    os.close(keyboard)
    os.close(terminal)
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()[2:]) == [f"rank {rank} saw ['SIGINT']" for rank in range(2)]


def test_two_sigints_at_once_are_one(fresh: Fresh) -> None:
    """Catches: ranks that are killed by one Ctrl-C which a launcher, or a key, sends twice."""
    program = fresh.start(ranks.main, "count_signals", 2, env=ENV)
    program.until("ready", 2)
    program.signal(signal.SIGINT)
    time.sleep(0.05)  # two at the very same time are one to the kernel
    program.signal(signal.SIGINT)
    ended = program.wait()
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()[2:]) == [f"rank {rank} saw ['SIGINT']" for rank in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel to be told")
def test_workers_end_with_their_launcher(fresh: Fresh) -> None:
    ended = run(fresh, "orphan", 2)  # returns when the last worker has ended
    assert ended.code == -signal.SIGKILL
    assert ended.seconds < 10


def test_under_a_launcher_the_target_runs_as_its_rank(fresh: Fresh) -> None:
    """Catches: a job of its own for each rank that torchrun has started, all of which write one output."""
    placed = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ended = fresh.run(ranks.main, "place", 4, env=ENV | placed)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "rank 0 of 1, by torchrun\n"
