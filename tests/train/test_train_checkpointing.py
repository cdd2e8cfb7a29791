"""What docs/checkpoints.md says lies in a checkpoint is what lies there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.checkpoint import CheckpointError, save
from stretto.checkpoint.index import Index
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.train.build import build
from stretto.train.checkpointing import require_fits
from stretto.world import World

pytestmark = pytest.mark.gloo

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def test_the_page_names_what_the_code_writes(tmp_path: Path) -> None:
    """Catches: prefixes or files that were renamed, and a page that was not; and a count that is not the model's."""
    args = parse(["--preset", "tiny"], env={}).args
    state = ParallelState.build(Layout.of(), world := World.single())
    built = build(args, state)
    path = save(tmp_path, 150, built.optimizer.slices(), {}, world)
    listing = PAGE.split("```")[1]
    shown = {
        re.sub(r"__\d+_", "__N_", name) for line in listing.splitlines()[3:] for name in re.findall(r"^ +(\S+)", line)
    }
    assert {re.sub(r"__\d+_", "__N_", file.name) for file in path.iterdir()} == shown
    assert path.name in listing
    tensors = Index(path).tensors
    said = set(re.findall(r"`(\w+)/[^`]*`", PAGE.split("Tensors carry logical names")[1].splitlines()[0]))
    assert {name.partition("/")[0] for name in tensors} == said
    require_fits(args, path)
    huge = parse(["--preset", "tiny", "--layers", "16384"], env={}).args
    with pytest.raises(CheckpointError, match="holds a model of"):
        require_fits(huge, path)
