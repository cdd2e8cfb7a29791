"""Which tensors of a stage are gathered at once.

Faults to catch: what is quantized beside what is not; a head gathered for as long as all blocks; frozen norms with
those that are trained.
"""

from __future__ import annotations

import pytest

from stretto.layout.grouping import Stored, by_section

pytestmark = pytest.mark.pure


def block(section: int, *, trained: bool = True) -> list[Stored]:
    """A norm and two matrices, in the order of the forward."""
    norm = Stored(8, ("", trained), False, section)
    return [norm, *(Stored(n, ("", trained), True, section, quantized=True) for n in (64, 128))]


def test_matrices_are_gathered_by_block_and_norms_for_all() -> None:
    tensors = [Stored(100, ("", True), True, 0), *block(1), *block(2), Stored(8, ("", True), False, 3)]
    assert by_section(tensors) == [[7], [5, 6], [2, 3], [1, 4], [0]]


def test_a_large_section_is_cut_as_its_backward_fills_it() -> None:
    """The two matrices of a block apart, its norm with that which is filled with it; no tensor is cut."""
    tensors = [each._replace(quantized=False) for section in (0, 1) for each in block(section)]
    assert by_section(tensors, 130) == [[5], [4, 3], [2], [1, 0]]
    assert by_section(tensors, 192) == [[4, 5], [3], [1, 2], [0]]
    assert by_section(tensors, 200) == [[4, 5, 3], [1, 2, 0]]
    assert by_section(tensors, 1) == [[5], [4], [3], [2], [1], [0]]


def test_what_is_much_stays_with_its_section() -> None:
    """A head beside a block that predicts a further token."""
    tensors = [*block(0), *block(1), Stored(500, ("", True), True, 1)]
    assert by_section(tensors) == [[4, 5], [6, 3], [1, 2], [0]]


def test_what_is_frozen_or_of_experts_is_apart() -> None:
    experts = [Stored(512, ("expert", True), True, section) for section in (0, 1)]
    tensors = [*block(0), experts[0], *block(1, trained=False), experts[1]]
    assert by_section(tensors) == [[7], [5, 6], [4], [3], [1, 2], [0]]
