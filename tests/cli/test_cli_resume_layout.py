"""`--resume` with another layout is judged on top of what the checkpoint says, and not of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_programs import ENV, rows

from stretto.cli import main, training  # noqa: F401  # loaded before the fork, not after it in each program
from stretto.testing import Fresh

pytestmark = pytest.mark.gloo

MODEL = "--heads 4 --kv-heads 2 --hidden 32 --tp 2 --sequence-parallel --steps 2 --nproc 2"


@pytest.fixture(scope="module")
def out(fresh: Fresh, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps with tp=2 under sequence parallelism."""
    out = tmp_path_factory.mktemp("tp2") / "run"
    ended = fresh.run(main, [*options, *MODEL.split(), "--out", str(out)], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    return out


def test_any_layout_goes_on_without_the_preset_being_named(fresh: Fresh, out: Path) -> None:
    """The demo's 6 heads would reject --tp 4; the 4 heads of the checkpoint take it. Steps are those still to do."""
    for steps, layout in ((4, "--tp 4 --nproc 4"), (6, "--tp 1 --nproc 1"), (8, "--pp 2 --tp 1 --nproc 2")):
        words = ["train", "--resume", "--out", str(out), "--steps", str(steps), *layout.split()]
        ended = fresh.run(main, words, env=ENV)
        assert (ended.code, ended.err) == (0, "")
        assert [row["step"] for row in rows(out) if "loss" in row] == [*range(1, steps + 1)]


def test_what_the_checkpoint_does_not_go_with_is_rejected_in_its_terms(fresh: Fresh, out: Path) -> None:
    ended = fresh.run(main, ["train", "--resume", "--out", str(out), "--tp", "8", "--nproc", "8"], env=ENV)
    assert ended.code == 2
    assert "heads % tp = 4 % 8 = 4, must be 0" in ended.err
    assert "model.heads = 4 (checkpoint" in ended.err
