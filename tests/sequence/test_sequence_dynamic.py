"""A size of cp for each document: what is planned can be run, and is worth something where lengths differ."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.sequence.dynamic import Rates, fixed, makespan, plan, ranks_for, seconds

pytestmark = pytest.mark.pure

RATES = Rates(token=2e-6, pair=4e-11, exchange=4e-8, latency=6e-5)


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=30), st.sampled_from([1, 2, 4, 8]))
def test_each_document_lies_once_on_neighbours_that_hold_it(lengths: list[int], group: int) -> None:
    """No rank has more tokens in a round than it holds, and no plan is shorter than its work."""
    capacity = -(-4096 // group)
    placed = plan(lengths, group, capacity, RATES)
    assert sorted(each.document for each in placed) == list(range(len(lengths)))
    tokens: Counter[tuple[int, int]] = Counter()
    for each in placed:
        size = ranks_for(lengths[each.document], capacity, group)
        assert len(each.ranks) == size
        assert each.ranks.start % size == 0
        for rank in each.ranks:
            tokens[each.round, rank] += -(-lengths[each.document] // size)
    assert max(tokens.values()) <= capacity
    work = sum(seconds(n, 1, RATES) for n in lengths) / group
    assert makespan(lengths, placed, RATES) >= work * (1 - 1e-9)


def test_short_documents_beside_a_long_one_save_their_exchange() -> None:
    rng = random.Random(0)
    lengths = [min(int(rng.lognormvariate(7, 1.5)) + 1, 65536) for _ in range(400)]
    dynamic = makespan(lengths, plan(lengths, 8, 8192, RATES), RATES)
    assert dynamic < fixed(lengths, 8, RATES)


def test_a_document_that_no_group_holds_is_rejected() -> None:
    with pytest.raises(ValueError, match="a document of 33 tokens does not fit on 4 ranks of 8 tokens each"):
        ranks_for(33, 8, 4)
