"""The matrix of verified combinations: what it lists is compared here, and the page lists what it should."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch._dynamo  # noqa: F401  # the optimizer imports it: once here, not in each worker
from rich.console import Console

from stretto.arguments.schema import Arguments, DataConfig, ParallelConfig, RunConfig
from stretto.data.text import Text
from stretto.layout import Layout
from stretto.report.header import header
from stretto.testing import Pool
from stretto.verify import against_reference
from stretto.verify.matrix import (
    ACTIVATIONS,
    DATA,
    DTYPES,
    PAGE,
    PIPELINE,
    RECOMPUTE,
    SHARDED,
    TENSOR,
    VERIFIED,
    Combination,
    combination,
    example,
    options_of,
    untested,
    used_up,
)
from stretto.world import World

pytestmark = pytest.mark.gloo

Row = tuple[str, str, str, str]

ROWS = list(dict.fromkeys((c.tensor, c.pipeline, c.data, c.activations) for c in VERIFIED))
COMPARED = [row for row in ROWS if row[3] in ("-", "selective recomputation", "dropout + recomputation of blocks")]


@pytest.mark.parametrize("row", COMPARED, ids=" x ".join)
def test_a_combination_equals_one_process(pool: Pool, row: Row) -> None:
    """One step: in each dtype, with the options of the model on and off; dropout and recomputation in fp64 alone."""
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
    assert [cell[:4] for cell in cells] == ROWS
    assert all(float(figure) <= 1 for cell in cells for figure in cell[4:])
    assert f"| {' | '.join(DTYPES)} |" in page


def test_what_is_not_verified_is_said_in_one_line() -> None:
    """Catches a feature that joins the layout without joining the matrix."""
    plain = Arguments()
    assert untested(plain) is None
    strange = replace(plain, parallel=ParallelConfig(tp=2, cp=2))
    assert "tp, cp=2, fp32" in (untested(strange) or "")
    assert "\n" not in (untested(strange) or "")
    more = replace(strange, model=replace(plain.model, dropout=0.1), run=replace(plain.run, recompute="block"))
    assert "tp, dropout + recomputation of blocks, cp=2, fp32" in (untested(more) or "")
    object.__setattr__(more.run, "recompute", "everything")
    assert "tp, dropout, cp=2, recompute=everything, fp32" in (untested(more) or "")


def test_every_choice_of_the_schema_is_in_the_matrix() -> None:
    """Catches a schedule, dtype or way to recompute that can be chosen and is not verified."""
    assert set(get_args(get_type_hints(ParallelConfig)["schedule"])) == set(PIPELINE) - {"-"}
    assert set(get_args(get_type_hints(RunConfig)["dtype"])) == set(DTYPES)
    assert set(get_args(get_type_hints(RunConfig)["recompute"])) == set(RECOMPUTE)
    assert set(get_args(get_type_hints(ParallelConfig)["sharding"])) == {"none", *SHARDED}
    sharded = [c for c in VERIFIED if c.data in SHARDED]
    assert len(sharded) == 2 * 2 * len(SHARDED) * len(DTYPES)
    assert len(VERIFIED) - len(sharded) == len(TENSOR) * len(PIPELINE) * len(DATA) * len(ACTIVATIONS) * len(DTYPES)


def measure(world: World, row: Row) -> dict[tuple[str, bool], float]:
    """What the errors take up of what is allowed, for dtypes, with options on or off."""
    found = {}
    for dtype in DTYPES if row[3] == "-" else ("fp64",):
        for options in options_of(Combination(*row, dtype)):
            args = example(Combination(*row, dtype), options=options)
            p = args.parallel
            result = against_reference(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world, steps=1)
            found[dtype, options] = used_up(result)
    return found


def test_the_header_of_a_run_warns(tmp_path: Path) -> None:
    """Catches a warning that nobody is shown; a verified run has none."""
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("some text " * 99)
    data = DataConfig(data=str(tmp_path), cache=str(tmp_path / ".cache"), held_out=0.3)
    args = replace(Arguments(), parallel=ParallelConfig(tp=2, dp=1), data=data)
    args = replace(args, model=replace(args.model, vocab=257))
    assert "warning" not in _header(args)
    assert "not among the verified combinations: tp, cp=2, fp32" in _header(
        replace(args, parallel=replace(args.parallel, cp=2))
    )
    assert "a vocabulary of 50,257, of which the tokenizer byte uses 257" in _header(
        replace(args, model=replace(args.model, vocab=50257))
    )


def _header(args: Arguments) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(header(args, Text.open(args), resume=None, after=0, aside=None))
    return console.export_text()
