"""The page on layouts says what the code does."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

pytestmark = pytest.mark.gloo  # its last example builds a parallel state

PAGE = Path(__file__).parents[2] / "docs" / "layout.md"


def test_the_examples_of_the_page_run() -> None:
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert failed == 0
    assert tried > 10
