"""P14: what any layout wrote, any other reads, bit for bit."""

from __future__ import annotations

import itertools
import math
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.distributed import ProcessGroup

from stretto.checkpoint import load, save
from stretto.params import Slice
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

DTYPES = ("float32", "bfloat16", "float64", "int64", "float16", "bool")


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor, and who holds it; the first holder is its owner."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    holders: tuple[int, ...]


@dataclass(frozen=True)
class Logical:
    """A logical tensor, cut in one way where it is written and in another where it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    written: tuple[Piece, ...]
    read: tuple[Piece, ...]

    def content(self) -> torch.Tensor:
        """Random bits: NaNs with payloads, denormals and negative zeros among them."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        dtype = getattr(torch, self.dtype)
        if dtype is torch.bool:
            return torch.randint(0, 2, self.shape, generator=generator).bool()
        count = math.prod(self.shape) * dtype.itemsize
        bits = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
        return bits.view(dtype).reshape(self.shape)


def pieces(draw: st.DrawFn, shape: tuple[int, ...], ranks: int) -> tuple[Piece, ...]:
    """A random grid over a tensor: uneven, with empty cells, each held by some of the ranks."""
    edges = [[0, *sorted(draw(st.lists(st.integers(0, n), max_size=3))), n] for n in shape]
    cells = []
    for cell in itertools.product(*(list(itertools.pairwise(e)) for e in edges)):
        holders = draw(st.lists(st.integers(0, ranks - 1), min_size=1, unique=True))
        cells.append(Piece(tuple(a for a, _ in cell), tuple(b - a for a, b in cell), tuple(holders)))
    return tuple(cells)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, tuple[Logical, ...]]:
    """Numbers of writers and of readers, and tensors cut for both."""
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    logical = []
    for i in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        logical.append(Logical(f"model/t.{i}", shape, dtype, pieces(draw, shape, n), pieces(draw, shape, m)))
    return n, m, tuple(logical)


def rectangle(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def write(world: World, directory: str, logical: tuple[Logical, ...], group: ProcessGroup | None = None) -> str:
    """Save strided views, as live storage often is, not tidy copies."""
    slices = [
        Slice(t.name, rectangle(t.content(), p), t.shape, p.offsets, p.holders[0] == world.rank)
        for t in logical
        for p in t.written
        if world.rank in p.holders
    ]
    return str(save(directory, 7, slices, {"step": 7, "rank": world.rank}, world, group=group))


def read(world: World, path: str, logical: tuple[Logical, ...], group: ProcessGroup | None = None) -> list[str]:
    """What is not as it was written: here, inside a slice or outside of all."""
    wrong, slices, checks = [], [], []
    for t in logical:
        for p in t.read:
            if world.rank in p.holders:
                frame = torch.zeros_like(t.content())
                expected = frame.clone()
                rectangle(expected, p).copy_(rectangle(t.content(), p))
                slices.append(Slice(t.name, rectangle(frame, p), t.shape, p.offsets, owner=False))
                checks.append((t.name, p, frame, expected))
    extra = load(path, slices, world, group=group)
    if extra != {"step": 7, "rank": 0}:
        wrong.append(f"extra {extra}")
    wrong += [f"{name} {p}" for name, p, frame, want in checks if not torch.equal(bits(frame), bits(want))]
    return wrong


WHOLE = (Piece((), (), (0,)),)
EMPTY_AND_FULL_AT_ONE_OFFSET = Logical(
    "model/embed",
    (0, 4),
    "float32",
    (Piece((0, 0), (0, 0), (0,)), Piece((0, 0), (0, 4), (1, 0))),
    (Piece((0, 0), (0, 4), (0,)),),
)


@given(case=cases())
@example(case=(1, 1, (Logical("optimizer.step", (), "int64", WHOLE, WHOLE),)))
@example(case=(2, 1, (EMPTY_AND_FULL_AT_ONE_OFFSET,)))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_layout_reads_what_any_other_wrote(pool: Pool, case: tuple[int, int, tuple[Logical, ...]]) -> None:
    n, m, logical = case
    with tempfile.TemporaryDirectory() as directory:
        path, *_ = pool.run(n, write, directory, logical)
        assert Path(path).name == "step-00000007"
        assert pool.run(m, read, path, logical) == [[]] * m


def test_two_column_shards_become_three_row_shards(pool: Pool, tmp_path: Path) -> None:
    columns = (Piece((0, 0), (6, 2), (0,)), Piece((0, 2), (6, 2), (1,)))
    rows = tuple(Piece((r, 0), (2, 4), (i,)) for i, r in enumerate((0, 2, 4)))
    weight = Logical("model/model.layers.0.mlp.up_proj.weight", (6, 4), "bfloat16", columns, rows)
    path, *_ = pool.run(2, write, str(tmp_path), (weight,))
    assert pool.run(3, read, path, (weight,)) == [[], [], []]
    assert sorted(f.name for f in Path(path).iterdir()) == [
        ".metadata",
        "COMPLETE",
        "__0_0.distcp",
        "__1_0.distcp",
        "extra.json",
        "index.jsonl",
    ]


def two_worlds(whole: World, directory: str, logical: tuple[Logical, ...]) -> list[str]:
    """Ranks 0 and 2 are one world, 1 and 3 another; each saves and loads its own, at the same time."""
    halves = [(0, 2), (1, 3)]
    groups = [dist.new_group(list(ranks)) for ranks in halves]
    mine = whole.rank % 2
    world = replace(whole, rank=whole.rank // 2, size=2, ranks=halves[mine])
    with pytest.raises(ValueError, match=r"2 ranks but the process group 4: pass group="):
        write(world, directory, logical)
    path = write(world, f"{directory}/{mine}", logical, groups[mine])
    return read(world, path, logical, groups[mine])


def test_a_world_inside_a_larger_pool_of_processes(pool: Pool, tmp_path: Path) -> None:
    columns = (Piece((0, 0), (3, 1), (0, 1)), Piece((0, 1), (3, 1), (1, 0)))
    rows = (Piece((0, 0), (2, 2), (0,)), Piece((2, 0), (1, 2), (1,)))
    weight = Logical("model/w", (3, 2), "float32", columns, rows)
    assert pool.run(4, two_worlds, str(tmp_path), (weight,)) == [[]] * 4


def test_a_single_process_needs_no_process_group(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    weight = torch.randn(3, 5, requires_grad=True)
    path = save(tmp_path, 1, [Slice("model/w", weight, (3, 5), (0, 0), True)], {"lr": 0.1}, World.single())
    back = torch.zeros(5)
    row = Slice("model/w", back[None], (3, 5), (2, 0), True)
    assert load(path, [row], World.single()) == {"lr": 0.1}
    assert torch.equal(back, weight[2])


def test_plain_torch_reads_it(pool: Pool, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    halves = (Piece((0,), (2,), (0,)), Piece((2,), (0,), (1,)), Piece((2,), (3,), (1,)))
    weight = Logical("model/w", (5,), "float32", halves, ())
    path, *_ = pool.run(2, write, str(tmp_path), (weight,))
    state = {"model/w": torch.zeros(5)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=path)
    assert torch.equal(bits(state["model/w"]), bits(weight.content()))


def test_live_tensors_that_need_gradients_are_filled_in_place(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(4))
    saved = parameter.detach().clone()
    path = save(tmp_path, 1, [Slice("model/w", parameter, (4,), (0,), True)], {}, World.single())
    with torch.no_grad():
        parameter.zero_()
    load(path, [Slice("model/w", parameter, (4,), (0,), True)], World.single())
    assert torch.equal(parameter, saved)
    assert parameter.requires_grad
