"""The ledger's peaks are those that were measured on GPUs."""

from __future__ import annotations

import pytest

from benchmarks.memory import Category, Row, categories, rows

pytestmark = pytest.mark.pure

BOUND = 0.005
WIDER = {
    ("h200/S4.json", "stretto-no-graphs"): 0.015,
    ("h200/S16.json", "stretto"): 0.015,
    ("h200x2/D4-schedules.json", "stretto-zbv, rank 1"): 0.02,
}
"""Small models, of which the allocator's rounding is a part; weight gradients that wait for their W."""


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: f"{row.file} {row.run}")
def test_a_peak_is_the_measured_one(row: Row) -> None:
    assert abs(row.error) < WIDER.get((row.file, row.run), BOUND)


@pytest.mark.parametrize("category", list(categories()), ids=lambda each: f"{each.file} {each.run} {each.name}")
def test_what_is_held_of_each_kind_is_what_was_measured(category: Category) -> None:
    assert abs(category.error) < 0.002
