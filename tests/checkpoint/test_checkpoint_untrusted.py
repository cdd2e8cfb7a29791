"""A checkpoint of somebody else, or a link to one: nothing in it is unpickled, and no size in it is believed."""

from __future__ import annotations

import io
import math
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_forgery import Change, rewrite, vouch
from hypothesis import given
from hypothesis import strategies as st

from stretto.checkpoint import CheckpointError, load, prune, save
from stretto.checkpoint.archive import archive
from stretto.checkpoint.pickled import pickled
from stretto.checkpoint.planner import numbers
from stretto.params import Slice
from stretto.testing import Pool
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


# --- index.jsonl ------------------------------------------------------------------------------------------------------


def rejection(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load(path, [Slice("model/w", torch.zeros(2), (2,), (0,), True)], World.single())
    assert str(path) in str(raised.value)
    return str(raised.value)


def piece(**said: Any) -> Change:
    """Something else in the one piece of the one tensor."""
    at = {"offsets": 0, "sizes": 1, "file": 2, "at": 3, "sums": 4}

    def change(lines: dict[str, Any], _: dict[str, Any]) -> None:
        for name, value in said.items():
            lines["model/w"][0][at[name]] = value

    return change


def tensor(at: int, value: object) -> Change:
    """Something else in the table's entry of the one tensor: its dtype, its shape."""
    return lambda _, table: table["tensors"]["model/w"].__setitem__(at, value)


WRONG: dict[str, Change] = {
    "a file elsewhere": lambda _, table: table["files"].__setitem__(0, "/etc/passwd"),
    "a file above": lambda _, table: table["files"].__setitem__(0, "../x"),
    "a file that is no text": lambda _, table: table["files"].__setitem__(0, ["x"]),
    "a number of no file": piece(file=7),
    "the last file, counted from the end": piece(file=-1),
    "a piece beyond the end of its file": piece(at=10**9),
    "a negative place": piece(at=-1),
    "a place that is not whole": piece(at=0.5),
    "a tensor of 10^18 elements": lambda lines, table: (
        table["tensors"]["model/w"].__setitem__(1, [10**18]),
        lines["model/w"][0].__setitem__(1, [10**18]),
    ),
    "a tensor with nothing in it": lambda lines, _: lines["model/w"].clear(),
    "a piece outside its tensor": piece(offsets=[1]),
    "a piece of other dims": piece(offsets=[0, 0], sizes=[2, 1]),
    "text for a size": piece(sizes=["x" * 10**6]),
    "a dtype that is a function": tensor(0, "load"),
    "no dtype": tensor(0, None),
    "a negative size": tensor(1, [-2]),
    "no tensor": lambda _, table: table["tensors"].__setitem__("model/w", 3),
    "no tensors": lambda _, table: table.__setitem__("tensors", None),
    "too few checksums": piece(sums=[]),
    "checksums that are none": piece(sums=[1]),
}


@pytest.mark.parametrize("what", WRONG)
def test_nothing_that_the_index_says_is_believed(tmp_path: Path, what: str) -> None:
    """Catches: sizes that are not held against the files, memory taken for them, and paths that lead elsewhere."""
    path = saved(tmp_path, 1)
    rewrite(path, WRONG[what])
    tracemalloc.start()
    message = rejection(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    assert len(message) < 600, message


INDEXES = {
    "nothing": b" ",
    "no JSON": b"{",
    "a list": b"[]",
    "100,000 lists in each other": b"[" * 100_000 + b"]" * 100_000,
    "not UTF-8": b"\xff\xfe",
    "a number of 10,000 digits": b'{"files": [' + b"9" * 10_000 + b'], "tensors": {}}',
}


@pytest.mark.parametrize("what", INDEXES)
def test_a_hostile_index_is_a_sentence(tmp_path: Path, what: str) -> None:
    path = saved(tmp_path, 1)
    vouch(path, INDEXES[what], 0)
    assert len(rejection(path)) < 600


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("exploded",)


def test_no_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.metadata` and the headers of tensors are there for plain PyTorch. Catches: one that is unpickled after all."""
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, 1)
    size = (path / ".metadata").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()).ljust(size, b"."))
    held = torch.zeros(2)
    load(path, [Slice("model/w", held, (2,), (0,), True)], World.single())
    assert held.tolist() == [1, 1]
    assert not Path("exploded").exists()


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.tuples(x)))
def test_what_is_pickled_for_others_is_what_pickle_reads(value: object) -> None:
    assert pickle.loads(pickled(value)) == value
    assert pickle.loads(pickled({"a": value})) == {"a": value}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 4), (5,), (), (2, 1, 3)])
def test_torch_reads_the_archive_of_a_piece(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    content = bytes(numbers(t))
    around = archive(str(dtype).removeprefix("torch."), shape, len(content))
    assert len(around.before) % 64 == 0
    assert torch.equal(torch.load(io.BytesIO(around.before + content + around.after), weights_only=True), t)


def test_torch_reads_an_archive_of_more_than_4_gib(tmp_path: Path) -> None:
    """Catches: sizes that do not fit the old fields of a zip archive. The file has a hole where the numbers are."""
    n = 2**32 + 8
    around = archive("uint8", (n,), n)
    with (tmp_path / "large").open("wb") as stream:
        stream.write(around.before)
        stream.seek(len(around.before) + n - 1)
        stream.write(b"\7" + around.after)
    t = torch.load(tmp_path / "large", weights_only=True, mmap=True)
    assert (t.numel(), int(t[-1])) == (n, 7)


# --- what ranks say to each other -------------------------------------------------------------------------------------


def without_pickles(world: World, directory: str) -> tuple[float, int]:
    """Save and load where nothing can be pickled into, or unpickled from, a collective; and how many ways are shut."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an object was sent as a pickle")

    mine = Slice("model/w", torch.full((2,), float(world.rank)), (4,), (2 * world.rank,), True)
    with pytest.MonkeyPatch.context() as patch:
        names = [name for name in vars(dist) if name.endswith(("_object", "_object_list"))]
        for name in names:
            patch.setattr(dist, name, never)
        patch.setattr(dist.distributed_c10d, "_object_to_tensor", never)
        patch.setattr(dist.distributed_c10d, "_tensor_to_object", never)
        path = save(directory, 1, [mine], {}, world)
        mine.tensor.fill_(-1)
        load(path, [mine], world)
    return float(mine.tensor[0]), len(names)


def test_ranks_save_and_load_without_a_pickle_between_them(pool: Pool, tmp_path: Path) -> None:
    """Catches: a plan that torch.distributed.checkpoint hands around."""
    values, names = zip(*pool.run(2, without_pickles, str(tmp_path)), strict=True)
    assert values == (0.0, 1.0)
    assert min(names) >= 4
