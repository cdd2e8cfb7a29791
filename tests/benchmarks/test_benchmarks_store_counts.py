"""What a start and an end of many ranks ask of the store: flat for a rank and for rank 0, logarithmic for the last.

Faults to catch: a rank that reads what every other one wrote; rank 0 that collects; a record with lists of ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.store_counts import Count, Line, end, start, table
from benchmarks.store_counts import counts as counts_of

pytestmark = pytest.mark.gloo  # no processes, but the program imports torch

SMALL, LARGE = 64, 1024
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


def test_the_recorded_figures_are_of_this_program_and_stand_in_the_documents() -> None:
    """Catches: a table that nobody measured again when what is asked of the store changed."""
    root = Path(__file__).parents[2]
    said = json.loads((root / "benchmarks/results/cpu/store_counts.json").read_text())
    lines = [Line(**{k: Count(**v) if isinstance(v, dict) else v for k, v in each.items()}) for each in said]
    assert table(lines) in (root / "docs/initialize.md").read_text()
    assert {line.ranks for line in lines} >= {64, 16_384}
    for body, name in ((start, "start"), (end, "end")):
        (recorded,) = [line for line in lines if (line.case, line.ranks) == (name, SMALL)]
        assert recorded.rank_0.messages == counts_of(body, SMALL)[0].messages
