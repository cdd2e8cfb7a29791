"""`Structure`: where the tokens of a microbatch stand, the one value that all who ask for that read.

Rotary embedding and learned positions ask for positions, dropout for places, attention for who sees whom, the loss and
`verify` for what this rank holds. A row may have several documents, and lie on several ranks of cp; a plain row is one
document on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stretto.batch import Batch
from stretto.sequence import Run, Tile, Which, arranged, deal, local_length, runs_of, squares, tiles, work

T = TypeVar("T")


@dataclass(frozen=True)
class Held:
    """Rows that are dealt alike, and which runs of them each rank of cp holds."""

    rows: slice
    runs: tuple[tuple[Run, ...], ...]


@dataclass(frozen=True, eq=False)
class Structure:
    """Rows of `length` tokens, of which this rank has `slots`.

    `samples` [b] are the rows' numbers in the run. `places` [n, b or 1] say which token of its row is in a slot (from
    `length` on: none), `positions` [n, b or 1] which of its document. Plain rows have neither: their tokens are those
    from `first` on, in order.
    """

    length: int
    slots: int
    samples: Tensor | None = None
    first: int = 0
    places: Tensor | None = None
    positions: Tensor | None = None
    held: tuple[Held, ...] = ()
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of_tokens(cls, tokens: int, samples: Tensor | None = None, first: int = 0) -> Structure:
        """Plain rows."""
        return cls(first + tokens, tokens, samples, first)

    @property
    def plain(self) -> bool:
        """Whether each row is one document, and lies here in order."""
        return not self.held

    def to(self, device: torch.device | str) -> Structure:
        """The same with its tensors on `device`, as `Batch.to`."""
        samples, places, positions = (
            None if tensor is None else to_device(tensor, device)
            for tensor in (self.samples, self.places, self.positions)
        )
        return replace(self, samples=samples, places=places, positions=positions)

    def of_rows(self, rows: slice) -> Structure:
        """That of some of the rows."""
        key = "rows", rows.start, rows.stop
        if key not in self._known:  # without `samples`: structures that differ in these alone share what is known
            places, positions = (
                each if each is None or each.shape[1] == 1 else each[:, rows] for each in (self.places, self.positions)
            )
            both = [(each, max(each.rows.start, rows.start), min(each.rows.stop, rows.stop)) for each in self.held]
            held = tuple(
                Held(slice(first - rows.start, end - rows.start), each.runs) for each, first, end in both if first < end
            )
            self._known[key] = replace(self, places=places, positions=positions, held=held, _known={})
        found: Structure = self._known[key]
        return replace(found, samples=None if self.samples is None else self.samples[rows])

    def places_of(self, part: int, size: int, device: torch.device) -> Tensor:
        """Places [n] or [n, b or 1] of the `part`-th `size` slots: under sequence parallelism a rank has one part."""
        return self._of(self.places, part, size, device)

    def positions_of(self, part: int, size: int, device: torch.device) -> Tensor:
        """Positions [n] or [n, b or 1] in their documents, likewise."""
        return self._of(self.positions, part, size, device)

    def holds_tokens(self, part: int, size: int, rows: int, device: torch.device) -> Tensor | None:
        """Which of the `part`-th `size` slots of so many rows [size * rows] hold a token; None: all of them do."""
        if not self.held or self.slots * len(self.held[0].runs) == self.length:
            return None
        places = self.places_of(part, size, device)
        return (places < self.length).expand(-1, rows).reshape(-1)

    def order(self, ranks: tuple[int, ...], device: torch.device) -> Tensor:
        """Which slot of these ranks' comes where [ranks * n, b or 1], when they are put into the order of the row."""
        key = "order", ranks, device
        if key not in self._known:
            columns = [self._arranged(each, ranks)[0] for each in self.held]
            rows = [each.rows.stop - each.rows.start for each in self.held]
            index = np.repeat(np.stack(columns, 1), 1 if len(rows) == 1 else rows, axis=1)
            self._known[key] = to_device(torch.from_numpy(index), device)
        found: Tensor = self._known[key]
        return found

    def slots_of(self, ranks: tuple[int, ...], device: torch.device) -> Tensor:
        """The other way round: where in the order of the row what is in each slot comes [ranks * n, b or 1]."""
        key = "slots", ranks, device
        if key not in self._known:
            self._known[key] = self.order(ranks, device).argsort(0)
        found: Tensor = self._known[key]
        return found

    def known(self, key: tuple[object, ...], found: Callable[[], T]) -> T:
        """What follows from where the tokens of all ranks stand: found once, whoever asks for it."""
        if key not in self._known:
            self._known[key] = found()
        made: T = self._known[key]
        return made

    def documents(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of whole rows in their order [ranks * slots, b or 1]: which document of its row each token is of, and how
        many tokens that has. What is beyond the end of a row is one more."""
        key = "documents", device
        if key not in self._known:
            ranks, slots = tuple(range(len(self.held[0].runs))), self.slots * len(self.held[0].runs)
            columns, rows = [], [each.rows.stop - each.rows.start for each in self.held]
            for each in self.held:
                sizes = [run.length for run in self._arranged(each, ranks)[1]]
                sizes.append(slots - sum(sizes))
                columns.append(np.repeat(np.stack([np.arange(len(sizes)), sizes]), sizes, axis=1))
            both = np.repeat(np.stack(columns, 2), 1 if len(rows) == 1 else rows, axis=2)
            self._known[key] = to_device(torch.from_numpy(both), device)
        number, size = self._known[key]
        return number, size

    def tiles(
        self, queries: tuple[int, ...], keys: tuple[int, ...], window: int | None, which: Which = "all"
    ) -> Sequence[tuple[slice, Tile]]:
        """Who sees whom of what two sets of ranks hold, each in the order of the row; by rows of the batch.

        Squares are of the queries' own ranks.
        """
        key = "tiles", queries, keys, window, which
        if key not in self._known:
            self._known[key] = [(each.rows, tile) for each in self.held for tile in self._tiles(each, *key[1:])]
        found: Sequence[tuple[slice, Tile]] = self._known[key]
        return found

    def _tiles(
        self, held: Held, queries: tuple[int, ...], keys: tuple[int, ...], window: int | None, which: Which
    ) -> Iterator[Tile]:
        runs = self._arranged(held, queries)[1]
        if which == "square":
            return squares(runs, window)
        return tiles(runs, self._arranged(held, keys)[1], window, before=which == "before")

    def _arranged(self, held: Held, ranks: tuple[int, ...]) -> tuple[Any, tuple[Run, ...]]:
        key = "arranged", held.rows.start, ranks
        if key not in self._known:
            self._known[key] = arranged([held.runs[rank] for rank in ranks], self.slots)
        found: tuple[Any, tuple[Run, ...]] = self._known[key]
        return found

    def _of(self, given: Tensor | None, part: int, size: int, device: torch.device) -> Tensor:
        if given is None:
            return torch.arange(self.first + part * size, self.first + (part + 1) * size, device=device)
        return given[part * size : (part + 1) * size]


@dataclass(frozen=True)
class SequenceCut:
    """How rows are dealt: to `ranks` ranks of cp, of which this is one, in multiples of so many slots.

    `windows` are those of the layers, by which the work of a query is known; `further` places are predicted beside the
    next.
    """

    rank: int = 0
    ranks: int = 1
    multiple: int = 1
    windows: tuple[int | None, ...] = (None,)
    further: int = 0
    _alike: dict[tuple[int, int], Structure] = field(default_factory=dict, compare=False, repr=False)

    def of(self, batch: Batch) -> tuple[Batch, Structure]:
        """What this rank has of whole rows, on the host: slots without a token count for nothing."""
        rows, length = batch.tokens.shape
        batch = batch.with_further(self.further)  # while the rows are whole
        if self.ranks == 1 and batch.starts is None:
            return batch, Structure.of_tokens(length, batch.samples)
        structure = self._structure(batch)
        assert structure.places is not None
        index = structure.places.t().expand(rows, -1)
        own = (_taken(batch.tokens, index, 0), _taken(batch.labels, index, 0), _taken(batch.loss_mask, index, False))
        further = batch.further
        if further is not None:
            further = torch.stack([_taken(each, index, -1) for each in further.unbind(1)], 1)
        return Batch(*own, batch.samples, further=further), structure

    def _structure(self, batch: Batch) -> Structure:
        """Rows without documents are all alike, whatever is in them: what is known of them is found once."""
        rows, length = batch.tokens.shape
        if batch.starts is None and (rows, length) in self._alike:
            return replace(self._alike[rows, length], samples=batch.samples)
        slots = local_length(length, self.ranks, self.multiple)
        starts = np.zeros((1, length), np.int64) if batch.starts is None else batch.starts.numpy()
        _check(starts)
        loads = np.zeros((len(set(self.windows)), self.ranks), np.int64)
        dealt = [deal(work(each, self.windows), self.ranks, slots, loads) for each in starts]
        alike = [slice(0, rows)] if batch.starts is None else [slice(n, n + 1) for n in range(rows)]
        held = tuple(
            Held(at, tuple(runs_of(own, each) for own in places))
            for at, places, each in zip(alike, dealt, starts, strict=True)
        )
        places = torch.from_numpy(np.stack([each[self.rank] for each in dealt]))  # [b or 1, n]
        begins = _taken(torch.from_numpy(starts.copy()), places, 0)
        structure = Structure(
            length,
            slots,
            batch.samples,
            places=places.t().contiguous(),
            positions=torch.where(places < length, places - begins, 0).t().contiguous(),
            held=held,
        )
        if batch.starts is None:
            self._alike[rows, length] = structure
        return structure


def _check(starts: NDArray[np.int64]) -> None:
    """Raise ValueError where `starts` [b, s] are not those of documents one after another, such as their numbers."""
    before = np.concatenate([np.zeros_like(starts[:, :1]), starts[:, :-1]], 1)
    wrong = np.argwhere((starts != before) & (starts != np.arange(starts.shape[1])))
    if len(wrong):
        row, place = wrong[0].tolist()
        raise ValueError(
            f"starts of row {row} has {starts[row, place]} at place {place}: must be {place}, where a document begins "
            f"there, or {before[row, place]}, as the token before has it"
        )


def _taken(x: Tensor, places: Tensor, fill: int) -> Tensor:
    """x [b, s] at places [b, n], and `fill` beyond the end."""
    inside = places < x.shape[1]
    return torch.where(inside, x.gather(1, places.clamp(max=x.shape[1] - 1)), torch.full_like(x[:, :1], fill))


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """What the host made; to a GPU it is on its way."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)
