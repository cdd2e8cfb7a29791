"""The matrix of verified features: every two of them are compared here together, and the page lists what it should."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from itertools import combinations, cycle, product
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch._dynamo  # noqa: F401  # the optimizer imports it: once here, not in each worker
from allpairspy import AllPairs
from rich.console import Console

from stretto.arguments.schema import Arguments, DataConfig, ParallelConfig, RunConfig
from stretto.data.text import Text
from stretto.layout import Layout
from stretto.layout.schedules import FAMILIES
from stretto.report.header import header
from stretto.testing import Pool
from stretto.verify import against_reference
from stretto.verify.matrix import (
    DATA,
    DTYPES,
    FEATURES,
    PAGE,
    PIPELINE,
    RECOMPUTE,
    TENSOR,
    Combination,
    combination,
    example,
    untested,
    used_up,
)
from stretto.world import World

pytestmark = pytest.mark.gloo

Row = tuple[str, str, str, str, str, bool]

KINDS = [
    [name for name in PIPELINE if FAMILIES.get(name) == kind] for kind in dict.fromkeys(map(FAMILIES.get, PIPELINE))
]
"""Schedules that are alike to all that is not a schedule: stages on a rank, how they lie, whether backwards split."""


def rows_of_a_commit() -> list[Row]:
    """Every two features together, where the schedules of a kind are one feature and take turns.

    What comes last fills rows in which nothing else is left to meet: the cheapest, so each list is turned round.
    """
    turns = [cycle(kind) for kind in KINDS]
    tensor, _, *others = FEATURES
    rows = AllPairs([list(each)[::-1] for each in (tensor, range(len(KINDS)), *others, DTYPES, (True, False))])
    return [(of[0], next(turns[of[1]]), *of[2:]) for of in rows]


COMMIT = rows_of_a_commit()
PAIRED: list[Row] = [tuple(each) for each in AllPairs([*FEATURES, DTYPES, (True, False)])]
EVERY = [*COMMIT, *(pytest.param(row, marks=pytest.mark.nightly) for row in PAIRED if row not in COMMIT)]


@pytest.mark.parametrize("features", EVERY, ids=lambda each: " x ".join(map(str, each)))
def test_every_two_features_together_equal_one_process(pool: Pool, features: Row) -> None:
    """One step. Every schedule meets every sharding, every way to recompute, each dtype, and options on and off: at
    night each by itself, on a commit a schedule of each kind."""
    of = Combination(*features[:5])
    p = example(of, options=features[5]).parallel
    for share in pool.run(p.tp * p.pp * (p.dp or 1), measure, of, features[5]):
        assert share <= 1


def measure(world: World, of: Combination, options: bool) -> float:
    """What the errors take up of what is allowed."""
    args = example(of, options=options)
    p = args.parallel
    return used_up(against_reference(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world, steps=1))


def test_the_rows_of_a_commit_have_every_schedule_and_every_two_features() -> None:
    """Catches a schedule that no commit runs, and a kind that meets only some of the others."""
    assert {row[1] for row in COMMIT} == set(PIPELINE)
    kind_of = {name: number for number, kind in enumerate(KINDS) for name in kind}
    rows = [(of[0], kind_of[of[1]], *of[2:]) for of in COMMIT]
    values = [FEATURES[0], range(len(KINDS)), *FEATURES[2:], DTYPES, (True, False)]
    for a, b in combinations(range(len(values)), 2):
        assert not set(product(values[a], values[b])) - {(row[a], row[b]) for row in rows}


def test_an_example_is_of_its_combination() -> None:
    """Catches an example that does not use what it should show."""
    for of in (Combination(*each) for each in product(*FEATURES, DTYPES)):
        for options in (True, False):
            assert combination(example(of, options=options)) == of
            assert untested(example(of, options=options)) is None


def test_the_page_has_every_two_features_together() -> None:
    """Catches a feature that was added without measuring it beside each of the others: run `make verified`."""
    page = (Path(__file__).parents[2] / PAGE).read_text()
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \| \[test_verify", page, re.MULTILINE)]
    for a, b in combinations(range(len(FEATURES)), 2):
        missing = set(product(FEATURES[a], FEATURES[b])) - {(row[a], row[b]) for row in rows}
        assert not missing
    assert all(float(figure) <= 1 for row in rows for figure in row[len(FEATURES) :])
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
    ways = set(get_args(get_type_hints(RunConfig)["recompute"]))
    assert ways - {"offload"} == set(RECOMPUTE)
    elsewhere = replace(Arguments(), run=replace(Arguments().run, recompute="offload", ffn_chunks=2))
    elsewhere = replace(elsewhere, data=replace(elsewhere.data, packing=True))
    assert "recompute=offload, ffn_chunks=2, packing" in (untested(elsewhere) or "")
    assert {"dp", *get_args(get_type_hints(ParallelConfig)["sharding"])} - {"none"} == set(DATA) - {"-"}
    assert TENSOR[0] == PIPELINE[0] == DATA[0] == "-"


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
