"""Plain handles that say where this process is: a `World` of ranks, and an `Axis` of them.

They are values, passed as arguments; nothing here creates or looks up a process group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]  # public, but not in __all__


@dataclass(frozen=True)
class World:
    """The ranks that run together, as this process sees them.

    `ranks[i]` is the rank in torch's default process group of this world's rank `i`. A training run has
    the identity; a world inside a larger pool of processes (tests, two layouts in one process) has a part.
    `store` is the rendezvous store that all ranks share; None when the world is this process alone.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    ranks: tuple[int, ...]
    store: Store | None = None
    source: str = "single process"
    server: str = ""
    """Where the store is, in words."""
    absent: Callable[[], str] = str
    """Who of the ranks does not answer, in a sentence; empty where nobody is missed."""
    lost: Callable[[BaseException], bool] | None = None
    """Whether an exception says that a peer is gone or does not answer; None where nobody is told of failures."""
    timeout: float = 600.0
    """Seconds that a collective may take, of groups that are not told otherwise."""

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> World:
        """A world of this process alone; needs no process group."""
        return cls(0, 1, 0, 1, torch.device(device), "none", (0,))


class Work(Protocol):
    """A communication on its way. `wait` orders what follows after it (on CUDA: on the stream, not the host)."""

    def wait(self) -> Any: ...

    def is_completed(self) -> bool: ...


class Done:
    """The work of a collective over one rank."""

    def wait(self) -> None:
        """Return at once."""

    def is_completed(self) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True, slots=True)
class Several:
    """Communications that are one to whoever waits."""

    works: Sequence[Any]

    def wait(self) -> None:
        """For all of them."""
        for work in self.works:
            work.wait()

    def is_completed(self) -> bool:
        """Whether all are over."""
        return all(work.is_completed() for work in self.works)


@dataclass(frozen=True, slots=True)
class Then:
    """A communication, and what is done with what it brings."""

    work: Work
    then: Callable[[], object]

    def wait(self) -> None:
        """Once."""
        self.work.wait()
        self.then()

    def is_completed(self) -> bool:
        """Whether what it brings is here."""
        return self.work.is_completed()


class Timer(Protocol):
    """Waits for communications, and knows how long it has."""

    def wait(self, work: Work) -> None: ...


@dataclass(frozen=True, slots=True)
class Timed:
    """A communication that is waited for by the clock."""

    work: Work
    timer: Timer

    def wait(self) -> None:
        """As `Work`."""
        self.timer.wait(self.work)

    def is_completed(self) -> bool:
        """As `Work`."""
        return self.work.is_completed()


@dataclass(frozen=True, slots=True)
class AsyncTensor:
    """A tensor that is here, or on its way."""

    tensor: Tensor
    work: Work | None = None

    def wait(self) -> Tensor:
        """The tensor, after which the current stream (the host, under Gloo) has waited."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


Rows = Callable[[int, Tensor | None], Tensor]
"""The part of a sum that goes to the n-th rank of an axis; written into the tensor, where one is given."""


@dataclass(frozen=True)
class RowSplits:
    """How many rows go from rank to rank of an axis: of this one to each, and of each to this one. `pairs`, where all
    is known, has what each rank (first) sends to each."""

    sent: Sequence[int]
    received: Sequence[int]
    pairs: Sequence[Sequence[int]] | None = None

    @classmethod
    def of_pairs(cls, pairs: Sequence[Sequence[int]], rank: int) -> RowSplits:
        """As `rank` sees them."""
        return cls(pairs[rank], [row[rank] for row in pairs], pairs)

    @property
    def back(self) -> RowSplits:
        """The way back."""
        return RowSplits(self.received, self.sent, self.pairs and list(zip(*self.pairs, strict=True)))

    @property
    def leaving(self) -> int:
        """The most rows that leave a rank for others; all is known."""
        assert self.pairs is not None
        return max(sum(row) - row[rank] for rank, row in enumerate(self.pairs))


class PeerBuffer(Protocol):
    """Memory of each rank of an axis that the others read, without help of the processors that compute.

    All ranks call it alike. What it begins passes behind whatever the current stream does next.
    """

    def takes(self, size: int) -> bool:
        """Whether a message of which each rank reads `size` bytes of each other one is worth it, and has room."""

    def gather(self, x: Tensor) -> AsyncTensor:
        """x [n, ..] of all ranks, in order: [size * n, ..]."""

    def scatter(self, rows: Rows, like: Tensor) -> AsyncTensor:
        """The sum over the ranks of this one's `rows`, each [n, ..] as `like`. Others' rows are asked for first."""

    def exchange(self, x: Tensor, pairs: Sequence[Sequence[int]], order: Tensor | None = None) -> AsyncTensor:
        """Rows of `x` (or of `x[order]`), those of each rank after those of the rank before, go to their ranks: so many
        as `pairs` says of each rank (first) for each. What comes is in the order of its ranks."""

    def rewind(self) -> None:
        """What follows in the current stream is after all messages, and the next message is as the first ever was: so
        what is recorded between two such calls can be replayed."""

    def restart(self) -> None:
        """What was begun since the last `rewind` has not been done, by any rank: it was recorded, and given up."""


class PeerMemory(Protocol):
    """Memory of each rank of an axis that the others read where it lies. All ranks call it alike.

    What it begins passes behind whatever the current stream does next; what is read must not change before `settle`.
    """

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel] of 0 that the others can read."""

    def holds(self, x: Tensor) -> bool:
        """Whether `x` lies in it."""

    def gather_into(self, out: Tensor, x: Tensor) -> Work:
        """Every rank's `x` [n] one after another in `out` [size * n], which need not lie in it unless `x` is a part."""

    def sum_into(self, out: Tensor, x: Tensor, *, add: bool = False) -> Work:
        """This rank's part of the sum of `x` [size * n] in, or added to, `out` [n], which may be that part of `x`."""

    def settle(self, x: Tensor) -> None:
        """What follows in the current stream may write to `x`: the others have read it."""


