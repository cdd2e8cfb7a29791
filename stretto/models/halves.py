"""A microbatch in two halves of its samples, one of which computes while messages of the other's experts are under way.

Both go through a block together. `A` is ahead: its rows travel while `B` attends, its outputs while the experts compute
B's rows, and B's while A attends in the next block. Messages of both stand in one order, which all ranks have, and none
stands behind one that waits for a computation that comes later:

    A   attend, ask | send |         compute |      | give |
    B               attend |     ask |         send |      compute, give

The host waits for the sizes of one half while the device has the other's work. Autograd takes nodes in the opposite
order of their forward, so the backward is interleaved as the forward was.
(DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.4, overlaps microbatches so.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from stretto.experts.run import Run, Stop, finish
from stretto.streams import Stream
from stretto.structure import Structure

if TYPE_CHECKING:
    from stretto.models.block import Block, Rotations

STOPS: Final = (
    frozenset({Stop.ASKED, Stop.SENT, Stop.COMPUTED, Stop.GIVEN}),
    frozenset({Stop.SORTED, Stop.ASKED, Stop.SENT, Stop.GIVEN}),
)
"""Where each half is left; as often in a layer."""


class Half:
    """Some of the samples of a microbatch, as far as they have come."""

    def __init__(
        self, x: Tensor, turns: Rotations | None, structure: Structure, beside: Stream, stops: Collection[Stop]
    ) -> None:
        self.passed, self.turns, self.structure, self.beside, self.stops = x, turns, structure, beside, stops
        self._run: Run | None = None
        self._tell: Callable[[Tensor], object] | None = None

    def enter(self, block: Block) -> None:
        """Go on with `block` when all before it is through."""
        self._run = self._through(self._run, block)

    def advance(self) -> None:
        """To the next stop, or to the end."""
        while self._run is not None:
            try:
                stop, self.passed = next(self._run)
            except StopIteration as end:
                self.passed, self._run = end.value, None
            else:
                if stop in self.stops:
                    return

    def end(self) -> Tensor:
        """What the last block put out."""
        if self._run is not None:
            self.passed, self._run = self._told(finish(self._run)), None
        return self.passed

    def when_through(self, tell: Callable[[Tensor], object]) -> None:
        """Call `tell` with what the last block puts out."""
        self._tell = tell
        if self._run is None:
            self._told(self.passed)

    def _told(self, x: Tensor) -> Tensor:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(x)
        return x

    def _through(self, before: Run | None, block: Block) -> Run:
        x = self.passed if before is None else self._told((yield from before))
        return (yield from block.run(x, self.turns, self.structure, beside=self.beside))


@dataclass(frozen=True, eq=False)
class Halves:
    """Both, between two blocks. The backward comes to what made `last` first of all that these come from, and when it
    is through with all that takes them, of either half."""

    both: Sequence[Half]
    last: Tensor

    @classmethod
    def of(
        cls, x: Tensor, structure: Structure, turns: Callable[[Structure], Rotations | None], beside: Sequence[Stream]
    ) -> Halves:
        """Of x [s(/t), b, h], b even."""
        n = x.shape[1] // 2
        each = zip((slice(0, n), slice(n, 2 * n)), x.chunk(2, 1), beside, STOPS, strict=True)
        both = []
        for rows, part, stream, stops in each:
            of_rows = structure.of_rows(rows)
            both.append(Half(part.contiguous(), turns(of_rows), of_rows, stream, stops))
        return cls(both, x)

    def through(self, block: Block) -> Halves:
        """Through a block, but for what waits for outputs that are still on their way."""
        for half in self.both:
            half.enter(block)
        for _ in STOPS[0]:
            for half in self.both:
                half.advance()
        if block.post_feedforward_layernorm is not None:  # a weight of this block, which is not there in the next
            for half in self.both:
                half.end()
        return Halves(self.both, self.both[1].passed)

    def each(self, through: Callable[[Half, Tensor], Tensor]) -> Halves:
        """One after the other, from what the last block put out."""
        for half in self.both:
            half.passed = through(half, half.end())
        return Halves(self.both, self.both[1].passed)

    def joined(self) -> Tensor:
        """[s(/t), b, h]."""
        return torch.cat([half.end() for half in self.both], 1)
