"""Which rows are an expert's, and of which rank's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows by expert and, within one, by source. `ends` [experts] int32 is where each expert's rows end.

    `read` gives on the host how many there are, of each source and each of its experts. It may wait for the device, so
    it is called when a host needs them: on a GPU, by the weight gradients.
    """

    read: Callable[[], list[list[int]]]
    ends: Tensor

    @cached_property
    def sizes(self) -> list[tuple[int, ...]]:
        """Of each expert, how many rows from each source."""
        return list(zip(*self.read(), strict=True))

    @property
    def experts(self) -> list[int]:
        """How many rows each expert has."""
        return [sum(each) for each in self.sizes]

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Expert, begin and end of each run of rows from one source; none of those that are empty."""
        at = 0
        for expert, each in enumerate(self.sizes):
            for size in each:
                if size:
                    yield expert, at, at + size
                at += size
