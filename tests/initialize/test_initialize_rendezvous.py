"""Ranks that cannot meet say why, on every rank, in time, with one message."""

from __future__ import annotations

import os
import random
import socket
import time

import pytest
import torch
import torch.distributed as dist

from stretto.initialize import RendezvousError, initialize
from stretto.initialize.environment import Launch
from stretto.initialize.rendezvous import _connect, rendezvous
from stretto.layout.ranks import ranges
from stretto.testing import Fresh, Pool
from stretto.world import World

pytestmark = pytest.mark.gloo


def message(launch: Launch, timeout: float) -> tuple[str, float]:
    """What a rank says that meets with this launch: nothing when it met."""
    began = time.monotonic()
    try:
        with rendezvous(launch, timeout=timeout):
            return "", time.monotonic() - began
    except RendezvousError as error:
        return str(error), time.monotonic() - began


def meet_as(world: World, launches: list[Launch], timeout: float) -> tuple[str, float]:
    return message(launches[world.rank], timeout)


def launches(port: int, ranks: list[int], sizes: list[int]) -> list[Launch]:
    return [Launch("test", rank, size, master_port=port) for rank, size in zip(ranks, sizes, strict=True)]


def test_all_there(pool: Pool, port: int) -> None:
    assert [text for text, _ in pool.run(4, meet_as, launches(port, [0, 1, 2, 3], [4] * 4), 20.0)] == [""] * 4


def test_a_missing_rank_is_named_on_all_others(pool: Pool, port: int) -> None:
    for text, seconds in pool.run(3, meet_as, launches(port, [0, 1, 3], [5] * 3), 1.0):
        assert "3 of 5 ranks arrived within 1 s; missing: 2, 4. Arrived: 3 on" in text
        assert seconds < 4


def test_another_world_size_is_rejected_at_once_on_all_ranks(pool: Pool, port: int) -> None:
    for text, seconds in pool.run(3, meet_as, launches(port, [0, 1, 2], [3, 3, 8]), 30.0):
        assert "rank 2" in text
        assert "was told of 8 ranks in all, but rank 0 of 3" in text
        assert seconds < 5


def test_two_processes_of_one_rank_are_both_named(pool: Pool, port: int) -> None:
    for text, seconds in pool.run(3, meet_as, launches(port, [0, 1, 1], [3] * 3), 30.0):
        assert "two processes came as rank 1: host" in text
        assert text.count("pid") == 2
        assert seconds < 5


def test_a_port_in_use_is_named_with_a_way_out() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        text, seconds = message(Launch("test", 0, 2, master_port=port), 5.0)
    assert f"port {port}" in text
    assert "in use" in text
    assert "MASTER_PORT" in text
    assert seconds < 2


def test_a_host_that_does_not_answer(port: int) -> None:
    text, seconds = message(Launch("test", 1, 2, master_port=port), 1.0)
    assert f"rank 1: nothing answered at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} within 1 s" in text
    assert seconds < 3


def test_a_name_that_does_not_resolve(port: int) -> None:
    text, seconds = message(Launch("test", 1, 2, master_addr="no-such-host.invalid", master_port=port), 1.0)
    assert "rank 1: the name MASTER_ADDR=no-such-host.invalid did not resolve within 1 s" in text
    assert seconds < 10


def test_a_name_service_that_does_not_answer(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a rank that waits for the time-outs of the name service, in place of its own."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(8))
    text, seconds = message(Launch("test", 1, 2, master_addr="slow", master_port=port), 1.0)
    assert "the name MASTER_ADDR=slow did not resolve within 1 s (the name service does not answer)" in text
    assert seconds < 5


def test_a_server_is_reached_by_the_address_at_which_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` often has ::1 before 127.0.0.1. Catches: only the first, or the last, address that is tried."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        good = (socket.AF_INET, socket.SOCK_STREAM, 0, "", server.getsockname())
        rejected = (*good[:4], ("127.0.0.1", 1))
        for found in ([rejected, good], [good, rejected]):
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found, **__: found)
            _connect("both", 1, time.monotonic() + 1)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [rejected])
        with pytest.raises(ConnectionRefusedError):
            _connect("none", 1, time.monotonic() + 1)


def test_something_else_that_listens_on_the_port() -> None:
    """A server that never speaks: a login node's, another framework's."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        text, seconds = message(Launch("test", 1, 2, master_port=other.getsockname()[1]), 2.0)
    assert "does not speak as a rendezvous store" in text
    assert seconds < 15


def test_ranks_in_a_row_are_written_as_one() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""


def leave(device: str) -> int:
    """Process-wide settings during a run and after it."""
    threads = torch.get_num_threads()
    drawn = random.getstate(), torch.get_rng_state()
    with initialize(threads=threads + 1, deterministic=True, seed=7, env={}) as world:
        assert (world.size, world.backend, world.source) == (1, "none", "python")
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.get_num_threads() == threads + 1
        first = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(first, torch.rand(3))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert torch.get_num_threads() == threads
    assert random.getstate() == drawn[0]
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert not dist.is_initialized()
    return 0


def test_settings_are_put_back(fresh: Fresh) -> None:
    ended = fresh.run(leave, "cpu")
    assert (ended.code, ended.err) == (0, "")
