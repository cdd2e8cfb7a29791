"""Where stages lie and what they hold, as a run finds it before it begins.

Each test names the fault that it catches.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stretto.arguments import ConfigError, Resolved, parse
from stretto.arguments.sources import SourceKind
from stretto.estimate import stage_counts, stage_pieces
from stretto.layout import Layout
from stretto.schedule.measured import cost_text
from stretto.schedule.pieces import Pieces
from stretto.schedule.placements import PLACEMENTS
from stretto.train.consensus import RunRejectedError
from stretto.train.placing import place, placed, placements, with_stages
from stretto.world import World

pytestmark = pytest.mark.pure

SIZES = ["--pp", "2", "--layers", "8", "--hidden", "64", "--heads", "2", "--global-batch", "8", "--micro-batch", "1"]
HEAVY = Pieces((1.0, 1.0, 0.7), head=(6.0, 0.0, 0.0), hop=0.01)


def resolved(*words: str) -> Resolved:
    return parse([*SIZES, "--seq-len", "16", "--schedule", *words], world_size=2, files=False)


def alone(found: Resolved) -> Resolved:
    """Placed by one process, which is rank 0."""
    return placed(found, World.single())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["auto"], list(PLACEMENTS)),
        (["auto", "--vpp", "2"], [(2, "v"), (2, "loop")]),
        (["auto", "--vpp", "4"], [(4, "loop")]),
        (["auto", "--vpp", "6"], [(6, "loop")]),
        (["auto", "--vpp-shape", "v"], [(2, "v")]),
        (["auto", "--vpp", "2", "--vpp-shape", "loop"], [(2, "loop")]),
        (["auto", "--stage-layers", "3,2,2,1"], [(2, "v")]),
        (["zbv"], [(2, "v")]),
        (["interleaved", "--vpp", "3"], [(3, "loop")]),
    ],
)
def test_what_is_said_is_not_searched(words: list[str], expected: list[tuple[int, str]]) -> None:
    """Catches a search that overrides the user, and one that leaves out what he left open."""
    assert placements(resolved(*words)) == expected


def test_a_file_of_costs_decides(tmp_path: Path) -> None:
    """A run measured two stages a rank; the next lies where those costs say. Catches an estimate in place of the file,
    a layout that stays, a value that a resumed run takes for the user's."""
    costs = str(tmp_path / "costs.json")
    Path(costs).write_text(cost_text(HEAVY.cost((2, 2, 2, 2)), (2, 2, 2, 2)))
    found = alone(resolved("auto", "--schedule-costs", costs, "--partition", "searched"))
    p = found.args.parallel
    assert p.stage_layers is not None
    held = list(stage_counts(found.args))
    assert held == list(p.stage_layers)
    by_rank = [sum(n for n, home in zip(held, found.layout.placement, strict=True) if home == r) for r in (0, 1)]
    assert sorted(by_rank) == [3, 5]  # the rank of the head, which takes as much as 2.2, has three
    assert found.layout == Layout.of(pp=2, vpp=p.vpp or 1, shape=p.vpp_shape or "loop")
    assert found.sources["parallel.stage_layers"].kind is SourceKind.DERIVED
    assert {"parallel.vpp", "parallel.vpp_shape", "parallel.stage_layers"} <= set(found.record().derived)
    assert with_stages(resolved("auto"), 3, "loop", None, "so").layout == Layout.of(pp=2, vpp=3)
    named = alone(resolved("1f1b", "--schedule-costs", costs, "--partition", "searched"))
    assert named.args.parallel.stage_layers == (5, 3)


def test_without_a_file_an_estimate_decides() -> None:
    """Catches a placement that none of the costs speaks for: here messages cost more than layers do."""
    there = resolved("auto")
    assert stage_pieces(there.args).hop > 1
    assert alone(there).layout.vpp < 3
    gpu = replace(there.args, run=replace(there.args.run, device="cuda"))
    wide = replace(gpu.model, layers=16, hidden=4096, heads=32, ffn=14336)
    large = replace(
        gpu,
        model=wide,
        batch=replace(gpu.batch, seq_len=8192),
        parallel=replace(gpu.parallel, pp=4, schedule_memory=8.0),
    )
    assert stage_pieces(large).hop < 0.1
    assert place(large, PLACEMENTS, None).v == 4


def test_what_cannot_be_is_told() -> None:
    """Catches a traceback in place of a message, and a shape that no schedule has."""
    tight = resolved("auto", "--vpp", "4", "--schedule-memory", "1")
    with pytest.raises(RunRejectedError, match="keeps within 4 activations of a stage"):
        placed(
            replace(tight, args=replace(tight.args, parallel=replace(tight.args.parallel, partition="searched"))),
            World.single(),
        )
    for words, message in (
        (["zbv", "--vpp-shape", "loop"], "vpp_shape = loop, but zbv with vpp = 2 has v"),
        (["auto", "--vpp", "4", "--vpp-shape", "v"], "vpp_shape = v, but auto with vpp = 4 has loop"),
        (["zbv", "--schedule-memory", "2"], "schedule = zbv searches no order"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolved(*words)
