"""The matrix of verified features: every two of them are compared here together, and the page lists what it should."""

from __future__ import annotations

import io
import re
from dataclasses import astuple, replace
from itertools import combinations, product
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch._dynamo  # noqa: F401  # the optimizer imports it: once here, not in each worker
from allpairspy import AllPairs
from rich.console import Console

from benchmarks.verified import KINDS, every_two, layout_of
from stretto.arguments.schema import Arguments, DataConfig, ParallelConfig, RunConfig
from stretto.data.text import Text
from stretto.report.header import header
from stretto.testing import Pool
from stretto.verify import against_reference
from stretto.verify.compare import ROUNDING
from stretto.verify.matrix import (
    ACTIVATIONS,
    APART,
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

PAIRED = every_two()
WITH_KINDS = [tuple(kind[0] for kind in KINDS) if of == PIPELINE else of for of in FEATURES]
DENSE = [
    (Combination(tensor, "-", pipeline, data, "-", "-", "-", activations, dtype), options)
    for tensor, pipeline, data, activations, dtype, options in AllPairs(
        [TENSOR, PIPELINE, DATA, ACTIVATIONS, DTYPES, (True, False)]
    )
]


def shows(of: Combination) -> set[tuple[int | str, ...]]:
    """Its features, and how tensors are cut beside how sequences are, and replicas."""
    beside = {(of.tensor, other) for other in (of.context, of.data)}
    return beside.union(enumerate(astuple(of)[: len(FEATURES)]))


def few(rows: list[tuple[Combination, bool]]) -> list[tuple[Combination, bool]]:
    """Some of the rows, which show all that the rows do: those first that show most, on the fewest ranks."""
    found, left = [], set[tuple[int | str, ...]]().union(*(shows(of) for of, _ in rows))
    while left:
        best = max(rows, key=lambda row: (len(left & shows(row[0])), -layout_of(row[0]).world))
        left -= shows(best[0])
        found.append(best)
    return found


# Ten runs of one process stand beside one in bf16: on a commit one row is, and the others are in fp64.
COMMIT = few(PAIRED)
ROUNDED = next(row for row in COMMIT if row[0].dtype in ROUNDING)
COMMIT = [row if row == ROUNDED else (replace(row[0], dtype="fp64"), row[1]) for row in COMMIT]
NIGHT = [row for row in dict.fromkeys([*PAIRED, *DENSE]) if row not in COMMIT]
EVERY = [*COMMIT, *(pytest.param(*row, marks=pytest.mark.nightly) for row in NIGHT)]


@pytest.mark.parametrize(("of", "options"), EVERY, ids=str)
def test_every_two_features_together_equal_one_process(pool: Pool, of: Combination, options: bool) -> None:
    """One step. On a commit each feature, and tensor parallelism beside all that is cut. At night a schedule of each
    kind meets every sharding, every way to recompute, each dtype, options on or off; each schedule, of dense layers.

    Where rounding is coarse one right run in a hundred exceeds what nine others allow (docs/verify.md), from other
    weights it does not; a wrong one does so from any.
    """
    seeds = (0, 1) if of.dtype in ROUNDING else (0,)
    assert any(max(pool.run(layout_of(of).world, measure, of, options, seed, timeout=140.0)) <= 1 for seed in seeds)


def measure(world: World, of: Combination, options: bool, seed: int) -> float:
    """What the errors take up of what is allowed."""
    return used_up(against_reference(example(of, options=options), layout_of(of), world, steps=1, seed=seed))


def test_an_example_is_of_its_combination() -> None:
    """Catches an example that does not use what it should show, and two features that no row has together."""
    for of, options in PAIRED:
        assert combination(example(of, options=options)) == of
        assert untested(example(of, options=options)) is None
    kind_of = {name: kind[0] for kind in KINDS for name in kind}
    rows = [(*astuple(replace(of, pipeline=kind_of[of.pipeline]))[: len(FEATURES) + 1], on) for of, on in PAIRED]
    columns = [*WITH_KINDS, DTYPES, (True, False)]
    for a, b in combinations(range(len(columns)), 2):
        assert not set(product(columns[a], columns[b])) - APART - {(row[a], row[b]) for row in rows}
    assert {of.pipeline for of, _ in PAIRED} == set(PIPELINE)


def test_the_page_has_every_two_features_together() -> None:
    """Catches a feature that was added without measuring it beside each of the others: run `make verified`."""
    page = (Path(__file__).parents[2] / PAGE).read_text()
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \| \[test_verify", page, re.MULTILINE)]
    kind_of = {name: kind[0] for kind in KINDS for name in kind}
    pipeline = FEATURES.index(PIPELINE)
    kinds = [[kind_of[row[n]] if n == pipeline else row[n] for n in range(len(FEATURES))] for row in rows]
    for a, b in combinations(range(len(FEATURES)), 2):
        of_old = {a, b} <= {FEATURES.index(each) for each in (TENSOR, PIPELINE, DATA, ACTIVATIONS)}
        columns, found = (FEATURES, rows) if of_old else (WITH_KINDS, kinds)
        missing = set(product(columns[a], columns[b])) - APART - {(row[a], row[b]) for row in found}
        assert not missing, f"run: .venv/bin/python -m benchmarks.verified {PAGE} --missing"
    assert all(float(figure) <= 1 for row in rows for figure in row[len(FEATURES) :] if figure)
    assert all(any(row[len(FEATURES) :]) for row in rows)
    assert f"| {' | '.join(DTYPES)} |" in page


def test_what_is_not_verified_is_said_in_one_line() -> None:
    """Catches a feature that joins the layout without joining the matrix."""
    plain = Arguments()
    assert untested(plain) is None
    assert untested(replace(plain, parallel=ParallelConfig(tp=2, cp=2))) is None
    strange = replace(plain, parallel=ParallelConfig(tp=2, reduce_dtype="bf16"))
    assert "tp, reduce_dtype=bf16, fp32" in (untested(strange) or "")
    assert "\n" not in (untested(strange) or "")
    more = replace(strange, model=replace(plain.model, dropout=0.1), run=replace(plain.run, recompute="block"))
    assert "tp, dropout + recomputation of blocks, reduce_dtype=bf16, fp32" in (untested(more) or "")
    hybrid = ParallelConfig(cp=4, cp_comm=("hybrid",), cp_a2a=2)
    assert "one process, cp_a2a=2, cp=4, cp_comm=hybrid, fp32" in (untested(replace(plain, parallel=hybrid)) or "")
    object.__setattr__(more.run, "recompute", "everything")
    assert "tp, dropout, reduce_dtype=bf16, recompute=everything, fp32" in (untested(more) or "")


def test_every_choice_of_the_schema_is_in_the_matrix() -> None:
    """Catches a schedule, dtype or way to recompute that can be chosen and is not verified."""
    assert set(get_args(get_type_hints(ParallelConfig)["schedule"])) == set(PIPELINE) - {"-"}
    assert set(get_args(get_type_hints(RunConfig)["dtype"])) == set(DTYPES)
    ways = set(get_args(get_type_hints(RunConfig)["recompute"]))
    assert ways - {"offload"} == set(RECOMPUTE)
    elsewhere = replace(Arguments(), run=replace(Arguments().run, recompute="offload", ffn_chunks=2))
    assert "recompute=offload, ffn_chunks=2" in (untested(elsewhere) or "")
    modes, _ = get_args(get_type_hints(ParallelConfig)["sharding"])  # or None
    assert {"dp", *get_args(modes)} - {"none"} == set(DATA) - {"-"}
    assert TENSOR[0] == PIPELINE[0] == DATA[0] == "-"


def test_the_header_of_a_run_warns(tmp_path: Path) -> None:
    """Catches a warning that nobody is shown; a verified run has none."""
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("some text " * 99)
    data = DataConfig(data=str(tmp_path), cache=str(tmp_path / ".cache"), held_out=0.3)
    args = replace(Arguments(), parallel=ParallelConfig(tp=2, dp=1), data=data)
    args = replace(args, model=replace(args.model, vocab=257))
    assert "warning" not in _header(args)
    assert "not among the verified combinations: tp, reduce_dtype=bf16, fp32" in _header(
        replace(args, parallel=replace(args.parallel, reduce_dtype="bf16"))
    )
    assert "a vocabulary of 50,257, of which the tokenizer byte uses 257" in _header(
        replace(args, model=replace(args.model, vocab=50257))
    )


def _header(args: Arguments) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(header(args, Text.open(args), resume=None, after=0, aside=None))
    return console.export_text()
