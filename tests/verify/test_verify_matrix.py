"""The matrix of verified combinations: what it lists is compared here, and the page lists what it should."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch._dynamo  # noqa: F401  # the optimizer imports it: once here, not in each worker
from rich.console import Console

from stretto.arguments.schema import Arguments, ParallelConfig, RunConfig
from stretto.layout import Layout
from stretto.report.header import header
from stretto.testing import Pool
from stretto.verify import against_twin
from stretto.verify.matrix import (
    DATA,
    DTYPES,
    PAGE,
    PIPELINE,
    TENSOR,
    VERIFIED,
    Combination,
    combination,
    example,
    untested,
    used_up,
)
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS = list(dict.fromkeys((c.tensor, c.pipeline, c.data) for c in VERIFIED))


@pytest.mark.parametrize("row", ROWS, ids=" x ".join)
def test_a_combination_equals_one_process(pool: Pool, row: tuple[str, str, str]) -> None:
    """One step in each dtype, with the options of the model on and off."""
    p = example(Combination(*row, "fp64"), options=False).parallel
    for shares in pool.run(p.tp * p.pp * (p.dp or 1), measure, row):
        assert max(shares.values()) <= 1, shares


def test_an_example_is_of_its_combination() -> None:
    """Catches an example that does not use what it should show."""
    for of in VERIFIED:
        for options in (True, False):
            assert combination(example(of, options=options)) == of
            assert untested(example(of, options=options)) is None


def test_the_page_lists_what_is_verified() -> None:
    """Catches a combination that was added without measuring it: run `make verified`."""
    page = (Path(__file__).parents[2] / PAGE).read_text()
    cells = [tuple(row.split(" | ")) for row in re.findall(r"^\| (.+) \| \[test_verify", page, re.MULTILINE)]
    assert [cell[:3] for cell in cells] == ROWS
    assert all(float(figure) < 1 for cell in cells for figure in cell[3:])
    assert f"| {' | '.join(DTYPES)} |" in page


def test_what_is_not_verified_is_said_in_one_line() -> None:
    """Catches a feature that joins the layout without joining the matrix."""
    plain = Arguments()
    assert untested(plain) is None
    strange = replace(plain, parallel=ParallelConfig(tp=2, cp=2))
    assert "tp, cp=2, fp32" in (untested(strange) or "")
    assert "\n" not in (untested(strange) or "")


def test_every_choice_of_the_schema_is_in_the_matrix() -> None:
    """Catches a schedule or dtype that can be chosen and is not verified."""
    assert set(get_args(get_type_hints(ParallelConfig)["schedule"])) == set(PIPELINE) - {"-"}
    assert set(get_args(get_type_hints(RunConfig)["dtype"])) == set(DTYPES)
    assert len(VERIFIED) == len(TENSOR) * len(PIPELINE) * len(DATA) * len(DTYPES)


def measure(world: World, row: tuple[str, str, str]) -> dict[tuple[str, bool], float]:
    """What the errors take up of what is allowed, for each dtype, with options on and off."""
    found = {}
    for dtype in DTYPES:
        for options in (True, False):
            args = example(Combination(*row, dtype), options=options)
            p = args.parallel
            result = against_twin(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world, steps=1)
            found[dtype, options] = used_up(result, dtype)
    return found


def test_the_header_of_a_run_warns() -> None:
    """Catches a warning that nobody is shown; a verified run has none."""
    args = replace(Arguments(), parallel=ParallelConfig(tp=2, dp=1))
    args = replace(args, model=replace(args.model, vocab=256))
    assert "warning" not in _header(args)
    assert "not among the verified combinations: tp, cp=2, fp32" in _header(
        replace(args, parallel=replace(args.parallel, cp=2))
    )


def _header(args: Arguments) -> str:
    store = SimpleNamespace(header=SimpleNamespace(documents=1, tokens=1000))
    splits = SimpleNamespace(train=store, held_out=store)
    text = SimpleNamespace(corpus=SimpleNamespace(label="text"), splits=splits)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(header(args, text, resume=None, after=0, aside=None))
    return console.export_text()
