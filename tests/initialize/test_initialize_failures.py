"""Which error says no more than that a peer is gone, and how those are told that name who it is.

Faults to catch: any text with the word timeout, or an error of a file, that is taken for a lost peer; a rank that
lost another one as torchrun's root cause.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from stretto.checkpoint import CheckpointError
from stretto.collective_trace import CollectiveError, PeerStoppedError
from stretto.collective_trace.alive import me
from stretto.initialize.failures import Failure, PeerFailedError, PeersSilentError, is_consequence
from stretto.initialize.roll_call import Silent
from stretto.initialize.torchrun import record
from stretto.layout.ranks import ranges
from stretto.store import StoreLostError

pytestmark = pytest.mark.gloo  # no processes, but errors of torch

GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:9106."),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError(f"{GLOO}unbound_buffer.cc:129] Timed out waiting 5000ms for send operation to complete"),
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
        dist.DistStoreError("wait timeout after 3000ms, keys: /tp/0"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        StoreLostError("the rendezvous store did not answer"),
        PeerStoppedError("rank 3 has stopped this run"),
    ],
    ids=str,
)
def test_what_back_ends_and_stores_say_of_a_peer(error: Exception) -> None:
    assert is_consequence(error)
    assert not Failure.of(1, error).own


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("loading /runs/timeout-3/model failed\nrank 0: the file is damaged"),
        RuntimeError("timeout-3: not a directory of tokens"),
        RuntimeError("read error: my_data/connection reset.bin"),
        OSError(5, "Input/output error", "/data/timeout/connection reset"),
        FileNotFoundError(2, "No such file", "socket error"),
        TimeoutError("the tokenizer timed out"),
        ValueError("connection closed"),
    ],
    ids=str,
)
def test_what_merely_has_such_words_is_the_rank_s_own(error: Exception) -> None:
    assert not is_consequence(error)
    assert Failure.of(1, error).own


def test_a_table_in_which_ranks_are_unknown_gives_way() -> None:
    assert Failure.of(1, CollectiveError("a table")).consequence is False
    assert Failure.of(1, CollectiveError("a table", silent=(2,))).consequence


def test_the_silent_rank_is_the_one_that_is_told_of_wherever_it_is_repeated() -> None:
    silent = PeersSilentError((2, 3), "2 ranks do not answer", "in step 7")
    first = Failure.decode(Failure.of(0, silent).encode())
    assert (first.rank, first.silent, first.phase) == (2, True, "in step 7")
    assert first.text == "2 ranks do not answer (noticed in step 7)\n"
    again = Failure.of(1, PeerFailedError(first, "in step 8"))
    assert (again.rank, again.text, again.consequence, again.silent) == (2, first.text, True, True)
    assert str(PeerFailedError(first)) == first.text


def test_silent_ranks_are_named_by_host() -> None:
    assert "rank 4 does not answer: its process (pid 9 on far) is stopped or dead, or its host" in str(
        Silent((4,), ("far/9",))
    )
    host, _, pid = me().rpartition("/")
    assert f"(pid {pid} on {host}) is stopped or dead, or its host" in str(Silent((4,), (me(),)))
    many = str(Silent((4, 5, 6, 9), ("b/1", "b/2", "b/3", "")))
    assert many.startswith("4 ranks do not answer (on b: 4-6; on an unknown host: 9)")
    assert ranges(list(range(0, 400, 2))).endswith(", 122, .., 398")


@pytest.mark.parametrize(
    ("of_1", "root"),
    [
        (ValueError("the fault of rank 1"), "ValueError: the fault of rank 1"),
        (None, "Signal 9 (SIGKILL) received by PID 101"),
    ],
    ids=["raised", "killed"],
)
def test_the_root_cause_of_torchrun_is_not_who_only_lost_a_peer(
    of_1: Exception | None, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times are whole seconds, and of two of the same second it takes the rank that it saw end first."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    lost = PeerFailedError(Failure(1, "x", "the text of rank 1\n", consequence=False))
    silent = PeersSilentError((1,), "rank 1 does not answer")
    for rank, error in enumerate((lost if of_1 else silent, of_1)):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        if error is not None:
            record(rank, error)
            record(rank, KeyError("a later one"))  # the first record of a process stays
    failures = {
        rank: ProcessFailure(rank, 100 + rank, 1 if of_1 or rank == 0 else -9, str(tmp_path / f"{rank}.json"))
        for rank in (0, 1)
    }
    report = ChildFailedError("train.py", failures).format_msg()
    assert report.partition("Root Cause (first observed failure):")[2].rstrip(" =\n").endswith(root)


def test_a_table_blames_nobody_on_the_ranks_that_only_hear_of_it() -> None:
    """The rank that found out has not failed."""
    failure = Failure.decode(Failure.of(0, CollectiveError("call 4 of tp[0-1] can never be joined")).encode())
    assert str(PeerFailedError(failure)) == "call 4 of tp[0-1] can never be joined\n"
