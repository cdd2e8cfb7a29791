"""Sums of one tree, whose nodes may lie on any rank."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.ordered import tree_of, tree_sum

pytestmark = pytest.mark.pure


@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 11))
def test_nodes_of_aligned_blocks_make_the_tree_over_all_terms(a: int, b: int, ranks: int) -> None:
    """Terms are told by their place, so another association, or a term left out, shows as text."""
    here = 2**a

    class Said(str):
        def __add__(self, other: str) -> Said:  # type: ignore[override]
            return Said(f"({self!s} {other!s})")

    for n in (2**b, ranks):
        terms: list[Any] = [Said(k) for k in range(n * here)]
        nodes: list[Any] = [tree_of(terms.__getitem__, here, rank * here) for rank in range(n)]
        assert tree_sum(nodes) == tree_sum(terms)
        assert str(tree_sum(terms)).replace("(", "").replace(")", "").split() == [str(k) for k in range(n * here)]
