"""`ParallelState`: a layout and this rank's process groups, as one immutable object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Self

import torch
from torch.distributed import DistError, PrefixStore, ProcessGroup  # type: ignore[attr-defined]

from stretto.collective_trace import LastCalls
from stretto.layout import Layout
from stretto.parallel_state.create import GroupCost, abort_groups, back_end, create_group, destroy_groups, fake_group
from stretto.parallel_state.plan import Axes, GroupOptions, PlannedGroup, default_axes, geometric, plan
from stretto.parallel_state.reach import Reach, open_reach
from stretto.parallel_state.same_plan import build_store, check_same_plan
from stretto.parallel_state.tracer import Tracer
from stretto.store import TimedStore, in_time, last_resort
from stretto.world import Axis, Timer, World

MEET_TIMEOUT = 60.0
"""Seconds, at most, that ranks wait for each other before they create groups."""


ANSWER_SECONDS = 4.0
"""How long the store may take to answer who wants to know whether it is there."""

SLACK_SECONDS = 15.0
"""How long after its time-out a back end may take to say that a group was not made."""


class ParallelState:
    """What one rank needs to know of a layout in order to talk to its peers.

    It holds this rank's own groups of more than one rank, each set of ranks once. It does not change after
    `build`; several may live in one process. Use it in a `with`, or `close` it: then its groups are gone.
    """

    def __init__(
        self,
        layout: Layout,
        world: World,
        axes: Iterable[Axes],
        groups: Mapping[PlannedGroup, ProcessGroup],
        costs: Iterable[GroupCost] = (),
        tracer: Tracer | None = None,
        reach: Mapping[PlannedGroup, Reach] | None = None,
        timer: Timer | None = None,
        ordered: bool = False,
    ) -> None:
        """Made by `build` or `inspect`: `groups` are this rank's, as planned for `axes`."""
        self._tracer = tracer
        self.ordered = ordered
        self._reach = dict(reach or {})
        self._before: list[Callable[[], object]] = []
        self._layout = layout
        self._world = world
        self._costs = tuple(costs)
        self._groups = list(groups.values())
        self._axes = {frozenset(names): Axis.single("-".join(names), world.rank) for names in axes}
        for planned, group in groups.items():
            place = planned.ranks.index(world.rank)
            name = "-".join(planned.axes[0])
            observer = None if tracer is None else tracer.group(str(planned), name, planned.ranks)
            for names in planned.axes:
                found = self._reach.get(planned, Reach())
                self._axes[frozenset(names)] = Axis(
                    "-".join(names),
                    place,
                    planned.ranks,
                    group,
                    observer,
                    peer_buffer=found.buffer,
                    timer=timer,
                    peer_memory=found.memory,
                    ordered=ordered,
                    peer_messages=found.messages,
                )

    @classmethod
    def build(
        cls,
        layout: Layout,
        world: World,
        *,
        timeout: float | None = None,
        axes: Iterable[Axes] | None = None,
        options: Mapping[str, GroupOptions] | None = None,
        tracer: Tracer | None = None,
        timer: Timer | None = None,
        ordered: bool = False,
    ) -> Self:
        """Create this rank's groups. All ranks of the world call this together, with the same arguments.

        Args:
            layout: must have as many ranks as the world.
            world: where this process is; a world of one rank needs no process group and no store.
            timeout: seconds that a collective of these groups may take; None: as long as `initialize` said.
            axes: the axes and combinations that `axis` will be asked for; None: `default_axes(layout)`. After a
                colon an axis may name a channel, as in `("pp:late",)`: it shares no group with other channels; or the
                messages between two places, as in `("pp:0>1",)`: a group of these two.
            options: for the groups of some axes, as `{"tp": ..., "dp-cp": ...}`.
            tracer: is told of each communication over the groups right before it is issued. None: where `initialize`
                made the world, one that names who did not come when a peer is lost.
            timer: waits for each of them.
            ordered: sums have the same bits for any number of ranks (`Axis.ordered`).

        Raises:
            ValueError: the layout does not fit the world, or an axis is unknown or has options but no group, or
                an option would have no effect on this world's back end.
            RuntimeError: on all ranks, the ranks do not agree on what to create, or some did not come.
        """
        if layout.world != world.size:
            raise ValueError(
                f"the layout {layout} has {layout.world} ranks, the world has {world.size}: start "
                f"{layout.world} processes, or choose sizes whose product is {world.size}"
            )
        declared, chosen = _declare(layout, axes, options)
        limit = world.timeout if timeout is None else timeout
        planned = plan(layout, world.rank, declared, chosen)
        if world.size == 1:
            return cls(layout, world, declared, {}, ordered=ordered)
        for names, said in chosen.items():
            said.require_effect("-".join(sorted(names)), back_end(world), world.device.type)
        shared = build_store(world)
        check_same_plan(
            TimedStore(shared.store), world, _text(layout, world, declared, chosen, limit), min(limit, MEET_TIMEOUT)
        )
        groups: dict[PlannedGroup, ProcessGroup] = {}
        costs = []
        if tracer is None and world.lost is not None:
            tracer = LastCalls(world.lost)
        if tracer is not None:
            tracer.attach(world, PrefixStore("watch", shared.store))
        try:
            for each in planned:
                seconds = each.options.timeout or limit
                name, store = f"{each}@{shared.name}", PrefixStore(f"{each}/", shared.store)
                hanging = partial(_hanging, world, each, seconds)
                with last_resort(seconds + SLACK_SECONDS, hanging):
                    groups[each], cost = create_group(world, each, name, store, timedelta(seconds=seconds))
                costs.append(cost)
            reach = open_reach(world, groups, PrefixStore("windows", shared.store))
        except BaseException:
            abort_groups(list(groups.values()))
            raise
        return cls(layout, world, declared, groups, costs, tracer, reach, timer, ordered)

    @classmethod
    def inspect(cls, layout: Layout, rank: int, *, axes: Iterable[Axes] | None = None) -> Self:
        """The state of any rank of any layout, in this process alone.

        Its groups pretend: a collective returns at once and leaves whatever was in its output. Nothing else
        of torch is touched, and no process group needs to exist.
        """
        declared, _ = _declare(layout, axes, None)
        ranks = tuple(range(layout.world))
        world = World(rank, layout.world, 0, 1, torch.device("cpu"), "fake", ranks, source="inspect")
        groups = {each: fake_group(each, rank) for each in plan(layout, rank, declared)}
        return cls(layout, world, declared, groups)

    @property
    def layout(self) -> Layout:
        """The geometry."""
        return self._layout

    @property
    def world(self) -> World:
        """The ranks, and this process among them."""
        return self._world

    @property
    def coords(self) -> dict[str, int]:
        """This rank's coordinate on every axis."""
        return self._layout.coords(self._world.rank)

    @property
    def costs(self) -> tuple[GroupCost, ...]:
        """What each group took to create, in the order of creation."""
        return self._costs

    @property
    def peer_bytes(self) -> int:
        """Of this rank's device memory that other ranks read: torch's allocator does not count it."""
        return sum(each.nbytes for each in self._reach.values())

    def axis(self, *names: str) -> Axis:
        """The communicator along an axis, or along several together, in any order of their names.

        Raises:
            ValueError: no such axis.
            LookupError: a combination that was not declared to `build`. (A group cannot be created on
                demand: its members would all have to ask at the same time.)
        """
        found = self._axes.get(frozenset(names))
        if found is None:
            self._layout.size(*geometric(names))
            have = ", ".join(axis.name for axis in self._axes.values())
            raise LookupError(
                f"no group was declared for {'-'.join(names)}; this state has {have or 'none: it is closed'}. "
                f"Declare it: ParallelState.build(..., axes=(*default_axes(layout), {names!r}))"
            )
        return found

    def has(self, *names: str) -> bool:
        """Whether `axis` has this one."""
        return frozenset(names) in self._axes

    def __iter__(self) -> Iterator[Axis]:
        return iter(self._axes.values())

    def close(self) -> None:
        """Destroy the groups. Safe to call twice; axes handed out before are dead afterwards."""
        try:
            if self._tracer is not None and self._groups:
                self._tracer.close()
        except BaseException:
            self._abort()
            raise
        destroy_groups(self._forget())

    def before_close(self, call: Callable[[], object]) -> None:
        """Call this before the groups go, however a `with` ends: NCCL waits for graphs of its collectives."""
        self._before.append(call)

    def _forget(self) -> tuple[ProcessGroup, ...]:
        while self._before:
            self._before.pop()()
        groups = tuple(self._groups)
        self._axes.clear()
        self._groups.clear()
        self._reach.clear()
        return groups

    def _abort(self) -> None:
        """Leave without waiting for anyone."""
        for each in self._reach.values():
            with suppress(RuntimeError):  # on a device that has failed nothing waits, and the first error counts
                each.release()
        abort_groups(self._forget())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            tracer = self._tracer if self._groups else None
            if tracer is not None:
                tracer.failed(error)
            self._abort()
            if tracer is not None:
                tracer.left(error)


