"""P16 under asynchronous saves: exactly that step's state, one at a time, all ranks or none; and what a disk may do.

Each test names the fault that it catches.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from drill_saves import drilled
from fsspec.implementations.local import LocalFileOpener

from stretto.checkpoint import CheckpointError, Saver, latest_complete, load
from stretto.checkpoint.directory import Retention
from stretto.checkpoint.places import place, write_atomically
from stretto.checkpoint.writer_process import HOOKS
from stretto.params import Slice
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

N = 1000
HERE = str(Path(__file__).parents[1] / "drills")


def piece(world: World, value: float) -> Slice:
    return Slice("model/w", torch.full((N, 3), value), (N * world.size, 3), (N * world.rank, 0), True)


def value_of(path: Path | None) -> tuple[float, int]:
    """The one value that a checkpoint holds, and what is beside it."""
    assert path is not None
    size = int(path.parent.joinpath("size").read_text())
    whole = Slice("model/w", torch.full((N * size, 3), -1.0), (N * size, 3), (0, 0), True)
    step = load(path, [whole], World.single())["step"]
    assert whole.tensor.min() == whole.tensor.max()
    return float(whole.tensor[0, 0]), step


@contextmanager
def hooked(*names: str) -> Iterator[None]:
    """Writers that start within have a slow or a full disk."""
    before = {name: os.environ.get(name) for name in (HOOKS, "PYTHONPATH")}
    os.environ[HOOKS] = ",".join(names)
    os.environ["PYTHONPATH"] = os.pathsep.join([HERE, before["PYTHONPATH"] or ""])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def go_on_at_once(world: World, directory: Path) -> list[int]:
    (directory / "size").write_text(str(world.size))
    saver, held = Saver(world, retention=Retention(2, 10)), piece(world, 0.0)
    steps = []
    for step in (10, 11, 12, 13):
        held.tensor.fill_(step)
        saver.begin(directory, step, [held], {"step": step})
        held.tensor.fill_(-7)  # the next step, at once
        steps += [saved.step for saved in saver.poll()]
    steps += [saved.step for saved in saver.finish()]
    saver.close()
    return steps


def test_what_is_saved_is_the_state_of_that_step(pool: Pool, tmp_path: Path) -> None:
    """Catches: a staged copy that is the live tensor; a part of another step; a save that is told by nobody."""
    told = pool.run(2, go_on_at_once, tmp_path)
    assert told == [[10, 11, 12, 13], []]
    names = sorted(p.name for p in tmp_path.glob("step-*"))
    assert names == ["step-00000010", "step-00000012", "step-00000013"]  # the newest two, and the tenth
    for name in names:
        step = int(name[-2:])
        assert value_of(tmp_path / name) == (float(step), step)
        assert {f.name.split("_")[0] for f in (tmp_path / name).iterdir() if f.name.startswith("__")} == {""}
        assert not [f.name for f in (tmp_path / name).iterdir() if f.suffix == ".json" and f.name.startswith("__")]


@pytest.mark.parametrize("moment", [0.0, 0.01, 0.03, 0.1])
def test_signals_for_the_trainer_leave_its_writer_alone(tmp_path: Path, moment: float) -> None:
    """SLURM warns every process of a step. Catches: a warned job whose writer has only just started, which fails."""
    (tmp_path / "size").write_text("1")
    saver = Saver(World.single())
    try:
        saver.begin(tmp_path, 1, [piece(World.single(), 1.0)], {"step": 1})
        assert saver._writer is not None
        time.sleep(moment)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(saver._writer.pid, number)
        saver.finish()
    finally:
        saver.close()
    assert value_of(latest_complete(tmp_path).path) == (1.0, 1)


def kill_writer(world: World, directory: Path, victim: int) -> tuple[str, bool]:
    """What `begin` says after the writer of a rank was killed in the save before."""
    (directory / "size").write_text(str(world.size))
    with hooked("slow_disk"):
        saver = Saver(world)
        saver.begin(directory, 1, [piece(world, 1.0)], {"step": 1})
        saver.finish()
        saver.begin(directory, 2, [piece(world, 2.0)], {"step": 2})
        if world.rank == victim:
            assert saver._writer is not None
            os.kill(saver._writer.pid, signal.SIGKILL)
            until = time.monotonic() + 10
            while not saver.failed and time.monotonic() < until:
                saver.poll()
                time.sleep(0.01)
    failed = saver.failed
    try:
        saver.begin(directory, 3, [piece(world, 3.0)], {"step": 3})
    except CheckpointError as error:
        return str(error), failed
    finally:
        saver.close()
    return "", failed


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_is_killed_is_an_error_on_all_ranks(pool: Pool, tmp_path: Path, victim: int) -> None:
    """Catches: ranks that wait for ever for a part; a rank that does not know that it should stop."""
    said = pool.run(2, kill_writer, tmp_path, victim, timeout=60)
    assert len({message for message, _ in said}) == 1
    assert f"rank {victim}: the writer process" in said[0][0]
    assert "was ended by SIGKILL" in said[0][0]
    assert said[victim][1]
    assert value_of(latest_complete(tmp_path).path) == (1.0, 1)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000001"]


def fill_disk(world: World, directory: Path) -> str:
    (directory / "size").write_text(str(world.size))
    saver = Saver(world)
    saver.begin(directory, 1, [piece(world, 1.0)], {"step": 1})
    saver.finish()
    saver.close()
    with hooked(*["full_disk"] * (world.rank == 1)):
        saver = Saver(world)
        saver.begin(directory, 2, [piece(world, 2.0)], {"step": 2})
    try:
        saver.finish()
    except CheckpointError as error:
        return str(error)
    finally:
        saver.close()
    return ""


def test_a_full_disk_leaves_the_checkpoint_before(pool: Pool, tmp_path: Path) -> None:
    """On one rank of two. Catches: a marker over a part that is cut short; a rank that hears nothing of it."""
    said = pool.run(2, fill_disk, tmp_path, timeout=60)
    assert len(set(said)) == 1
    assert "saving step 2" in said[0]
    assert "rank 1: OSError: [Errno 27] File too large; free space there" in said[0]
    assert value_of(latest_complete(tmp_path).path) == (1.0, 1)


def on_a_slow_disk(world: World, directory: Path) -> list[tuple[int, float, float]]:
    (directory / "size").write_text(str(world.size))
    with hooked("slow_disk"):
        saver, told = Saver(world), []
        for step in (1, 2, 3):
            saver.begin(directory, step, [piece(world, float(step))], {"step": step})
            told += saver.poll()
        told += saver.finish()  # the run ends with a save under way
        saver.close()
    return [(saved.step, saved.waited, saved.written) for saved in told]


def test_on_a_slow_disk_the_next_save_waits_and_says_so(pool: Pool, tmp_path: Path) -> None:
    """Catches: two saves at once in one buffer; a wait that is not told; an end before the last one is whole."""
    first, second, third = pool.run(1, on_a_slow_disk, tmp_path, timeout=60)[0]
    assert [first[0], second[0], third[0]] == [1, 2, 3]
    assert first[1] < second[1]
    assert second[1] > 0.5 * first[2]
    assert third[1] > 0.5 * second[2]
    assert value_of(latest_complete(tmp_path).path) == (3.0, 3)


def through_fsspec(world: World, directory: Path) -> float:
    saver, url = Saver(world), f"file://{directory}"
    for step in (1, 2):
        saver.begin(url, step, [piece(world, float(step))], {"step": step})
    saver.finish()
    saver.close()
    found = latest_complete(url).path
    back = piece(world, -1.0)
    assert found is not None
    assert load(found, [back], world)["step"] == 2
    return float(back.tensor.max())


def test_a_writer_writes_through_fsspec(pool: Pool, tmp_path: Path) -> None:
    """Catches: a path that loses its protocol on its way to the writer."""
    assert pool.run(2, through_fsspec, tmp_path) == [2.0, 2.0]


def test_others_never_see_a_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: what a rank says it has written, read by another while it is written, through `file://` as well."""
    seen = []
    write = LocalFileOpener.write

    def slowly(self: LocalFileOpener, content: Any) -> int:
        half = len(content) // 2
        written = write(self, content[:half])
        self.f.flush()
        seen.append((tmp_path / "said").exists())
        return int(written + write(self, content[half:]))

    monkeypatch.setattr(LocalFileOpener, "write", slowly)
    for text in (b"{}" * 50, b"[]" * 60):
        write_atomically(place(f"file://{tmp_path}") / "said", text)
        assert (tmp_path / "said").read_bytes() == text
    assert seen[0] is False
    assert [file.name for file in tmp_path.iterdir()] == ["said"]


def test_drills_of_a_few_seeds(pool: Pool, tmp_path: Path) -> None:
    """SIGKILL of the trainer or its writer at random moments; `make drills` does 200."""
    [verdicts] = pool.run(1, drilled, tmp_path, range(6), timeout=240)
    assert [v for v in verdicts if v.wrong] == []
    assert any(v.cut for v in verdicts), "no kill met a save under way"
