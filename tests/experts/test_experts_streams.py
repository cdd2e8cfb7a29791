"""What a stream reads is there by the order of the streams alone, in halves of a microbatch and without.

Processes without GPUs compute everything at once. So each operation notes on which stream it would be launched, and
what that stream has waited for: it may read what was written on another one only where it has waited for that. A
message has a stream of its own, which follows the one that begins it, as copy engines do: what it reads must be there,
and where it writes nobody reads or writes before it was waited for. Places are stretches of memory.

Faults to catch: rows of a cut expert, or beside dropped ones, that leave before it is known where their tokens are;
outputs that are added up before they came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from experts_models import MIXTRAL, arguments, layout_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stretto.arguments.schema import Arguments
from stretto.experts import dispatch, plan
from stretto.streams import Stream
from stretto.testing import Pool
from stretto.verify import build, random_batch
from stretto.world import AsyncTensor, World

pytestmark = pytest.mark.gloo


class Write(NamedTuple):
    """A stretch of memory: where it begins and ends, on which stream it was written, at which time there, by what."""

    begin: int
    end: int
    stream: int
    time: int
    by: str


class Clocks(TorchDispatchMode):
    """How far each stream is, and how far it knows each other one to be."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.known: dict[int, Counter[int]] = {0: Counter()}
        self.written: dict[int, list[Write]] = {}
        """By storage; none of which another covers."""
        self.alive: list[Tensor] = []
        """No address is given to another tensor."""
        self.early: list[str] = []
        self.beside = 0
        """Operations that were launched on other streams than the first."""

    def stream(self) -> int:
        """One more."""
        self.known[len(self.known)] = Counter()
        return len(self.known) - 1

    def touches(self, given: Sequence[Tensor], what: str) -> None:
        """The current stream reads that, or writes over it."""
        for x in given:
            begin, end = extent(x)
            for there in self.written.get(place(x), ()):
                if there.begin < end and begin < there.end and self.known[self.now][there.stream] < there.time:
                    self.early.append(f"{what} on stream {self.now}: {there.by} of stream {there.stream} writes there")

    def writes(self, x: Tensor, by: str) -> None:
        """The current stream writes that, in its latest operation."""
        begin, end = extent(x)
        before = [each for each in self.written.get(place(x), ()) if each.begin < begin or end < each.end]
        new = Write(begin, end, self.now, self.known[self.now][self.now], by)
        self.written[place(x)] = [*before, new]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.numel()]
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and place(x) not in map(place, given)]
        takes = func._schema.arguments
        values = [*args, *(kwargs.get(each.name) for each in takes[len(args) :])]
        writes = [x for each, x in zip(takes, values, strict=True) if each.alias_info and each.alias_info.is_write]
        changed = [x for x in tree_leaves(writes) if x is not None]
        if not (made or changed):  # a view
            return out
        if "empty" not in str(func):
            self.touches(given, str(func))
        known = self.known[self.now]
        known[self.now] += 1
        self.beside += self.now > 0
        self.alive += [*given, *made]
        for x in (*made, *changed):
            self.writes(x, str(func))
        return out

    def message(self, coming: Tensor) -> int:
        """The stream of a message that begins now and brings that."""
        before, self.now = self.now, self.stream()
        self.known[self.now] |= self.known[before]
        self.touches([coming], "a message")
        self.known[self.now][self.now] += 1
        self.alive.append(coming)
        self.writes(coming, "a message")
        stream, self.now = self.now, before
        return stream


def place(x: Tensor) -> int:
    """Its storage."""
    return x.untyped_storage().data_ptr()


def extent(x: Tensor) -> tuple[int, int]:
    """From its first byte to behind its last."""
    if not x.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


class Launched:
    """What a stream had come to, and a communication that is over then."""

    def __init__(self, clocks: Clocks, stream: Any, work: Any = None) -> None:
        self.clocks, self.work = clocks, work
        self.known = Counter(clocks.known[clocks.now if stream is None else stream])

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.clocks.known[self.clocks.now] |= self.known

    def is_completed(self) -> bool:
        return True


@contextmanager
def clocks() -> Iterator[Clocks]:
    """Within, streams are noted."""
    found = Clocks()

    def of(_: torch.device) -> Stream:
        return Stream(found.stream())  # type: ignore[arg-type]

    def current(_: torch.device) -> Stream:
        return Stream(found.now)  # type: ignore[arg-type]

    @contextmanager
    def used(self: Any) -> Iterator[None]:
        before = found.now
        found.now = before if self.stream is None else self.stream
        yield
        found.now = before

    def follows(self: Any, other: Any) -> None:
        if self.stream is not None:
            found.known[self.stream] |= found.known[other.stream]

    def noted(begin: Callable[..., AsyncTensor]) -> Callable[..., AsyncTensor]:
        def beginning(x: Tensor, *args: Any) -> AsyncTensor:
            found.touches([x], "a message")
            coming = begin(x, *args)
            return replace(coming, work=Launched(found, found.message(coming.tensor), coming.work))

        return beginning

    streams = {"of": of, "current": current, "used": used, "follows": follows}
    streams |= {"launched": lambda self: Launched(found, self.stream), "hand_over": lambda _, x: x}
    with (
        mock.patch.multiple(Stream, **streams),
        mock.patch.object(plan, "all_gather_async", noted(plan.all_gather_async)),
        mock.patch.object(dispatch, "all_to_all_rows_async", noted(dispatch.all_to_all_rows_async)),
    ):
        yield found


def _early(world: World, args: Arguments) -> tuple[list[str], int]:
    with clocks() as found, build(args, layout_of(args), world) as session:
        with found:
            session.step(random_batch(args, 0))
        return sorted(set(found.early)), found.beside


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ({}, {"dp": 2, "ep": 2}),
        ({"expert_capacity": 0.75}, {"dp": 2, "ep": 2}),
        ({}, {"dp": 4, "ep": 2, "etp": 2}),
    ],
)
@pytest.mark.parametrize("halves", [True, False])
def test_nothing_is_touched_before_it_is_there(
    pool: Pool, model: dict[str, Any], parallel: dict[str, Any], halves: bool
) -> None:
    args = arguments({**MIXTRAL, **model}, batch=4 * parallel["dp"], ep_comm_overlap=halves, **parallel)
    for early, beside in pool.run(parallel["dp"], _early, args):
        assert early == []
        assert (beside > 20) == halves
