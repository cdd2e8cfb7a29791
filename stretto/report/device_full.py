"""What is said when a device's memory is full: what was held, what was foreseen, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stretto.arguments import Arguments
from stretto.estimate import fullest, rank_ledger
from stretto.report.leaner import leaner

GIB = 2**30
ROOM = 0.94
"""The part of a device that a ledger may fill: the rest is the allocator's and the back ends'."""
MOST = 3


class DeviceFullError(RuntimeError):
    """A rank's device has no more memory."""


@dataclass(frozen=True)
class Held:
    """Bytes of a device as it ran full."""

    allocated: int
    """In tensors."""
    reserved: int
    """Taken from the device by the allocator."""
    total: int
    """What the device has."""

    @classmethod
    def now(cls, device: torch.device) -> Held:
        """As the allocator says."""
        stats = torch.cuda.memory_stats(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return cls(stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"], total)


def device_full(args: Arguments, rank: int, held: Held, what: str) -> str:
    """Lines: what failed, numbers beside those foreseen for this rank of the pipeline, three changes that would fit."""
    foreseen = rank_ledger(args, rank)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in foreseen.items.items() if size)
    tried = [(words, fullest(found)) for words, found in leaner(args)]
    fit = [f"{words} ({size / GIB:.1f} GiB)" for words, size in tried if size <= ROOM * held.total][:MOST]
    least = min(tried, key=lambda each: each[1], default=None)
    way = f"would fit: {', or '.join(fit)}" if fit else "no single change would fit"
    if not fit and least:
        way += f": {least[0]} comes nearest, {least[1] / GIB:.1f} GiB"
    return "\n".join(
        (
            f"the device is full: {what}",
            f"  at the peak {held.allocated / GIB:.2f} GiB in tensors, {held.reserved / GIB:.2f} reserved, of "
            f"{held.total / GIB:.2f}",
            f"  foreseen {foreseen.total / GIB:.2f} GiB in the {foreseen.moment}: {parts}",
            f"  {way}; `stretto plan` with the same words ranks other layouts",
        )
    )