class PeerMessages(Protocol):
    """Messages between this rank and one other, each way in order, without help of the processors that compute."""

    def takes(self, size: int) -> bool:
        """Whether a message of so many bytes is worth it, and has room; both ranks say the same."""

    def send(self, x: Tensor) -> Work:
        """Contiguous `x`, which may change when the work is over."""

    def recv(self, out: Tensor) -> Work:
        """The next message, into contiguous `out`."""


class Observer(Protocol):
    """Is told of each communication over an axis, on every rank that takes part, right before it is issued."""

    def __call__(self, axis: Axis, op: str, x: Tensor, ends: tuple[int, int] | None = None) -> None:
        """A collective with input `x`; or with `ends`, places on the axis, a message from the first to the second."""


@dataclass(frozen=True)
class Axis:
    """One communicator as this rank sees it.

    `ranks` are ranks of the layout, in order along the axis; `ranks[rank]` is this process. `group` is
    None exactly when the axis has size 1: every collective over such an axis is a no-op. `observer`, if any, hears of
    all that goes over the group. `peer_buffer`, if there is one, carries what it takes in place of the group, and
    `peer_memory` what lies in it; `peer_messages`, on an axis of two ranks, what one sends the other. `timer`, if any,
    does the waiting. Sums over an `ordered` axis are those of one tree over its ranks (`stretto.ordered`), whatever
    they are of and wherever in it an element lies.
    """

    name: str
    rank: int
    ranks: tuple[int, ...]
    group: ProcessGroup | None = None
    observer: Observer | None = field(default=None, compare=False, repr=False)
    peer_buffer: PeerBuffer | None = field(default=None, compare=False, repr=False)
    timer: Timer | None = field(default=None, compare=False, repr=False)
    peer_memory: PeerMemory | None = field(default=None, compare=False, repr=False)
    ordered: bool = field(default=False, compare=False, repr=False)
    peer_messages: PeerMessages | None = field(default=None, compare=False, repr=False)

    @cached_property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return len(self.ranks)

    def tell(self, op: str, x: Tensor) -> None:
        """Every collective passes here, right before it is issued."""
        if self.observer is not None:
            self.observer(self, op, x)

    def timed(self, work: Work) -> Work:
        """A communication over this axis, to be waited for by the clock if there is one."""
        return work if self.timer is None else Timed(work, self.timer)

    @classmethod
    def single(cls, name: str, rank: int = 0) -> Axis:
        """An axis of size 1: this rank (its number in the layout) alone."""
        return cls(name, 0, (rank,))

    def __str__(self) -> str:
        return f"{self.name}{list(self.ranks)}"


@dataclass(frozen=True)
class ExpertAxes:
    """Where the experts of a model lie: `ep` spreads them, `etp` cuts each of them, `exchange` has all ranks of both,
    which together hold one copy of all. `places` are the coordinates of its ranks on ep and etp."""

    ep: Axis
    etp: Axis
    exchange: Axis
    places: tuple[tuple[int, int], ...]

    @classmethod
    def single(cls) -> ExpertAxes:
        """One rank holds all experts whole."""
        return cls(Axis.single("ep"), Axis.single("etp"), Axis.single("etp-ep"), ((0, 0),))
