"""Rows are dealt so that ranks have equally many slots and equal work, whatever the lengths; tiles are the mask.

Faults to catch: a deal by tokens in place of work; a length that is rounded down; a document that is cut off at the
end of a block; a window that the work does not know.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stretto.sequence import Run, arranged, deal, local_length, pairs, runs_of, tiles, work
from stretto.sequence.deal import uneven

pytestmark = pytest.mark.pure

Ints = NDArray[np.int64]


def starts_of(lengths: list[int]) -> Ints:
    """Of documents one after another."""
    firsts = np.cumsum([0, *lengths[:-1]])
    return np.repeat(firsts, lengths)


def mask(starts: Ints, window: int | None) -> NDArray[np.bool_]:
    """Who sees whom, as the definition says it."""
    at = np.arange(len(starts))
    seen = (at <= at[:, None]) & (at >= starts[:, None])
    return seen if window is None else seen & (at > at[:, None] - window)


documents = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@given(documents, st.integers(1, 5), st.sampled_from([1, 2]), st.sampled_from([None, 1, 3, 9]))
@example([37], 4, 1, None)
def test_every_token_has_one_slot_and_tiles_are_the_mask(
    lengths: list[int], cp: int, multiple: int, window: int | None
) -> None:
    """Between any rank's queries and any rank's keys, or all of them; and the loads are what tiles count."""
    starts = starts_of(lengths)
    s, n, loads = len(starts), local_length(len(starts), cp, multiple), np.zeros(cp, np.int64)
    assert n % multiple == 0
    assert cp * (n - multiple) < s <= cp * n
    places = deal(work(starts, (window,)), cp, n, loads)
    assert sorted(places.flatten()) == list(range(cp * n))
    held = [runs_of(own, starts) for own in places]
    order, together = arranged(held, n)
    blocks: list[tuple[Ints, tuple[Run, ...]]] = [*zip(places, held, strict=True), (places.flatten()[order], together)]
    seen = np.zeros((cp * n, cp * n), bool)
    seen[:s, :s] = mask(starts, window)
    for rank in range(cp):
        for keys, runs in blocks:
            found, counted = np.zeros((n, len(keys)), int), 0
            for tile in tiles(held[rank], runs, window):
                i, j = np.arange(tile.shape[0])[:, None], np.arange(tile.shape[1])
                inside = (j <= i + tile.offset) & (window is None or j > i + tile.offset - (window or 0))
                assert inside.any(), "a tile in which nobody sees anybody"
                assert tile.whole == inside.all()
                assert pairs(tile) == inside.sum()
                found[tile.query, tile.key] += inside
                counted += pairs(tile)
            assert (found == seen[np.ix_(places[rank], keys)]).all()
        assert counted == loads[rank], "of all keys together"


def test_one_document_over_two_ranks_is_the_zigzag() -> None:
    places = deal(work(np.zeros(8, np.int64)), 2, 4, loads := np.zeros(2, np.int64))
    assert places.tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert loads.tolist() == [18, 18]


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 512])
def test_work_is_even_on_lengths_as_they_are(cp: int, window: int | None) -> None:
    """Heaviest over mean <= 1.02 of the loads as tiles count them: lengths of source files, odd rows, one document."""
    rng = random.Random(cp)
    for s in (4096, 16384, 10_007):
        lengths: list[int] = []
        while sum(lengths) < s:
            lengths.append(min(int(rng.lognormvariate(6.5, 1.4)) + 1, s - sum(lengths)))
        for cut in (lengths, [s], [s - 1, 1], [1, s - 1]):
            starts, loads = starts_of(cut), np.zeros(cp, np.int64)
            places = deal(work(starts, (window,)), cp, local_length(s, cp), loads)
            held = [runs_of(own, starts) for own in places]
            counted = np.array([sum(pairs(t) for keys in held for t in tiles(own, keys, window)) for own in held])
            assert (counted == loads).all()
            assert uneven(counted) <= 1.02, (s, cut)


def test_rows_of_a_microbatch_level_each_other() -> None:
    """One row of three heavy documents cannot be even over two ranks of whole blocks; a second one evens it out."""
    loads = np.zeros(4, np.int64)
    loads_of = []
    for lengths in ([97, 3], [50, 50], [1, 99]):
        deal(work(starts_of(lengths)), 4, 25, loads)
        loads_of.append(uneven(loads))
    assert loads_of[-1] <= 1.02


def test_a_row_that_does_not_fit_is_rejected() -> None:
    with pytest.raises(ValueError, match="2 ranks with 3 slots each do not hold a row of 7 tokens"):
        deal(work(np.zeros(7, np.int64)), 2, 3, np.zeros(2, np.int64))


def test_runs_are_of_one_document_and_lie_side_by_side() -> None:
    starts = starts_of([3, 5, 2])
    assert runs_of(np.array([1, 2, 3, 4, 7, 8, 11]), starts) == (
        Run(0, 1, 2, 0),
        Run(2, 3, 2, 3),
        Run(4, 7, 1, 3),
        Run(5, 8, 1, 8),
    )
    assert all(a.slot + a.length <= b.slot for a, b in pairwise(runs_of(np.arange(10), starts)))
