"""Messages between the ranks of a pipeline: posted early, never waited for by the host on a GPU.

A send or receive goes out when its action comes up in the program and is waited for where its tensor is
used. `wait` of a receive is a wait of the current stream under NCCL, and of the host under Gloo.

Messages are matched by order alone: the k-th send from a to b is the k-th receive of b from a. All ranks
follow one global order (`stretto.schedule.lower`), in which not even blocking sends deadlock; so each
message may be issued on its own, without grouping it with one that goes the other way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from stretto.pipeline_parallel.meta import MAX_DIM, TensorMeta
from stretto.world import AsyncTensor, Axis, PeerMessages, Work

# A sender may be this many messages ahead of a receiver before it waits. Enough for the transfer to overlap the
# computation, and a bound on the memory of tensors in flight: Gloo does not tell that a send is over until asked
# to wait for it. Waiting is safe, because the global order needs no buffering at all.
AHEAD: Final = 4
AHEAD_BY_COPY_ENGINES: Final = 2  # of tensors that are not in a slot yet; that has as many


HEADER: Final = TensorMeta((MAX_DIM + 1,), torch.int64)


@dataclass
class Link:
    """Sends and receives between this rank and the others of a pipeline axis.

    Ranks are those of the axis. `pairs`, by (source, destination), are axes of these two ranks alone, each with a
    communicator of its own: NCCL works off what is on one communicator in order, so that neighbours and directions
    would wait for each other. What has none goes over `axis`. Where the pair of an earlier rank and a
    later one has `peer_messages`, these bring what they take, both ways.
    """

    axis: Axis
    device: torch.device
    pairs: Mapping[tuple[int, int], Axis] = field(default_factory=dict)
    _in_flight: dict[int, deque[AsyncTensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for (source, to), pair in self.pairs.items():
            if sorted(pair.ranks) != sorted((self.axis.ranks[source], self.axis.ranks[to])):
                raise ValueError(f"{pair} must join the ranks {source} and {to} of {self.axis}")

    @classmethod
    def between(cls, axis: Axis, device: torch.device, find: Callable[[str], Axis], *, ring: bool = False) -> Self:
        """With a communicator for each neighbour and direction: `find` gives the axis of a name such as `pp:0>1`."""
        here, size = axis.rank, axis.size
        near = {(here + step) % size for step in (-1, 1) if ring or 0 <= here + step < size} - {here}
        ends = [pair for other in sorted(near) for pair in ((here, other), (other, here))]
        return cls(axis, device, {(a, b): find(f"{axis.name}:{a}>{b}") for a, b in ends})

    def send(self, x: Tensor, to: int) -> None:
        """Begin to send `x`; it must not be changed any more."""
        in_flight = self._in_flight.setdefault(to, deque())
        while in_flight and in_flight[0].work is not None and in_flight[0].work.is_completed():
            in_flight.popleft()
        x = x.contiguous()
        group, place = self._group("send", x, self.axis.rank, to)
        by = self._by_copy_engines(x, to)
        while len(in_flight) >= (AHEAD if by is None else AHEAD_BY_COPY_ENGINES):
            in_flight.popleft().wait()
        work = dist.isend(x, group=group, group_dst=place) if by is None else by.send(x)
        in_flight.append(AsyncTensor(x, self.axis.timed(cast("Work", work))))

    def recv(self, meta: TensorMeta, source: int) -> AsyncTensor:
        """Post the receive of the next tensor from `source`."""
        x = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)
        group, place = self._group("recv", x, source, self.axis.rank)
        by = self._by_copy_engines(x, source)
        work = dist.irecv(x, group=group, group_src=place) if by is None else by.recv(x)
        return AsyncTensor(x, self.axis.timed(cast("Work", work)))

    def announce(self, meta: TensorMeta, to: int) -> None:
        """Tell rank `to` what the next tensor is; it must `expect` it."""
        self.send(torch.tensor(meta.encode(), device=self.device), to)

    def expect(self, meta: TensorMeta, source: int) -> None:
        """Wait for what `source` announces; ValueError unless it is `meta`. The host waits: not for every step.

        Back ends do not check: a tensor of another size ends the process under Gloo, or fills a part of the buffer,
        and under NCCL it hangs.
        """
        coming = TensorMeta.decode(self.recv(HEADER, source).wait().tolist())
        if coming != meta:
            raise ValueError(
                f"rank {source} of {self.axis} sends {coming} to rank {self.axis.rank}, which expects {meta}: "
                "the stage's boundary is not what the stage before it puts out"
            )

    def drain(self) -> None:
        """Wait for all sends (the current stream, or under Gloo the host, waits)."""
        for in_flight in self._in_flight.values():
            while in_flight:
                in_flight.popleft().wait()

    def _by_copy_engines(self, x: Tensor, other: int) -> PeerMessages | None:
        """What brings a message to or from this rank, or None. Both of its ranks know its size."""
        pair = self.pairs.get((min(self.axis.rank, other), max(self.axis.rank, other)))
        by = None if pair is None else pair.peer_messages
        return by if by is not None and by.takes(x.nbytes) else None

    def _group(self, op: str, x: Tensor, source: int, to: int) -> tuple[ProcessGroup, int]:
        """The communicator of a message that is about to be issued, and the place of the other rank in it."""
        axis = self.pairs.get((source, to), self.axis)
        if axis.group is None:
            raise ValueError(f"a message from rank {source} to rank {to} over {axis}, which has one rank only")
        ends = axis.ranks.index(self.axis.ranks[source]), axis.ranks.index(self.axis.ranks[to])
        if axis.observer is not None:
            axis.observer(axis, op, x, ends)
        return axis.group, ends[op == "send"]
