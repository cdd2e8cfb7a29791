"""Where microbatches come from, in any run: whole global batches, of which each rank takes its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stretto.collectives import all_reduce
from stretto.data.feed import rows_of
from stretto.exchange import all_same
from stretto.parallel_state import ParallelState


@runtime_checkable
class Batches(Protocol):
    """A stream of global batches, as one rank sees it."""

    @property
    def tokens(self) -> int:
        """Seen so far, over all ranks."""

    @property
    def epoch(self) -> float | None:
        """How often the data was seen; None where that is not known."""

    def next(self) -> Sequence[Any]:
        """This rank's microbatches of the next global batch, on the host."""

    def ready(self, microbatches: Sequence[Any]) -> Sequence[Any]:
        """The same on the device, as the stages are called with them. All ranks call it together."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can say it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


@runtime_checkable
class Evaluation(Protocol):
    """What a model is evaluated on."""

    def batches(self) -> Iterator[tuple[Sequence[Any], Tensor]]:
        """Each global batch as microbatches, ready, and the weight [] of its loss in the mean over all of them."""

    def bits_per_byte(self, loss: float) -> float | None:
        """What a loss comes to, where that is known."""


@dataclass(frozen=True)
class Share:
    """The rows of a microbatch, and what its mean loss counts for in the global batch.

    The shares of a global batch add up to 1, over all microbatches and data-parallel ranks.
    """

    rows: Any
    share: float | Tensor
    numbers: range | None = None
    """Of the rows, in the whole run; rows that are evaluated on have none."""


Source = Iterable[Any] | Callable[[int], Any]
"""Global batches in order; or a function from how many came before to the next one, which resumes at no cost."""


@dataclass(frozen=True)
class Cut:
    """How a global batch is dealt to ranks and microbatches: rows along the first dimension of every tensor in it.

    `weight` says what the loss of a microbatch, a mean, weighs among others: the number of its valid tokens, say. By
    default all weigh the same.
    """

    state: ParallelState
    global_batch: int
    micro_batch: int
    weight: Callable[[Any], Tensor] | None = None

    @property
    def microbatches(self) -> int:
        """Of each rank in a step. Raises ValueError where the sizes do not divide."""
        return len(self.rows)

    @property
    def rows(self) -> list[slice]:
        """Of a global batch, those of each microbatch of this rank. Raises ValueError where the sizes do not divide."""
        dp = self.state.axis("dp")
        return rows_of(self.global_batch, dp.rank, dp.size, self.micro_batch)

    def of(self, batch: Any) -> list[Any]:
        """This rank's microbatches. Raises ValueError for a batch of another size."""
        for tensor in _leaves(batch):
            if tensor.dim() == 0 or tensor.shape[0] != self.global_batch:
                short = tensor.dim() and 0 < tensor.shape[0] < self.global_batch
                last = "; a DataLoader leaves a last one that is smaller out with drop_last=True" if short else ""
                raise ValueError(
                    f"a tensor {list(tensor.shape)} in a batch, but global_batch={self.global_batch}: every tensor of "
                    f"a global batch has as many rows{last}"
                )
        return [_each(itemgetter(rows), batch) for rows in self.rows]

    def ready(self, microbatches: Sequence[Any]) -> tuple[list[Share], Tensor]:
        """On the device, with shares; and the weight [] of the global batch."""
        here = [_each(self._move, rows) for rows in microbatches]
        if self.weight is None:
            # The ranks of cp are all given the same rows: each counts for its part of them.
            share = self.micro_batch / self.global_batch / self.state.axis("cp").size
            whole = torch.full((), float(self.global_batch), dtype=torch.float64, device=self.state.world.device)
            return [Share(rows, share) for rows in here], whole
        weights = [self.weight(rows).double() for rows in here]
        whole = all_reduce(torch.stack(weights).sum(), self.state.axis("dp", "cp"))
        floor = whole.clamp(min=torch.finfo(whole.dtype).tiny)  # a batch in which nothing counts has a loss of 0
        return [Share(rows, weight / floor) for rows, weight in zip(here, weights, strict=True)], whole

    def _move(self, tensor: Tensor) -> Tensor:
        device = self.state.world.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass
