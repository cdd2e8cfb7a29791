"""Sums whose parts travel in a narrower dtype than they are added in: rounded once, added in rank order."""

from __future__ import annotations

import torch
from torch import Tensor

from stretto.collectives import all_gather_into, all_to_all_into
from stretto.world import Axis


class WireSum:
    """The sum of `x` [n] over the axis, begun: each rank adds a part of it, its own contribution unrounded.

    `wait` puts this rank's part in `out`, or adds it; without `out` the whole sum is in `x`, for which the parts are
    rounded once more and gathered.
    """

    def __init__(
        self, x: Tensor, axis: Axis, wire: torch.dtype, out: Tensor | None = None, *, add: bool = False
    ) -> None:
        self.x, self.axis, self.out, self.add = x, axis, out, add
        self.part = -(-x.numel() // axis.size)
        self.sent = x.new_zeros(self.part * axis.size, dtype=wire)
        self.sent[: x.numel()] = x
        self.got = torch.empty_like(self.sent)
        self.work = all_to_all_into(self.got, self.sent, axis)

    def wait(self) -> None:
        """What follows sees the sum."""
        self.work.wait()
        begin = self.axis.rank * self.part
        own = self.x[begin : begin + self.part]
        total = self.x.new_zeros(self.part)
        for rank in range(self.axis.size):
            if rank == self.axis.rank:
                total[: len(own)] += own
            else:
                total += self.got[rank * self.part : (rank + 1) * self.part]
        if self.out is not None:
            self.out.add_(total) if self.add else self.out.copy_(total)
            return
        all_gather_into(self.sent, total.to(self.sent.dtype), self.axis).wait()
        self.x.copy_(self.sent[: self.x.numel()])

    def is_completed(self) -> bool:
        """Whether the parts are here."""
        return self.work.is_completed()
