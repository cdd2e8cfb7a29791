"""What a start and an end of many ranks ask of the store: flat for a rank and for rank 0, logarithmic for the last.

Faults to catch: a rank that reads what every other one wrote; rank 0 that collects; a record with lists of ranks.
"""

from __future__ import annotations

from statistics import mean

import pytest

from benchmarks.store_counts import counts as counts_of
from benchmarks.store_counts import end, start

pytestmark = pytest.mark.gloo  # no processes, but the program imports torch

SMALL, LARGE = 128, 2048
LEVELS = 3
"""Of blocks of 16, from one size to the other and some more."""


@pytest.mark.parametrize("body", [start, end])
def test_sixteen_times_the_ranks_cost_a_rank_no_more(body) -> None:  # type: ignore[no-untyped-def]
    small, large = counts_of(body, SMALL), counts_of(body, LARGE)
    assert large[0].messages == small[0].messages < 30
    assert abs(large[0].bytes - small[0].bytes) < 1000
    assert mean(c.messages for c in large) < mean(c.messages for c in small) + 1
    assert mean(c.bytes for c in large) < 1.1 * mean(c.bytes for c in small)
    assert max(c.messages for c in large) <= max(c.messages for c in small) + 3 * 4 * LEVELS
    assert max(c.bytes for c in large) < 100_000
