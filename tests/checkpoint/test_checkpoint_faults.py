"""P14, P16: a rank that fails, files that are damaged, tensors that differ: one error, on every rank, no hang."""

from __future__ import annotations

import contextlib
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_forgery import rewrite

from stretto.checkpoint import CheckpointError, latest_complete, load, save
from stretto.checkpoint.directory import step_path
from stretto.params import Slice
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo


def rows(world: World, name: str = "model/w", n: int = 8, fill: float = 1.0) -> Slice:
    """This rank's rows of an [n, 4] tensor cut evenly over the ranks."""
    mine = n // world.size
    return Slice(name, torch.full((mine, 4), fill), (n, 4), (world.rank * mine, 0), True)


def caught(world: World, fn: Callable[..., object], *args: object) -> str:
    """The message of the error; the pool shows only the first rank's, and all must have it."""
    try:
        fn(world, *args)
    except CheckpointError as error:
        return str(error)
    return "no error"


def on_all_ranks(pool: Pool, n: int, fn: Callable[..., object], *args: object) -> str:
    """The one message that every rank raised."""
    messages = set(pool.run(n, caught, fn, *args, timeout=30))
    assert len(messages) == 1, messages
    return messages.pop()


def save_rows(world: World, directory: str, step: int = 1, fill: float = 1.0) -> str:
    return str(save(directory, step, [rows(world, fill=fill)], {"step": step}, world))


def load_rows(world: World, path: str) -> float:
    mine = rows(world, fill=-1.0)
    load(path, [mine], world)
    assert mine.tensor.min() == mine.tensor.max()
    return float(mine.tensor[0, 0])


# --- differing tensors ------------------------------------------------------------------------------------------


def save_three(world: World, directory: str) -> str:
    names = ("model/a", "model/b", "optimizer.exp_avg/a")
    return str(save(directory, 1, [rows(world, name) for name in names], {}, world))


def load_others(world: World, path: str) -> None:
    """Rank 0 alone asks for a reshaped tensor, rank 1 alone for one that is not there; nobody for the moments."""
    slices = [rows(world, "model/a", n=4)] if world.rank == 0 else [rows(world, "model/c")]
    half = Slice("model/b", torch.zeros(8, 4, dtype=torch.bfloat16), (8, 4), (0, 0), True)
    load(path, [*slices, half], world)


def test_all_differing_tensors_are_listed_in_one_error_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    path, *_ = pool.run(2, save_three, str(tmp_path))
    message = on_all_ranks(pool, 2, load_others, path)
    for line in (
        "model/a: (8, 4) float32 in the checkpoint, (4, 4) float32 in this run",
        "model/b: (8, 4) float32 in the checkpoint, (8, 4) bfloat16 in this run",
        "model/c: absent in the checkpoint, (8, 4) float32 in this run",
        "optimizer.exp_avg/a: (8, 4) float32 in the checkpoint, absent in this run",
    ):
        assert message.count(line) == 1, message
    assert "4 tensors differ" in message


def load_weights_alone(world: World, path: str) -> None:
    slices = [rows(world, "model/a", fill=0.0)] + ([rows(world, "model/b")] if world.rank else [])
    load(path, slices, world, prefixes=("model/",))
    assert torch.equal(slices[0].tensor, torch.ones(4, 4))


def load_too_few_weights(world: World, path: str) -> None:
    load(path, [rows(world, "model/a")], world, prefixes=("model/",))


def test_a_prefix_loads_weights_without_moments_but_all_weights(pool: Pool, tmp_path: Path) -> None:
    path, *_ = pool.run(2, save_three, str(tmp_path))
    pool.run(2, load_weights_alone, path)  # model/b is asked for on rank 1 only: that is enough
    message = on_all_ranks(pool, 2, load_too_few_weights, path)
    assert "model/b: (8, 4) float32 in the checkpoint, absent in this run" in message
    assert "exp_avg" not in message


# --- slices that do not make a tensor -----------------------------------------------------------------------------