def _hanging(world: World, group: PlannedGroup, seconds: float) -> str:
    """Why a back end does not come back from making a group, as far as that can be seen."""
    text = f"rank {world.rank}: the group {group} was not made within {seconds + SLACK_SECONDS:g} s: "
    try:
        in_time(lambda: world.store.clone().check(["any"]), ANSWER_SECONDS)  # type: ignore[union-attr]
    except (TimeoutError, DistError):
        return f"{text}the rendezvous store, on {world.server}, does not answer"
    return f"{text}{world.absent() or 'one of its ranks does not come, though all ranks answer'}"


def _declare(
    layout: Layout, axes: Iterable[Axes] | None, options: Mapping[str, GroupOptions] | None
) -> tuple[tuple[Axes, ...], dict[frozenset[str], GroupOptions]]:
    """The axes, each combination once, and the options by axes; both checked."""
    declared = {frozenset(names): names for names in (default_axes(layout) if axes is None else axes)}
    chosen = {frozenset(name.split("-")): value for name, value in (options or {}).items()}
    for names in chosen:
        if names not in declared:
            have = ", ".join("-".join(each) for each in declared.values())
            raise ValueError(f"options for {'-'.join(sorted(names))}, which is none of the axes: {have}")
    return tuple(declared.values()), chosen


def _text(
    layout: Layout,
    world: World,
    axes: tuple[Axes, ...],
    options: Mapping[frozenset[str], GroupOptions],
    timeout: float,
) -> str:
    """All that the list of groups follows from; the ranks compare it."""
    said = [f"{layout} on {world.backend}, {timeout:g} s, groups " + " ".join(map("-".join, axes))]
    said += [f"{'-'.join(names)}: {options[frozenset(names)]}" for names in axes if frozenset(names) in options]
    return "; ".join(said)
