"""Which checkpoint is the newest whole one, and which may go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stretto.checkpoint import CheckpointError, Found, latest_complete, load, prune, save
from stretto.params import Slice
from stretto.world import World

pytestmark = pytest.mark.gloo

HERE = World.single()


def write(directory: Path, step: int, value: float = 0.0) -> Path:
    return save(directory, step, [Slice("model/w", torch.full((2,), value), (2,), (0,), True)], {}, HERE)


def value(path: Path | Found) -> float:
    w = torch.full((2,), -1.0)
    load(path, [Slice("model/w", w, (2,), (0,), True)], HERE)
    return float(w[0])


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest_complete(tmp_path / "absent").path is None
    with pytest.raises(CheckpointError, match="no whole checkpoint was found"):
        value(latest_complete(tmp_path))
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-00000001").write_text("a file")
    assert latest_complete(tmp_path).path is None


def test_newest_is_by_number_of_steps_not_by_text(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999)
    newest = write(tmp_path, 100_000_000)
    assert latest_complete(tmp_path).path == newest
    assert value(latest_complete(tmp_path)) == 0.0


def test_it_says_which_newer_ones_were_skipped_and_why(tmp_path: Path) -> None:
    older, half, cut = (write(tmp_path, s) for s in (10, 20, 30))
    (half / "COMPLETE").unlink()
    (cut / "__0_0.distcp").write_bytes(b"x")
    found = latest_complete(tmp_path)
    assert found.path == older
    assert [s.path for s in found.skipped] == [cut, half]
    assert "__0_0.distcp has 1 bytes, " in found.skipped[0].reason
    assert "did not finish" in found.skipped[1].reason
    assert [str(skipped).count(str(tmp_path)) for skipped in found.skipped] == [1, 1]


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    paths = {step: write(tmp_path, step) for step in (10, 20, 30, 40, 50, 60)}
    (paths[20] / "COMPLETE").unlink()  # unfinished, old: goes
    (paths[40] / "__0_0.distcp").write_bytes(b"x")  # damaged: stays to be looked at, does not count
    (paths[60] / "COMPLETE").unlink()  # unfinished, newest: may be being written
    assert set(prune(tmp_path, keep=2)) == {paths[20], paths[10]}
    assert names(tmp_path) == [paths[s].name for s in (30, 40, 50, 60)]


def test_prune_without_a_whole_one_removes_nothing(tmp_path: Path) -> None:
    (write(tmp_path, 1) / "COMPLETE").unlink()
    assert prune(tmp_path, keep=1) == ()
    with pytest.raises(ValueError, match="keep=0"):
        prune(tmp_path, keep=0)


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    write(tmp_path, 5, 1.0)
    path = write(tmp_path, 5, 2.0)
    assert value(path) == 2.0
    assert names(tmp_path) == [path.name]


def test_until_the_new_one_is_whole_the_one_it_replaces_counts(tmp_path: Path) -> None:
    """As a crash leaves it: the former one aside, the new one without a marker."""
    path = write(tmp_path, 5, 1.0)
    aside = path.rename(tmp_path / "step-00000005.replaced")
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"x")
    assert latest_complete(tmp_path).path == aside
    assert value(aside) == 1.0
    assert value(write(tmp_path, 5, 2.0)) == 2.0
    assert names(tmp_path) == [path.name]


def test_prune_removes_a_replaced_one_once_the_new_one_is_whole(tmp_path: Path) -> None:
    aside = write(tmp_path, 5, 1.0).rename(tmp_path / "step-00000005.replaced")
    path = write(tmp_path / "elsewhere", 5, 2.0).rename(tmp_path / "step-00000005")
    assert latest_complete(tmp_path).path == path
    assert prune(tmp_path, keep=3) == (aside,)


def test_every_so_many_steps_one_stays(tmp_path: Path) -> None:
    """Catches: a multiple that goes, or one that takes the place of a newest one."""
    for step in (100, 150, 200, 250, 300, 350):
        write(tmp_path, step)
    prune(tmp_path, keep=2, keep_every=200)
    assert names(tmp_path) == ["step-00000200", "step-00000300", "step-00000350"]


def test_in_memory_by_a_url() -> None:
    """Through fsspec: save, load, replace, damage, prune. Catches: a path that is taken for a local one."""
    for step in (1, 2, 3, 4):
        write("memory://there/run", step, float(step))  # type: ignore[arg-type]
    write("memory://there/run", 4, 5.0)  # type: ignore[arg-type]
    newest = latest_complete("memory://there/run").path
    assert newest is not None
    assert value(newest) == 5.0
    (newest / "__0_0.distcp").write_bytes(b"x")
    found = latest_complete("memory://there/run")
    assert found.path is not None
    assert (value(found.path), len(found.skipped)) == (3.0, 1)
    assert [p.name for p in prune("memory://there/run", keep=1)] == ["step-00000002", "step-00000001"]


def test_a_protocol_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(CheckpointError, match="nosuch://x"):
        write("nosuch://x", 1)  # type: ignore[arg-type]


def test_a_model_is_no_checkpoint_that_was_not_finished(tmp_path: Path) -> None:
    """Catches: advice to load an earlier one, where there never was any."""
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match="the directory of a Hugging Face model, not a checkpoint"):
        load(tmp_path, [], HERE)