WRONG_SLICES = {
    "gap": "owners hold 16 of 32 elements of (8, 4)",
    "overlap": "overlaps",
    "outside": "does not lie inside (8, 4)",
    "disagree": "(8, 4) float32 on one rank, (9, 4) float32 on another",
    "orphan": "model/w: no rank is owner of any piece",
    "dims": "mixes numbers of dims",
}


def save_wrong(world: World, directory: str, fault: str) -> None:
    right = rows(world)
    wrong = {
        "gap": Slice("model/w", right.tensor, (8, 4), right.offsets, world.rank == 0),
        "overlap": Slice("model/w", torch.ones(5, 4), (8, 4), (3 * world.rank, 0), True),
        "outside": Slice("model/w", right.tensor, (8, 4), (5 * world.rank, 0), True),
        "disagree": Slice("model/w", right.tensor, (8 + world.rank, 4), right.offsets, True),
        "orphan": Slice("model/w", right.tensor, (8, 4), right.offsets, False),
        "dims": Slice("model/w", right.tensor, (8, 4), (0,), True),
    }
    save(directory, 2, [wrong[fault]], {}, world)


@pytest.mark.parametrize("fault", WRONG_SLICES)
def test_slices_that_do_not_tile_a_tensor_are_not_written(pool: Pool, tmp_path: Path, fault: str) -> None:
    message = on_all_ranks(pool, 2, save_wrong, str(tmp_path), fault)
    assert WRONG_SLICES[fault] in message
    assert not list(tmp_path.iterdir())


# --- a rank that fails while saving ------------------------------------------------------------------------------


def save_on_a_full_disk(world: World, directory: str, full: int) -> None:
    """Files of rank `full` may not grow beyond a page: as a full disk, an OSError in the middle of a write."""
    if world.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        save(directory, 2, [rows(world, n=8 * 1024)], {"pad": "x" * 5000}, world)
    finally:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("step", [1, 2])
def test_a_full_disk_on_one_rank_fails_all_and_spoils_nothing(pool: Pool, tmp_path: Path, full: int, step: int) -> None:
    """`step` 2: the checkpoint that fails was to replace one of the same step."""
    path, *_ = pool.run(2, save_rows, str(tmp_path), step, 3.0)
    message = on_all_ranks(pool, 2, save_on_a_full_disk, str(tmp_path), full)
    assert re.search(rf"saving step 2 .* failed\nrank {full}: ", message)
    found = latest_complete(tmp_path)
    assert (str(found.path), found.skipped) == (path, ())
    assert pool.run(2, load_rows, path) == [3.0, 3.0]
    pool.run(2, save_rows, str(tmp_path), 2, 4.0)  # and the next try succeeds
    assert pool.run(2, load_rows, str(latest_complete(tmp_path).path)) == [4.0, 4.0]


def save_unspeakable(world: World, directory: str) -> None:
    save(directory, 2, [rows(world)], {"lr": {1, 2}}, world)


