"""Which groups a rank belongs to, in the one order in which every rank creates them. Plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from stretto.layout import Layout
from stretto.layout.ranks import ranges

Axes = tuple[str, ...]
"""Axes together, as `("dp", "cp")`. `("pp:0>1",)` is the messages from place 0 of the axis pp to place 1: a group of
these two ranks, on a channel of its own where they go to an earlier place."""


BY_COPY_ENGINES: Final = ("peer_buffer", "peer_memory", "peer_messages")
"""Options of groups whose ranks are GPUs that reach each other."""


@dataclass(frozen=True)
class GroupOptions:
    """What may differ between the groups of one state.

    `timeout` is in seconds; None is that of the state. `backend` is for tensors on the world's device; None is
    that of the world. The others are for NCCL: `high_priority` runs the kernels of the group on a stream of high
    priority; `min_ctas` and `max_ctas` bound the thread blocks, and so the share of the GPU, of one kernel; `cpu`
    gives the group Gloo beside NCCL, for CPU tensors; `peer_buffer` is a number of bytes: gathers and scatters of which
    each rank reads no more of another go through copy engines, where the ranks are GPUs of one host with peer
    access; with `peer_memory` also those of tensors that are kept in memory the others read. `peer_messages`, for two
    ranks, is a number of bytes: messages of no more go through copy engines, too.
    """

    timeout: float | None = None
    backend: Literal["nccl", "gloo"] | None = None
    high_priority: bool = False
    min_ctas: int | None = None
    max_ctas: int | None = None
    cpu: bool = False
    peer_buffer: int | None = None
    peer_memory: bool = False
    peer_messages: int | None = None

    def require_effect(self, name: str, backend: str, device: str) -> None:
        """Raise ValueError unless all that is said here for the axis `name` has an effect.

        `backend` is what the world uses for its kind of `device`.
        """
        used = self.backend or backend
        if used not in ("nccl", "gloo") or (used == "nccl" and device != "cuda"):
            raise ValueError(f"{name}: backend={used!r} for tensors on {device}; choose 'gloo', or 'nccl' on cuda")
        idle = [
            option
            for option in (*("high_priority", "min_ctas", "max_ctas", "cpu"), *BY_COPY_ENGINES)
            if getattr(self, option)
        ]
        if used != "nccl" and idle:
            raise ValueError(f"{name}: {', '.join(idle)} would have no effect on {used}; leave it out, or use nccl")


@dataclass(frozen=True)
class PlannedGroup:
    """One group of a rank: all axes that use it, its ranks in the layout, ascending, and its options."""

    axes: tuple[Axes, ...]
    ranks: tuple[int, ...]
    options: GroupOptions = GroupOptions()

    def __str__(self) -> str:
        """Its name in logs and flight recordings, after its first axes: `tp[0-7]`, `dp-cp[0,8,..,56]`."""
        return f"{'-'.join(self.axes[0])}[{ranges(self.ranks, 4, ',')}]"


def default_axes(layout: Layout, *, experts: bool = False) -> tuple[Axes, ...]:
    """The axes and combinations that a training step asks for; levels and experts where there are any.

    A model with `experts` asks for their axes also where they lie as the dense layers do.

    Each two neighbours of a pipeline have two communicators, see `neighbours`.
    """
    levels = tuple((axis,) for axis in layout.dense.levels if "." in axis)
    dense: tuple[Axes, ...] = (
        ("tp",),
        ("dp",),
        ("pp",),
        *neighbours(layout.size("pp"), ring=layout.vpp > 1 and layout.shape == "loop"),
        ("cp",),
        *levels,
        ("dp", "cp"),
        ("tp", "pp"),
        ("pp", "dp", "cp"),
        ("embed",),
        ("tp", "cp", "dp", "pp"),
    )
    if "dp.0" in layout.axes:
        dense = (*dense, ("dp.0", "cp"))
    if not (layout.has_experts or experts):
        return dense
    replicas = tuple((axis,) for axis in ("edp.0", "edp.1") if axis in layout.axes and "dp.0" in layout.axes)
    return (*dense, ("etp",), ("ep",), ("edp",), *replicas, ("etp", "ep"), ("etp", "ep", "pp"))


def plan(
    layout: Layout,
    rank: int,
    axes: Iterable[Axes],
    options: Mapping[frozenset[str], GroupOptions] | None = None,
) -> tuple[PlannedGroup, ...]:
    """The groups of more than one rank that `rank` is a member of, in the order in which `axes` need them.

    Axes with the same ranks, options and channel share a group. No rank can wait for another in a circle: all ranks
    go through `axes` in the same order, the groups of one entry are disjoint, and whether an entry repeats an
    earlier set of ranks is the same for all ranks in that set.
    """
    users: dict[tuple[tuple[int, ...], GroupOptions, str], list[Axes]] = {}
    for names in axes:
        ranks = members(layout, rank, names)
        if len(ranks) > 1:
            chosen = (options or {}).get(frozenset(names), GroupOptions())
            users.setdefault((ranks, chosen, _channel(names)), []).append(names)
    return tuple(PlannedGroup(tuple(names), ranks, chosen) for (ranks, chosen, _), names in users.items())


def neighbours(size: int, *, ring: bool = False) -> tuple[Axes, ...]:
    """The axes that carry the messages between neighbours of a pipeline of `size` ranks, each pair's each direction.

    NCCL works off what is on one communicator in order, so what one rank sends would wait for what its neighbour on the
    other side has not sent yet, and a gradient behind an activation whose sender is late. Messages to a later place may
    share their group with collectives over the same two ranks, which come when the last of these has long been used.
    With `ring` the last and the first are neighbours too, as where each rank has several stages in turn.
    """
    pairs = [(i, i + 1) for i in range(size - 1)] + [(size - 1, 0)] * (ring and size > 2)
    return tuple((f"pp:{a}>{b}",) for i, j in pairs for a, b in ((i, j), (j, i)))


def members(layout: Layout, rank: int, names: Axes) -> tuple[int, ...]:
    """The ranks that `rank` shares these axes with, ascending; itself alone where a pair is of others."""
    ranks = layout.group(rank, *geometric(names))
    if (ends := _pair(names)) is None:
        return ranks
    if max(ends) >= len(ranks) or ends[0] == ends[1]:
        raise ValueError(f"{names[0]} names places of an axis of {len(ranks)} ranks, two different ones from 0 on")
    pair = tuple(sorted(ranks[place] for place in ends))
    return pair if rank in pair else (rank,)


def geometric(names: Axes) -> Axes:
    """The axes of the layout, without channels."""
    return tuple(name.partition(":")[0] for name in names)


def downwards(names: Axes) -> bool:
    """Whether this is the pair of an earlier place and a later one, in this order: each two neighbours have one."""
    return (ends := _pair(names)) is not None and ends[0] < ends[1]


def _pair(names: Axes) -> tuple[int, int] | None:
    """The places between which messages go, for one axis with such a channel."""
    found = re.fullmatch(r"[^:]+:(\d+)>(\d+)", names[0]) if len(names) == 1 else None
    return (int(found[1]), int(found[2])) if found else None


def _channel(names: Axes) -> str:
    """What keeps groups of the same ranks apart."""
    if (ends := _pair(names)) is not None:
        return "up" if ends[1] < ends[0] else ""
    return " ".join(sorted({channel for name in names if (channel := name.partition(":")[2])}))
