"""Flat storage: shards are equal, aligned and cover all; a range of a tensor is a few rectangles that tile it.

Faults to catch: a tensor that begins unaligned; shards of unequal length; a row cut in two counted whole; the last row
left out; a gap of one element overlooked; a gap of none.
"""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stretto.layout.flat import ALIGNMENT, Flat, overlap, rectangles

pytestmark = pytest.mark.pure

SIZES = st.lists(st.integers(0, 300), max_size=6).map(tuple)


@given(SIZES, st.integers(1, 9))
def test_shards_are_equal_and_cover_every_tensor(sizes: tuple[int, ...], shards: int) -> None:
    flat = Flat(sizes, shards)
    assert [len(span) for span in flat.spans] == list(sizes)
    assert all(span.start % ALIGNMENT == 0 for span in flat.spans)
    assert all(a.stop <= b.start for a, b in pairwise(flat.spans))
    every = [flat.shard(rank) for rank in range(shards)]
    assert len({len(shard) for shard in every}) == 1
    assert [x for shard in every for x in (shard.start, shard.stop)] == [
        x for rank in range(shards) for x in (rank * len(every[0]), (rank + 1) * len(every[0]))
    ]
    assert every[-1].stop == flat.numel
    assert every[0].stop % ALIGNMENT == 0
    assert flat.numel < sum(sizes) + len(sizes) * ALIGNMENT + ALIGNMENT * shards


@given(SIZES, st.integers(1, 4))
@example((ALIGNMENT - 1, ALIGNMENT), 1)
def test_gaps_are_what_no_tensor_has(sizes: tuple[int, ...], shards: int) -> None:
    flat = Flat(sizes, shards)
    held = sorted(n for each in (*flat.spans, *flat.gaps) for n in each)
    assert held == list(range(flat.numel))
    assert all(flat.gaps)


@given(st.lists(st.integers(1, 6), max_size=4), st.data())
def test_rectangles_tile_a_range_in_order(shape: list[int], data: st.DataObject) -> None:
    total = prod(shape)
    start = data.draw(st.integers(0, total))
    part = range(start, data.draw(st.integers(start, total)))
    found = list(rectangles(shape, part))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert [n for each in found for n in range(each.start, each.start + prod(each.shape))] == list(part)
    for each in found:
        strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        places = product(*(range(o, o + n) for o, n in zip(each.offsets, each.shape, strict=True)))
        inside = [sum(i * s for i, s in zip(place, strides, strict=True)) for place in places]
        assert inside == list(range(each.start, each.start + prod(each.shape)))


def test_reads_like_a_matrix() -> None:
    """Elements 5 to 18 of 4 rows of 5: nothing of row 0, rows 1 and 2, three of row 3; and within a single row."""
    found = [(r.offsets, r.shape) for r in rectangles((4, 5), range(5, 18))]
    assert found == [((1, 0), (2, 5)), ((3, 0), (1, 3))]
    assert [(r.offsets, r.shape) for r in rectangles((4, 5), range(6, 9))] == [((1, 1), (1, 3))]
    (whole,) = rectangles((4, 5), range(20))
    assert whole.common((0, 0), (3, 2))[1] == (3, 2)
    (last,) = rectangles((4, 5), range(16, 19))
    assert (last.common((0, 0), (4, 3)), last.common((0, 0), (3, 5))[1]) == (((3, 1), (1, 2)), (0, 3))
    assert overlap(range(3, 8), range(5, 12)) == range(5, 8)
    assert not overlap(range(3, 5), range(7, 9))
