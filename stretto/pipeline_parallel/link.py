"""Messages between the ranks of a pipeline: posted early, never waited for by the host on a GPU.

A send or receive goes out when its action comes up in the program and is waited for where its tensor is
used. `wait` of a receive is a wait of the current stream under NCCL, and of the host under Gloo.

Messages are matched by order alone: the k-th send from a to b is the k-th receive of b from a. All ranks
follow one global order (`stretto.schedule.lower`), in which not even blocking sends deadlock; so each
message may be issued on its own, without grouping it with one that goes the other way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from stretto.pipeline_parallel.meta import MAX_DIM, TensorMeta
from stretto.world import Axis, UnderWay

# A sender may be this many messages ahead of a receiver before it waits. Enough for the transfer to overlap the
# computation, and a bound on the memory of tensors under way: Gloo does not tell that a send is over until asked
# to wait for it. Waiting is safe, because the global order needs no buffering at all.
AHEAD: Final = 4


HEADER: Final = TensorMeta((MAX_DIM + 1,), torch.int64)


@dataclass
class Link:
    """Sends and receives between this rank and the others of a pipeline axis.

    Ranks are those of the axis. `upward`, an axis of the same ranks with a communicator of its own, carries
    the messages to lower ranks: with NCCL, which works off the messages between two ranks one by one, the two
    directions then do not wait for each other. By default both directions share `axis`.
    """

    axis: Axis
    device: torch.device
    upward: Axis | None = None
    _under_way: dict[int, deque[UnderWay]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.upward is not None and self.upward.ranks != self.axis.ranks:
            raise ValueError(f"upward={self.upward} must join the ranks of {self.axis} in the same order")

    def send(self, x: Tensor, to: int) -> None:
        """Begin to send `x`; it must not be changed any more."""
        under_way = self._under_way.setdefault(to, deque())
        while under_way and under_way[0].work is not None and under_way[0].work.is_completed():
            under_way.popleft()
        if len(under_way) == AHEAD:
            under_way.popleft().take()
        x = x.contiguous()
        group = self._group("send", x, self.axis.rank, to)
        under_way.append(UnderWay(x, dist.isend(x, group=group, group_dst=to)))

    def recv(self, meta: TensorMeta, source: int) -> UnderWay:
        """Post the receive of the next tensor from `source`."""
        x = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)
        work = dist.irecv(x, group=self._group("recv", x, source, self.axis.rank), group_src=source)
        return UnderWay(x, work)

    def announce(self, meta: TensorMeta, to: int) -> None:
        """Tell rank `to` what the next tensor is; it must `expect` it."""
        self.send(torch.tensor(meta.encode(), device=self.device), to)

    def expect(self, meta: TensorMeta, source: int) -> None:
        """Wait for what `source` announces; ValueError unless it is `meta`. The host waits: not for every step.

        Back ends do not check: a tensor of another size ends the process under Gloo, or fills a part of the buffer,
        and under NCCL it hangs.
        """
        coming = TensorMeta.decode(self.recv(HEADER, source).take().tolist())
        if coming != meta:
            raise ValueError(
                f"rank {source} of {self.axis} sends {coming} to rank {self.axis.rank}, which expects {meta}: "
                "the stage's boundary is not what the stage before it puts out"
            )

    def drain(self) -> None:
        """Wait for all sends (the current stream, or under Gloo the host, waits)."""
        for under_way in self._under_way.values():
            while under_way:
                under_way.popleft().take()

    def _group(self, op: str, x: Tensor, source: int, to: int) -> ProcessGroup:
        """The communicator of a message that is about to be issued."""
        axis = self.upward if self.upward is not None and to < source else self.axis
        if axis.group is None:
            raise ValueError(f"a message from rank {source} to rank {to} over {axis}, which has one rank only")
        if axis.watch is not None:
            axis.watch(axis, op, x, (source, to))
        return axis.group