class RowBatches:
    """`Batches` from a source of global batches, which every rank reads.

    An iterable that ends is read again from its beginning: that is an epoch. After a resume the source's own
    `load_state_dict` is used where it has one; else as many batches as came before are read and passed over.
    """

    source: Source
    cut: Cut
    row_tokens: int = 1
    count: int = 0
    """Global batches so far."""
    epochs: int = 0
    """Times that the source ended."""
    _iterator: Iterator[Any] | None = field(default=None, init=False, repr=False)
    _first: bytes | None = field(default=None, init=False, repr=False)
    """What the first global batch of this process, and their number, is known by: all ranks compare theirs."""
    _compared: bool = field(default=False, init=False, repr=False)

    @property
    def tokens(self) -> int:
        return self.count * self.cut.global_batch * self.row_tokens

    @property
    def epoch(self) -> float | None:
        if not isinstance(self.source, Iterable):
            return None
        return self.count / len(self.source) if isinstance(self.source, Sized) else float(self.epochs)

    def next(self) -> Sequence[Any]:
        batch = self._following()
        self.count += 1
        rows = self.cut.of(batch)
        if self._first is None and self.cut.state.world.size > 1:
            length = len(self.source) if isinstance(self.source, Iterable) and isinstance(self.source, Sized) else None
            self._first = _digest(batch, length)
        return rows

    def ready(self, microbatches: Sequence[Any]) -> Sequence[Share]:
        if self._first is not None and not self._compared:
            self._compared = True
            require_one_batch(self._first, self.cut.state)
        before = (self.count - 1) * self.cut.global_batch
        shares = self.cut.ready(microbatches)[0]
        numbers = [range(before + rows.start, before + rows.stop) for rows in self.cut.rows]
        return [replace(share, numbers=each) for share, each in zip(shares, numbers, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        own = getattr(self.source, "state_dict", None)
        return {"batches": self.count, "epochs": self.epochs, "source": own() if own else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = getattr(self.source, "load_state_dict", None)
        self._iterator, self.epochs = None, 0
        if own and state["source"] is not None:
            own(state["source"])
            self.epochs = int(state["epochs"])
        elif not callable(self.source):
            for _ in range(int(state["batches"])):
                self._following()
        self.count = int(state["batches"])

    def _following(self) -> Any:
        if not isinstance(self.source, Iterable):
            return self.source(self.count)
        if self._iterator is None:
            self._iterator = iter(self.source)
        try:
            return next(self._iterator)
        except StopIteration:
            self.epochs, self._iterator = self.epochs + 1, iter(self.source)
        try:
            return next(self._iterator)
        except StopIteration:
            if not self.count:
                raise ValueError("the data has no batch at all") from None
            raise ValueError(
                f"the data ended after {self.count} global batches and cannot be read again: give an iterable that "
                "can, such as a DataLoader or a list, an endless iterator, or fewer steps"
            ) from None


@dataclass(frozen=True)
class RowEvaluation:
    """`Evaluation` on an iterable of global batches, read anew each time."""

    source: Iterable[Any]
    cut: Cut

    def __post_init__(self) -> None:
        given: object = self.source
        if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
            raise TypeError(
                f"evaluation on a {type(self.source).__name__}, which does not say where it ends: give a list, a "
                "DataLoader, or another iterable of global batches"
            )
        if isinstance(self.source, Iterator):
            raise ValueError(
                f"evaluation on a {type(self.source).__name__}, which can be read once, and every evaluation reads it "
                "anew: give a list, a DataLoader, or another iterable that is no iterator"
            )

    def batches(self) -> Iterator[tuple[Sequence[Share], Tensor]]:
        for batch in self.source:
            yield self.cut.ready(self.cut.of(batch))

    def bits_per_byte(self, loss: float) -> None:
        """Not known: nobody says what text the rows stand for."""


def require_one_batch(digest: bytes, state: ParallelState) -> None:
    """Raise ValueError, on every rank, where they have read different global batches."""
    everyone = state.axis("tp", "cp", "dp", "pp")
    if not all_same(digest, everyone.size, everyone.group):
        raise ValueError(
            "the ranks read different global batches, or not as many, and each takes its rows of one that all have "
            "read: shuffle with the same seed on all of them, and leave out samplers that split the data by rank"
        )


def _digest(batch: Any, batches: int | None) -> bytes:
    """What a batch is known by, the bytes of all its tensors, in order; and how many there are."""
    found = hashlib.sha256(repr(batches).encode())
    for tensor in _leaves(batch):
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.digest()


def _each(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with every tensor changed: tuples, lists and dictionaries of tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _each(change, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_each(change, value) for value in tree)
    raise TypeError(
        f"a batch holds a {type(tree).__name__}: it must be made of tensors, tuples, lists and dictionaries"
    )


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return [leaf for part in parts for leaf in _leaves(part)]
