"""The ledger's peaks are those that were measured on GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import CLOSE, Category, Row, categories, rows, summary

pytestmark = pytest.mark.pure

WIDER = {
    "stretto-zbv, rank 1": 0.02,
    "32k-cp2-zero1": 0.007,
    "ep2": 0.025,
    "moe-small": 0.025,
    "4, rank 1": 0.013,
    "halves-interleaved": 0.013,
    "D4-auto-v-lean": 0.08,
    "halves-auto-v": 0.013,
    "D4-tp": 0.007,
}
"""Weight gradients that wait for their W; messages of a shard; experts whose loads are not equal; stages by turns; what
a post-validated step that computes norms once more holds; windows of code from before a block was two nodes."""


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: f"{row.file} {row.run}")
def test_a_peak_is_the_measured_one(row: Row) -> None:
    name = f"{row.file} {row.run}"
    bound = next((wide for some, wide in WIDER.items() if some in name), CLOSE)
    assert abs(row.error) < bound


def test_the_documents_say_so() -> None:
    """Catches: figures of an earlier ledger, or of some of the runs."""
    root = Path(__file__).parents[2]
    for document in ("README.md", "docs/planning.md"):
        assert summary() in (root / document).read_text()


@pytest.mark.parametrize("category", list(categories()), ids=lambda each: f"{each.file} {each.run} {each.name}")
def test_what_is_held_of_each_kind_is_what_was_measured(category: Category) -> None:
    assert abs(category.error) < 0.002
