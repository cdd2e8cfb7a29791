"""How far sends run ahead, when their tensors are let go, and which communicator carries them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stretto.pipeline_parallel import Link, TensorMeta
from stretto.pipeline_parallel.link import AHEAD
from stretto.world import Axis

pytestmark = pytest.mark.gloo


@dataclass
class Sent:
    """A send that completes when it is told to, or is waited for."""

    group: Any
    completed: bool = False
    waited: bool = False

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        self.waited = self.completed = True


@dataclass
class Wire:
    works: list[Sent] = field(default_factory=list)

    def post(self, _: torch.Tensor, group: Any, **__: int) -> Sent:
        self.works.append(Sent(group))
        return self.works[-1]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire()
    monkeypatch.setattr(dist, "isend", wire.post)
    monkeypatch.setattr(dist, "irecv", wire.post)
    return wire


def link(rank: int, two_ways: bool = False) -> Link:
    ranks = (0, 1, 2)
    down, up = (Axis(name, rank, ranks, name) for name in ("down", "up"))  # type: ignore[arg-type]
    return Link(down, torch.device("cpu"), up if two_ways else None)


def test_sends_run_ahead_by_so_many_and_no_more(wire: Wire) -> None:
    sender = link(0)
    for n in range(1, 10):
        sender.send(torch.zeros(1), to=1)
        assert [w.waited for w in wire.works] == [k < n - AHEAD for k in range(n)]
    sender.send(torch.zeros(1), to=2)
    assert sum(w.waited for w in wire.works) == 9 - AHEAD, "another receiver, another window"


def test_completed_sends_are_let_go_without_waiting(wire: Wire) -> None:
    sender = link(0)
    for _ in range(10):
        sender.send(torch.zeros(1), to=1)
        wire.works[-1].completed = True
    assert not any(w.waited for w in wire.works)


def test_drain_waits_for_all(wire: Wire) -> None:
    sender = link(1)
    for to in (0, 2, 0):
        sender.send(torch.zeros(1), to=to)
    sender.drain()
    assert all(w.waited for w in wire.works)


@pytest.mark.parametrize(("two_ways", "expected"), [(False, ["down"] * 4), (True, ["down", "up", "down", "up"])])
def test_each_way_has_its_communicator(wire: Wire, two_ways: bool, expected: list[str]) -> None:
    middle, meta = link(1, two_ways), TensorMeta((1,), torch.float32)
    middle.send(torch.zeros(1), to=2)
    middle.send(torch.zeros(1), to=0)
    middle.recv(meta, source=0)
    middle.recv(meta, source=2)
    assert [w.group for w in wire.works] == expected


def test_a_message_over_one_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"from rank 0 to rank 1 over pp\[0\], which has one rank only"):
        Link(Axis.single("pp"), torch.device("cpu")).send(torch.zeros(1), to=1)
