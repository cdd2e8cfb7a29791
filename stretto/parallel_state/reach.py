"""Whether the ranks of a group reach each other's memory, and that through which they do."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

from stretto.parallel_state.plan import BY_COPY_ENGINES, PlannedGroup
from stretto.peer_buffer import CopyEngineBuffer
from stretto.peer_memory import CopyEngineMemory
from stretto.peer_messages import CopyEngineMessages
from stretto.store import LostError, TimedStore
from stretto.world import World

WAIT_SECONDS = 60.0
"""For the other ranks of a group, which have just made it together."""


@dataclass(frozen=True)
class Reach:
    """What a group has beside its collectives."""

    buffer: CopyEngineBuffer | None = None
    memory: CopyEngineMemory | None = None
    messages: CopyEngineMessages | None = None

    @property
    def nbytes(self) -> int:
        """Of this rank's device memory."""
        return sum(each.nbytes for each in self._all)

    def release(self) -> None:
        """Let nothing of this rank wait for the others any more. Raises RuntimeError on a device that has failed."""
        for each in self._all:
            each.release()

    @property
    def _all(self) -> list[CopyEngineBuffer | CopyEngineMemory | CopyEngineMessages]:
        return [each for each in (self.buffer, self.memory, self.messages) if each is not None]


def open_reach(world: World, groups: Mapping[PlannedGroup, ProcessGroup], store: Store) -> dict[PlannedGroup, Reach]:
    """Peer buffers and memory of those groups that are to have some, and whose ranks all reach each other.

    All members of a group come to the same answer; `store` is for them to find it.
    """
    return {
        planned: Reach(
            None if (size := planned.options.peer_buffer) is None else CopyEngineBuffer(group, world.device, size),
            CopyEngineMemory(group, world.device) if planned.options.peer_memory else None,
            None if (size := planned.options.peer_messages) is None else CopyEngineMessages(group, world.device, size),
        )
        for planned, group in groups.items()
        if any(getattr(planned.options, option) for option in BY_COPY_ENGINES) and _within_reach(world, planned, store)
    }


def _within_reach(world: World, planned: PlannedGroup, store: Store) -> bool:
    """Whether all ranks of a group are on one host, and each GPU reads the memory of the others."""
    place = world.device.index or 0
    found = _exchange(store, f"{planned}/host", world.rank, planned.ranks, f"{place} {_host()}")
    hosts = [said.partition(" ")[2] for said in found]
    reached = len(set(hosts)) == 1 and all(
        peer == place or (peer < torch.cuda.device_count() and torch.cuda.can_device_access_peer(place, peer))
        for peer in (int(said.partition(" ")[0]) for said in found)
    )
    return set(_exchange(store, f"{planned}/reach", world.rank, planned.ranks, str(reached))) == {"True"}


def _exchange(store: Store, key: str, rank: int, ranks: tuple[int, ...], said: str) -> list[str]:
    """What each of the ranks says."""
    timed = TimedStore(store)
    timed.set(f"{key}/{rank}", said)
    for each in ranks:
        if not timed.wait(f"{key}/{each}", WAIT_SECONDS):
            raise LostError(f"rank {each} did not say on which host it is within {WAIT_SECONDS:g} s")
    return [said.decode(errors="replace") for said in timed.multi_get([f"{key}/{each}" for each in ranks])]


def _host() -> str:
    """Unlike that of any other host: names alone are not."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
