"""Of a tensor in many pieces a rank reads the runs that lie near its own, and nothing in a run is believed.

Faults to catch: a rank that reads every piece; a run that is left out because its rectangle is too small; a run whose
bytes are not compared; pieces of two runs that overlap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_forgery import vouch
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from

from stretto.checkpoint import CheckpointError, load, save
from stretto.checkpoint.index import RUN, Index, Piece, bounds, checksum
from stretto.checkpoint.marker import read_marker
from stretto.params import Slice
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS, WIDTH, COLUMNS = 300, 6, 2
WHOLE = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)


def cut(rows: int, columns: int) -> list[Slice]:
    """The tensor as rows x columns pieces, in an order that no rank would have."""
    found = []
    for c, block in enumerate(WHOLE.tensor_split(columns, 1)):
        at = 0
        for piece in block.tensor_split(rows, 0):
            found.append(Slice("model/w", piece.contiguous(), (ROWS, WIDTH), (at, c * (WIDTH // columns)), True))
            at += len(piece)
    return found[::-1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = Slice("model/one", torch.ones(3), (3,), (0,), True)
    return save(tmp_path_factory.mktemp("runs"), 1, [*cut(ROWS, COLUMNS), one], {}, World.single())


@given(first=integers(0, ROWS - 1), rows=integers(1, ROWS), left=integers(0, WIDTH - 1), columns=integers(1, WIDTH))
@settings(max_examples=20, deadline=None)
def test_any_rectangle_is_read_from_the_runs_near_it(
    saved: Path, first: int, rows: int, left: int, columns: int
) -> None:
    wanted = WHOLE[first : first + rows, left : left + columns]
    into = Slice("model/w", torch.zeros(wanted.shape), (ROWS, WIDTH), (first, left), True)
    near = Index(saved).near("model/w", [(into.offsets, tuple(wanted.shape))])
    assert len(near.pieces) <= COLUMNS * len(wanted) + 2 * RUN
    load(saved, [into, Slice("model/one", torch.zeros(3), (3,), (0,), True)], World.single())
    assert torch.equal(into.tensor, wanted)


def test_the_whole_is_read_as_before(saved: Path) -> None:
    index = Index(saved)
    assert len(index.tensor("model/w").pieces) == ROWS * COLUMNS
    assert index.near("model/one", []) == index.tensor("model/one")


@given(n=integers(1, 5), dims=sampled_from([0, 1, 3]))
def test_the_rectangle_around_pieces_holds_them(n: int, dims: int) -> None:
    pieces = [Piece((i,) * dims, (i + 1,) * dims, "f", 0, ()) for i in range(n)]
    assert bounds(pieces) == ([0] * dims, [2 * n - 1] * dims)


def damaged(saved: Path, tmp_path: Path, change: Callable[[list[list[Any]], bytearray], object]) -> str:
    path = tmp_path / saved.name
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    content, at = (path / "index.jsonl").read_bytes(), read_marker(path).table
    lines, table = bytearray(content[:at]), json.loads(content[at:])
    change(table["runs"]["model/w"], lines)
    vouch(path, bytes(lines) + json.dumps(table).encode(), at)
    into = Slice("model/w", torch.zeros(ROWS, WIDTH), (ROWS, WIDTH), (0, 0), True)
    with pytest.raises(CheckpointError) as raised:
        load(path, [into, Slice("model/one", torch.zeros(3), (3,), (0,), True)], World.single())
    return str(raised.value)


def copied(saved: Path) -> Callable[[list[list[Any]], bytearray], object]:
    """A run that says what another one, no longer than it, says."""

    def change(runs: list[list[Any]], lines: bytearray) -> None:
        line = Index(saved)._lines["model/w"][2]
        starts = [line + 1 + sum(size + 1 for size, *_ in runs[:n]) for n in range(len(runs))]
        short, long = sorted((0, 1), key=lambda n: runs[n][0])
        text = bytes(lines[starts[short] :][: runs[short][0]]).ljust(runs[long][0])
        lines[starts[long] : starts[long] + len(text)] = text
        runs[long][1] = checksum(text)

    return change


WRONG: list[tuple[Callable[[list[list[Any]], bytearray], object], str]] = [
    (lambda runs, _: runs[1].__setitem__(3, [0, 0]), "the files hold [0-9]+ of the 1800 elements"),
    (lambda runs, _: runs.pop(), "the files hold"),
    (lambda runs, _: runs[0].__setitem__(1, "0" * 16), "its line is not what was written"),
    (lambda runs, _: runs[0].__setitem__(0, 10**9), "longer than its line"),
    (lambda runs, _: runs[0].__setitem__(0, -1), "is no size"),
    (lambda runs, _: runs[0].__setitem__(2, "x"), "cannot be read"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_a_run_that_is_not_what_it_says_is_told(
    saved: Path, tmp_path: Path, change: Callable[[list[list[Any]], bytearray], object], problem: str
) -> None:
    assert re.search(problem, damaged(saved, tmp_path, change))


def test_pieces_of_two_runs_that_overlap_are_told(saved: Path, tmp_path: Path) -> None:
    assert "overlaps" in damaged(saved, tmp_path, copied(saved))
