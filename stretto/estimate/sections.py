"""What of sharded weights and gradients is whole while a section of a stage is at work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sections:
    """Of weights and gradients that are sharded: bytes of each section of a stage, where they are whole, as they are
    gathered."""

    weights: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    """Of two buckets, one that fills while the section is at work in a backward, and the one before."""
    all_weights: int = 0
    keep: int = 0
    """So many of the last stay whole from forward to backward."""
    transposed: tuple[int, ...] = ()
    """Bytes across of what came in FP8, while a section is at work in a backward."""
    spread: int = 0
    """Weights that several sections use, those of `spread_over`."""
    spread_over: frozenset[int] = frozenset()
    filled_throughout: int = 0
    """Gradients that fill all the way back: of these, and of a shared embedding."""
    left: int = 0
    """Gradients of the last two buckets of a backward, which wait until others want their memory."""

    def gathered(self, at: int, *, back: bool) -> int:
        """Bytes that are whole while a section is at work, and the next one on its way, or where a pass ends the one
        before, to which the next pass turns back."""
        turns = at == (0 if back else len(self.weights) - 1)
        following = at - 1 if back is not turns else at + 1
        here = {at, following, *range(max(0, len(self.weights) - self.keep), at)}
        spread = 0 if here.isdisjoint(self.spread_over) else self.spread
        across = _sum_of(self.transposed, {at}) if back else 0
        return min(self.all_weights, _sum_of(self.weights, here) + spread) + across

    def filling(self, at: int, *, back: bool) -> int:
        """Bytes of gradients that fill or are reduced; forward those that are left of the backward before."""
        return _sum_of(self.gradients, {at}) + self.filled_throughout if back else self.left


def _sum_of(sizes: Sequence[int], sections: Iterable[int]) -> int:
    """Of those sections that there are."""
    return sum(sizes[n] for n in sections if 0 <= n < len(sizes))
