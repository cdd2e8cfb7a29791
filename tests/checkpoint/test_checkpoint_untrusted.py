"""A checkpoint of somebody else, or a link to one: nothing outside its directory is read or removed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from stretto.checkpoint import CheckpointError, prune, save
from stretto.checkpoint.reader import SafeReader
from stretto.params import Slice
from stretto.world import World

pytestmark = pytest.mark.gloo


def saved(directory: Path, step: int) -> Path:
    return save(directory, step, [Slice("model/w", torch.ones(2), (2,), (0,), True)], {}, World.single())


def test_prune_leaves_the_target_of_a_link_whole(tmp_path: Path) -> None:
    """Catches: the marker removed inside the target, then rmtree that rejects the link."""
    target = saved(tmp_path / "other", 1)
    new = saved(tmp_path / "own", 2)
    (tmp_path / "own" / target.name).symlink_to(target)
    assert prune(tmp_path / "own", keep=1) == ()
    assert (target / "COMPLETE").exists()
    assert new.exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/b", ".."])
def test_metadata_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    """Catches: a path of `.metadata` that is joined to the directory as it stands."""
    path = saved(tmp_path, 1)
    metadata = SafeReader(path).read_metadata()
    assert metadata.storage_data
    for info in metadata.storage_data.values():
        info.relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="does not lie beside it"):
        SafeReader(path).read_metadata()
