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
    place: int = 0
    completed: bool = False
    waited: bool = False

    def is_completed(self) -> bool:
        return self.completed

    def wait(self) -> None:
        self.waited = self.completed = True


@dataclass
class Wire:
    works: list[Sent] = field(default_factory=list)

    def post(self, _: torch.Tensor, group: Any, **ends: int) -> Sent:
        self.works.append(Sent(group, *ends.values()))
        return self.works[-1]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire()
    monkeypatch.setattr(dist, "isend", wire.post)
    monkeypatch.setattr(dist, "irecv", wire.post)
    return wire


def link(rank: int, pairs: bool = False) -> Link:
    """Of three ranks; each communicator is known by its name."""

    def find(name: str) -> Axis:
        ranks = tuple(sorted(int(place) for place in name.removeprefix("pp:").split(">")))
        return Axis(name, ranks.index(rank), ranks, name)  # type: ignore[arg-type]

    axis = Axis("pp", rank, (0, 1, 2), "pp")  # type: ignore[arg-type]
    return Link.between(axis, torch.device("cpu"), find) if pairs else Link(axis, torch.device("cpu"))


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


@pytest.mark.parametrize(
    ("pairs", "expected", "places"),
    [(False, ["pp"] * 4, [2, 0, 0, 2]), (True, ["pp:1>2", "pp:1>0", "pp:0>1", "pp:2>1"], [1, 0, 0, 1])],
)
def test_each_neighbour_and_direction_has_its_communicator(
    wire: Wire, pairs: bool, expected: list[str], places: list[int]
) -> None:
    """Catches: one communicator of all, on which what goes to one neighbour waits for the other; a place of the whole
    axis where that in the pair is meant."""
    middle, meta = link(1, pairs), TensorMeta((1,), torch.float32)
    middle.send(torch.zeros(1), to=2)
    middle.send(torch.zeros(1), to=0)
    middle.recv(meta, source=0)
    middle.recv(meta, source=2)
    assert [w.group for w in wire.works] == expected
    assert [w.place for w in wire.works] == places


def test_a_message_over_one_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"from rank 0 to rank 1 over pp\[0\], which has one rank only"):
        Link(Axis.single("pp"), torch.device("cpu")).send(torch.zeros(1), to=1)
