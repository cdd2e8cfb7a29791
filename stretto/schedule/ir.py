"""A schedule: one list of actions per rank, kept as integers in arrays and read as `Action`s."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from stretto.schedule.actions import NUMBER, Action, Ints, Op, mbs_of, ops_of, stages_of


class ScheduleError(ValueError):
    """A schedule or program that cannot be run; the message lists every reason found."""


class Order(Sequence[Action]):
    """The actions of one rank, in order: a sequence of `Action`s over an array of their codes."""

    __slots__ = ("codes",)

    codes: Ints

    def __init__(self, actions: Iterable[Action] | Ints) -> None:
        if isinstance(actions, np.ndarray):
            codes = actions.astype(np.int64)  # a copy: nobody else may write to it
        elif isinstance(actions, Order):
            codes = actions.codes
        else:
            codes = np.array([action.code for action in actions], np.int64)
        codes.flags.writeable = False
        self.codes = codes

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, at: int) -> Action: ...
    @overload
    def __getitem__(self, at: slice) -> Order: ...
    def __getitem__(self, at: int | slice) -> Action | Order:
        return Order(self.codes[at]) if isinstance(at, slice) else Action.of_code(int(self.codes[at]))

    def __iter__(self) -> Iterator[Action]:
        return map(Action.of_code, self.codes.tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Order):
            return np.array_equal(self.codes, other.codes)
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self.codes.tobytes())

    def __str__(self) -> str:
        return " ".join(map(str, self))

    def __repr__(self) -> str:
        return f"Order({str(self)!r})"


@dataclass(frozen=True, init=False)
class Schedule:
    """What every rank of a pipeline does in one step, in order.

    `placement[stage]` is the pipeline rank that holds the stage, so a loop, a V or anything else is data;
    `ranks[r]` are the actions of rank r. The value may be wrong in every way: `check` says whether it is.
    """

    placement: tuple[int, ...]
    num_microbatches: int
    ranks: tuple[Order, ...]

    def __init__(
        self, placement: Sequence[int], num_microbatches: int, ranks: Sequence[Sequence[Action] | Ints]
    ) -> None:
        object.__setattr__(self, "placement", tuple(placement))
        object.__setattr__(self, "num_microbatches", num_microbatches)
        orders = (order if isinstance(order, Order) else Order(order) for order in ranks)
        object.__setattr__(self, "ranks", tuple(orders))

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.ranks)

    @property
    def num_actions(self) -> int:
        """Actions of all ranks together."""
        return sum(map(len, self.ranks))

    @cached_property
    def table(self) -> Table:
        """All actions as columns."""
        return Table(self)

    @cached_property
    def actions(self) -> frozenset[Action]:
        """Every action of every rank. For readers and tests: passes over large schedules take the `table`."""
        return frozenset(action for rank in self.ranks for action in rank)

    def crosses(self, stage: int, other: int) -> bool:
        """Whether what passes from one of these stages to the other needs a message."""
        return self.placement[stage] != self.placement[other]

    def peer(self, message: Action) -> int:
        """The rank at the other end of a send or receive."""
        up = message.op in (Op.SEND_F, Op.RECV_B)
        return self.placement[message.stage + (1 if up else -1)]

    def __str__(self) -> str:
        return "\n".join(map(str, self.ranks))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that prints as `text`: one line per rank, actions between spaces.

        Where each stage lies and how many microbatches there are is read off the actions. Raises
        `ScheduleError` when a stage shows up on two ranks, or on none.
        """
        return cls.of_ranks([[Action.parse(word) for word in line.split()] for line in text.strip().splitlines()])

    @classmethod
    def of_ranks(cls, ranks: Sequence[Sequence[Action] | Ints]) -> Schedule:
        """The schedule of these lists, one for each rank; the rest is read off them as in `parse`."""
        orders = [Order(rank) for rank in ranks]
        found = [np.unique(stages_of(order.codes)) for order in orders]
        known = np.unique(np.concatenate([*found, np.zeros(1, np.int64)]))
        missing = np.setdiff1d(np.arange(min(int(known[-1]), len(known)) + 1), known)
        placement = dict.fromkeys(known.tolist(), -1)
        for stage in [*placement, *missing.tolist()]:
            homes = [rank for rank, stages in enumerate(found) if stage in stages]
            if len(homes) != 1:
                where = ", ".join(map(str, homes)) or "none"
                raise ScheduleError(f"stage {stage} must lie on one rank, found on: {where}")
            placement[stage] = homes[0]
        codes = np.concatenate([order.codes for order in orders])
        mbs = mbs_of(codes[ops_of(codes) < NUMBER[Op.UNSHARD]])
        return cls([placement[stage] for stage in sorted(placement)], int(mbs.max(initial=-1)) + 1, orders)


class Table:
    """All actions of a schedule as columns: the lists of its ranks, end to end. A *position* is a row.

    codes, rank, stage, op, mb: [n]; rank r has the positions `first[r]` up to, not including, `first[r + 1]`.
    """

    def __init__(self, s: Schedule) -> None:
        lengths = [len(order) for order in s.ranks]
        self.codes: Ints = np.concatenate([*(order.codes for order in s.ranks), np.zeros(0, np.int64)])
        self.rank: Ints = np.repeat(np.arange(len(lengths)), lengths)
        self.first: Ints = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.stage, self.op, self.mb = stages_of(self.codes), ops_of(self.codes), mbs_of(self.codes)
        self.stages = s.num_stages
        # Visits may outnumber microbatches, but no kind of action has more numbers than there are actions.
        highest = int(self.mb.max(initial=0))
        self._width = max(s.num_microbatches, highest + 1 if highest <= len(self.codes) else 0, 1)
        self._places: dict[int, Ints] = {}
        self.played: dict[Any, Any] = {}
        """Timelines by cost, once simulated."""

    def __len__(self) -> int:
        return len(self.codes)

    def places(self, op: int) -> Ints:
        """The position of each action of this op, by stage * width + microbatch; -1 where there is none.

        Of an action that is there several times, the last.
        """
        if op not in self._places:
            here = np.flatnonzero((self.op == op) & (self.stage < self.stages) & (self.mb < self._width))
            table = np.full(self.stages * self._width, -1, np.int64)
            table[self.stage[here] * self._width + self.mb[here]] = here
            self._places[op] = table
        return self._places[op]

    def find(self, codes: Ints) -> Ints:
        """The position of each of these actions; -1 of one that is not there, or of a code below 0."""
        stage, op, mb = stages_of(codes), ops_of(codes), mbs_of(codes)
        inside = (codes >= 0) & (stage < self.stages) & (mb < self._width)
        found = np.full(len(codes), -1, np.int64)
        for kind in np.flatnonzero(np.bincount(op[inside], minlength=16)).tolist():
            rows = np.flatnonzero(inside & (op == kind))
            found[rows] = self.places(kind)[stage[rows] * self._width + mb[rows]]
        return found
