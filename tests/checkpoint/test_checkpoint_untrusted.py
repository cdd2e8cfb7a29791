"""A checkpoint of somebody else, or a link to one: nothing in it is unpickled, and no size in it is believed."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from stretto.checkpoint import CheckpointError, load, prune, save
from stretto.checkpoint.archive import unpack
from stretto.checkpoint.inert import decode
from stretto.checkpoint.marker import complete
from stretto.params import Slice
from stretto.reading import UnreadableError
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


# --- .metadata ------------------------------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[Any], object]) -> str:
    """The message for a checkpoint whose `.metadata` says something else, and whose marker vouches for it."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    return vouched(path, pickle.dumps(metadata))


def vouched(path: Path, metadata: bytes) -> str:
    (path / ".metadata").write_bytes(metadata)
    (path / "COMPLETE").unlink()
    complete(path, 1, 1, [])
    with pytest.raises(CheckpointError) as raised:
        load(path, [Slice("model/w", torch.zeros(2), (2,), (0,), True)], World.single())
    assert str(path) in str(raised.value)
    return str(raised.value)


def info(metadata: Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


def tensor(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["model/w"]


def huge(tensor: Any) -> Any:
    tensor.size = tensor.chunks[0].sizes = torch.Size([10**18])
    return tensor


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/b", ".."])
def test_metadata_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    """Catches: a path of `.metadata` that is joined to the directory as it stands."""
    assert "does not lie beside it" in changed(saved(tmp_path, 1), lambda m: setattr(info(m), "relative_path", name))


SIZES: dict[str, Callable[[Any], object]] = {
    "a piece beyond the end of its file": lambda m: setattr(info(m), "offset", 10**9),
    "a piece longer than its file": lambda m: setattr(info(m), "length", 10**9),
    "a negative offset": lambda m: setattr(info(m), "offset", -1),
    "a tensor of 10^18 elements": lambda m: m.state_dict_metadata.update({"model/w": huge(tensor(m))}),
    "a tensor with nothing in it": lambda m: tensor(m).chunks.clear(),
    "a piece outside its tensor": lambda m: setattr(tensor(m).chunks[0], "offsets", torch.Size([1])),
    "text for a size": lambda m: setattr(info(m), "length", "x" * 10**6),
    "no tensor": lambda m: m.state_dict_metadata.update({"model/w": 3}),
    "no storage": lambda m: setattr(m, "storage_data", None),
}


@pytest.mark.parametrize("what", SIZES)
def test_no_number_of_the_metadata_is_believed(tmp_path: Path, what: str) -> None:
    """Catches: sizes that are not held against the files, and memory taken for them."""
    path = saved(tmp_path, 1)
    tracemalloc.start()
    message = changed(path, SIZES[what])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    assert len(message) < 500, message


class Call:
    """What a pickle does as it is loaded."""

    def __init__(self, what: Callable[..., object], *args: object) -> None:
        self.call = what, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def framed(*instructions: bytes) -> bytes:
    return b"\x80\x04" + b"".join(instructions) + b"."


HOSTILE: dict[str, bytes] = {
    "a function": pickle.dumps(Call(os.mkdir, "exploded")),
    "a function behind an allowed name": framed(b"ctorch\nSize\n\x8c\x05posix\x8c\x05mkdir\x93\x8c\x01x\x85R"),
    "a class that is changed": framed(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"N}\x8c\x04nameK\x01s\x86b"
    ),
    "memory for a number": framed(b"Nr", (2**31 - 1).to_bytes(4, "little")),
    "a long text that is not there": framed(b"\x8d", (2**62).to_bytes(8, "little")),
    "a frame that is not there": framed(b"\x95", (2**62).to_bytes(8, "little"), b"N"),
    "100,000 lists in each other": framed(b"]" * 100_000, b"a" * 99_999),
    "a list in itself": framed(b"]\x94h\x00a"),
    "nothing": b"",
    "an instruction for a module": framed(b"(S'x'\nios\nsystem\n"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_metadata_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Catches: anything that is unpickled; the marker vouches for it, as who writes one file can write the other."""
    monkeypatch.chdir(tmp_path)
    before = dict(vars(Metadata))
    message = vouched(saved(tmp_path, 1), HOSTILE[what])
    assert not Path("exploded").exists()
    assert dict(vars(Metadata)) == before
    assert len(message) < 500, message


@given(st.data())
@settings(max_examples=20)
def test_a_damaged_pickle_raises_one_kind_of_error(data: st.DataObject) -> None:
    whole = pickle.dumps({"a": [1, (2, 3.5, None)], "b": torch.Size([4])})
    at = data.draw(st.integers(0, len(whole) - 1))
    hurt = whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + data.draw(st.integers(0, 6)) :]
    with suppress(UnreadableError):
        decode(hurt, {"torch.Size"})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), st.lists))
@settings(max_examples=20)
def test_plain_data_is_read_as_pickle_reads_it(value: object) -> None:
    for protocol in (2, 3, 4, 5):
        assert decode(pickle.dumps(value, protocol), ()) == value


# --- the pieces -----------------------------------------------------------------------------------------------------


def archive(t: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(t, stream)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.float8_e4m3fn])
def test_a_piece_is_what_torch_saved(dtype: torch.dtype) -> None:
    t = torch.arange(12).reshape(3, 4).to(dtype)
    for each in (t, t.t(), t[1], t[1, 2]):
        assert unpack(archive(each), dtype, each.shape).equal(each)


def repacked(**members: bytes) -> bytes:
    """A piece of two fp32 numbers, with some of its members replaced, and compressed where `compressed` is said."""
    stream, kind = io.BytesIO(), zipfile.ZIP_DEFLATED if members.pop("compressed", b"") else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(archive(torch.ones(2)))) as old, zipfile.ZipFile(stream, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.partition("/")[2].replace(".", "_").replace("/", "_"), old.read(name)))
    return stream.getvalue()


def header(**changes: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive(torch.ones(2)))) as old:
        pickled = old.read(next(n for n in old.namelist() if n.endswith("data.pkl")))
    for old_bytes, new_bytes in changes.items():
        assert old_bytes.encode() in pickled
        pickled = pickled.replace(old_bytes.encode(), new_bytes)
    return pickled


PIECES: dict[str, Callable[[], bytes]] = {
    "compressed, 1 GB in 1 MB": lambda: repacked(compressed=b"1", data_0=bytes(10**8)),
    "a header that calls": lambda: repacked(data_pkl=pickle.dumps(Call(os.mkdir, "exploded"))),
    "a header of another function": lambda: repacked(data_pkl=header(_rebuild_tensor_v2=b"_rebuild_parameter")),
    "no numbers": lambda: repacked(data_0=b""),
    "too few numbers": lambda: repacked(data_0=bytes(4)),
    "half a number": lambda: repacked(data_0=bytes(9)),
    "another byte order": lambda: repacked(byteorder=b"big"),
    "another shape": lambda: archive(torch.ones(3)),
    "a shape beyond the numbers": lambda: archive(torch.ones(1).expand(2)[:1].as_strided((1,), (1,))),
    "no archive": lambda: b"PK" * 100,
}


@pytest.mark.parametrize("what", PIECES)
def test_a_hostile_piece_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Catches: torch.load of a file of somebody else, and a zip that grows."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableError):
        unpack(PIECES[what](), torch.float32, (2,))
    assert not Path("exploded").exists()


def test_strides_that_leave_the_storage_are_refused() -> None:
    pickled = header()
    at = next(pos for op, arg, pos in pickletools.genops(pickled) if op.name == "BININT1" and arg == 1)  # the stride
    assert at is not None
    with pytest.raises(UnreadableError, match="was to be there"):
        unpack(repacked(data_pkl=pickled[: at + 1] + b"\x7f" + pickled[at + 2 :]), torch.float32, (2,))


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