def test_what_json_cannot_say_fails_before_anything_is_touched(pool: Pool, tmp_path: Path) -> None:
    assert "not JSON serializable" in on_all_ranks(pool, 2, save_unspeakable, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_ranks_that_name_different_checkpoints_are_told(pool: Pool, tmp_path: Path) -> None:
    path, *_ = pool.run(2, save_rows, str(tmp_path))
    shutil.copytree(path, tmp_path / "other")
    assert "different checkpoints" in on_all_ranks(pool, 2, load_one_of, path, str(tmp_path / "other"))


def load_one_of(world: World, *paths: str) -> None:
    load(paths[world.rank], [rows(world)], world)


def save_on_local_disks(world: World, directory: str) -> None:
    """A relative path and a working directory of its own: as the local disks of two nodes."""
    (own := Path(directory, f"node{world.rank}")).mkdir()
    with contextlib.chdir(own):
        save("checkpoints", 2, [rows(world)], {}, world)


def test_a_directory_that_ranks_do_not_share_is_told(pool: Pool, tmp_path: Path) -> None:
    message = on_all_ranks(pool, 2, save_on_local_disks, str(tmp_path))
    assert "1 of 2 files in checkpoints/step-00000002, such as __1_0.json" in message
    assert "all ranks share" in message


def save_different_steps(world: World, directory: str) -> None:
    save(directory, world.rank, [rows(world)], {}, world)


def test_ranks_at_different_steps_are_told(pool: Pool, tmp_path: Path) -> None:
    assert "different directories" in on_all_ranks(pool, 2, save_different_steps, str(tmp_path))
    assert not list(tmp_path.iterdir())


# --- damaged files -------------------------------------------------------------------------------------------------


def test_truncation_of_any_file_at_any_byte_is_seen_and_named(pool: Pool, tmp_path: Path) -> None:
    path = Path(pool.run(2, save_rows, str(tmp_path))[0])
    chance = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        lengths = {0, 1, len(whole) // 2, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(40))}
        for length in sorted(lengths):
            file.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=re.escape(str(file))):
                load(path, [rows(World.single(), fill=0.0)], World.single())
            found = latest_complete(tmp_path)
            assert found.path is None
            assert [s.path for s in found.skipped] == [path]
        file.write_bytes(whole)
    assert load_rows(World.single(), str(path)) == 1.0


def test_no_flipped_bit_of_a_tensor_passes_for_a_weight(pool: Pool, tmp_path: Path) -> None:
    """The size is right, so the directory looks whole: only reading finds it, and all ranks hear of it."""
    path = Path(pool.run(2, save_rows, str(tmp_path))[0])
    file = path / "__1_0.distcp"
    whole = file.read_bytes()
    begin = whole.index(torch.ones(16).numpy().tobytes())
    for at in random.Random(3).sample(range(begin, begin + 64), 20):  # all else in the file is for plain PyTorch
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        message = on_all_ranks(pool, 2, load_rows, str(path))
        assert re.search(rf"rank 1: {re.escape(str(file))}: the 64 bytes from \d+ on are not what was written", message)


def test_the_way_out_of_damage_is_a_command(tmp_path: Path) -> None:
    """What the message says is done, and loading goes on. Catches: the name of a checkpoint that is not whole."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step, [rows(World.single(), fill=float(step))], {}, World.single())
    (step_path(tmp_path, 2) / "COMPLETE").unlink()
    numbers = torch.full((4,), 3.0).numpy().tobytes()
    for step, name, at, earlier in ((4, "index.jsonl", b"[", 3), (3, "__0_0.distcp", numbers, 1)):
        file = step_path(tmp_path, step) / name
        content = bytearray(file.read_bytes())
        content[content.index(at)] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            load(file.parent, [rows(World.single())], World.single())
        said = f"restore the file from a copy, or go on from step {earlier}: (mv .*), and the newest whole"
        command = re.search(said, str(raised.value))
        assert command is not None, raised.value
        subprocess.run(command[1].split(), check=True)
        assert latest_complete(tmp_path).path == step_path(tmp_path, earlier)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "__1_0.distcp": lambda f: f.unlink(),
    "index.jsonl": lambda f: f.write_bytes(f.read_bytes()[::-1]),
    "extra.json": lambda f: f.write_text(f.read_text().replace("1", "2")),
    "COMPLETE": lambda f: f.write_text("{}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_an_error_on_every_rank_that_names_the_file(pool: Pool, tmp_path: Path, name: str) -> None:
    path = Path(pool.run(2, save_rows, str(tmp_path))[0])
    DAMAGE[name](path / name)
    message = on_all_ranks(pool, 2, load_rows, str(path))
    assert f"loading {path} failed\nrank 0: {path / name} " in message
    assert "load an earlier checkpoint" in message


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    path = save_rows(World.single(), str(tmp_path))
    marker = Path(path, "COMPLETE")
    marker.write_text(marker.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(CheckpointError, match="has format 99, this Stretto reads 2"):
        load_rows(World.single(), path)


def test_an_index_with_a_hole_is_not_filled_with_what_was_in_memory(pool: Pool, tmp_path: Path) -> None:
    path = Path(pool.run(2, save_rows, str(tmp_path))[0])
    rewrite(path, lambda lines, _: lines["model/w"].pop())
    message = on_all_ranks(pool, 2, load_rows, str(path))
    assert "model/w': owners hold 16 of 32 elements of (8, 4)" in message
