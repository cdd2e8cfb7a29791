"""What is read off the records of ranks: bytes on the wire, where ranks part ways, and whether a process lives."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from stretto.collective_trace import CollectiveCall, Recorder, Volume, divergences, volumes
from stretto.collective_trace.alive import me, state
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.tensor_parallel import copy_to, gather_sequence
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

RANKS = (0, 1, 2, 3)

# Of a ring of 4 ranks, for 96 bytes that a rank puts in: chunks of 24, of which each rank sends one in each round.
SENT = {
    "all_reduce": 6 * 24,  # 3 rounds of sums, 3 in which they go round
    "all_reduce_max": 6 * 24,
    "all_gather": 3 * 96,  # its own, and those of two others
    "reduce_scatter": 3 * 24,
    "all_to_all": 3 * 24,  # all but its own
    "broadcast from 2": 3 * 96 / 4,  # three of four ranks pass the whole on
    "recv": 0,
    "end of the run": 0,
}


def call(op: str, number: int, *shape: int, channel: str = "dp[0-3]", ranks: tuple[int, ...] = RANKS) -> CollectiveCall:
    return CollectiveCall("dp", channel, ranks, number, op, shape, "float32", 96, f"{op}.py:{number}")


@pytest.mark.parametrize(("op", "sent"), SENT.items())
def test_a_rank_of_four_sends_what_a_ring_sends(op: str, sent: float) -> None:
    assert call(op, 0).wire_bytes == sent


def test_a_message_is_sent_once_and_received_for_nothing() -> None:
    ends = {"channel": "pp[0,4] 0->4", "ranks": (0, 4)}
    there, here = call("send", 0, 24, **ends), call("recv", 0, 24, **ends)  # type: ignore[arg-type]
    assert (there.wire_bytes, here.wire_bytes) == (96, 0)
    assert volumes([there, here, there]) == {("dp", "send"): Volume(2, 192)}
    assert divergences({0: [there], 4: [here]}) == ()


def test_ranks_that_do_the_same_do_not_differ() -> None:
    """Wherever each record begins: those that keep the newest calls begin at different ones."""
    calls = [call("all_reduce", 0, 8), call("all_gather", 1, 8), call("all_reduce", 2, 3)]
    assert divergences({rank: calls[rank % 3 :] for rank in RANKS}) == ()
    assert divergences({0: calls, 1: []}) != ()  # an empty record is one of a rank that did nothing
    assert divergences({0: calls}) == ()  # of the others nothing is known


@pytest.mark.parametrize(
    "other",
    [call("all_gather", 1, 8), call("all_reduce", 1, 4, 2)],
    ids=["another operation", "another shape"],
)
def test_the_first_difference_of_each_channel_is_told(other: CollectiveCall) -> None:
    """Not those that follow from it; the one odd rank is marked, and its line shown."""
    same = [call("all_reduce", number, 8) for number in range(4)]
    differs = [same[0], other, call("all_gather", 2, 8), same[3]]
    quiet = [call("all_reduce", 0, 8, channel="tp[0-1]", ranks=(0, 1))]
    (found,) = divergences({0: same + quiet, 1: same + quiet, 2: differs, 3: same})
    assert (found.channel, found.number, found.calls[2], found.calls[3]) == ("dp[0-3]", 1, other, same[1])
    assert [line.split()[0] for line in str(found).splitlines() if "DIFFERS" in line] == ["2"]
    assert other.site in str(found)


def test_a_call_that_a_rank_lacks_at_the_end_is_missing() -> None:
    same = [call("all_reduce", number, 8) for number in range(3)]
    (found,) = divergences({0: same, 1: same, 2: same[:2], 3: same})
    assert (found.number, found.calls[2]) == (2, None)
    assert [line.split()[0] for line in str(found).splitlines() if "MISSING" in line] == ["2"]


def test_a_process_runs_is_stopped_or_is_dead(tmp_path: Path) -> None:
    """Under a name that reads like the end of its own and another state. A zombie is dead, as is who is not there."""
    assert state(me()) == ""
    sleep = tmp_path / "x) T (y"
    sleep.symlink_to(shutil.which("sleep") or "")
    child = subprocess.Popen([str(sleep), "60"])
    host = me().rpartition("/")[0]
    name = f"{host}/{child.pid}"
    try:
        comes_to(name, "")
        os.kill(child.pid, signal.SIGSTOP)
        comes_to(name, "stopped")
        assert state(f"{host}-other/{child.pid}") == ""
    finally:
        child.kill()
    comes_to(name, "dead")  # nobody has waited for it yet
    child.wait()
    assert state(name) == "dead"


def test_a_call_in_a_backward_names_who_called_it_and_whose_backward_it_is(pool: Pool) -> None:
    """Not torch's own `backward`, and not what the function itself calls."""
    for calls in pool.run(2, _forward_and_backward):
        assert [call.op for call in calls] == ["all_gather", "all_reduce", "reduce_scatter"]
        here = {call.site.partition(":")[0] for call in calls}
        assert here == {__file__}
        assert [call.site.partition(" ")[2] for call in calls] == ["", "(_CopyTo.backward)", "(_AllGather.backward)"]


def _forward_and_backward(world: World) -> list[CollectiveCall]:
    recorder = Recorder()
    with ParallelState.build(Layout.of(tp=2), world, tracer=recorder) as state:
        recorder.clear()
        x = torch.ones(4, requires_grad=True)
        tp = state.axis("tp")
        copy_to(gather_sequence(x, tp), tp).sum().backward()
        return recorder.calls


def comes_to(name: str, expected: str) -> None:
    """A signal takes a moment to arrive."""
    deadline = time.monotonic() + 10
    while state(name) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(name) == expected
