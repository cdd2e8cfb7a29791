"""Who reads what of a model's files, and what that costs: every byte once, in little memory.

Faults to catch: each holder of a rectangle reads all of it; shares that go to the wrong place of a packet; a ring that
hands on the wrong share; a buffer as large as what is read.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path

import interop_oracle as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_interop_files import whole
from torch import Tensor

from stretto.interop.config import read_config
from stretto.interop.files import SINGLE, TensorFiles
from stretto.interop.load import load_weights
from stretto.interop.pread import runs
from stretto.interop.shapes import logical_shapes
from stretto.interop.share import Key, packets
from stretto.layout import Layout
from stretto.models import StageSpec, Transformer
from stretto.parallel_state import ParallelState
from stretto.params import collect, slices
from stretto.tensor_parallel import Build
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo


@given(st.data())
def test_a_rectangle_is_runs_of_its_elements(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    firsts = [data.draw(st.integers(0, n - 1)) for n in shape]
    dims = [(first, data.draw(st.integers(1, n - first))) for first, n in zip(firsts, shape, strict=True)]
    full = torch.arange(torch.Size(shape).numel())
    wanted = full.view(shape)[tuple(slice(a, a + n) for a, n in dims)].flatten()
    found = list(runs(shape, dims))
    assert torch.equal(torch.cat([full[a : a + n] for a, n in found]), wanted)


@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=8), st.integers(16, 200))
def test_every_element_is_read_by_one_holder(holders: list[set[int]], limit: int) -> None:
    held: list[list[Key]] = [[] for _ in range(4)]
    for number, ranks in enumerate(holders):
        for rank in ranks:
            held[rank].append((number, (3, 0), (number + 2, 5)))
    read = dict.fromkeys(range(len(holders)), 0)
    for packet in packets(held, dict.fromkeys(range(len(holders)), 2), limit=limit):
        shares = [packet.share(rank) for rank in packet.holders]
        assert [i for share in shares for i in share] == list(range(packet.numel))
        assert packet.numel * 2 <= max(limit, 10)
        for part in packet.parts:
            assert set(packet.holders) == holders[part.key[0]]
            read[part.key[0]] += part.numel
    assert read == {number: (number + 2) * 5 for number in range(len(holders))}


@pytest.mark.parametrize(("name", "tp", "pp", "dp"), [("gemma3", 4, 1, 2), ("llama3", 1, 2, 2), ("gpt2", 2, 1, 3)])
def test_every_byte_is_read_once(name: str, tp: int, pp: int, dp: int, tmp_path: Path, pool: Pool) -> None:
    """Norms that all hold, kv heads in copies, a tied embedding at both ends; several files, of bf16."""
    oracle.save(oracle.build(name), tmp_path, torch.bfloat16, shard="6KB")
    with TensorFiles(tmp_path) as files:
        total = sum(2 * torch.Size(held.shape).numel() for held in files.tensors.values())
    read = pool.run(tp * pp * dp, _read, tmp_path, tp, pp, dp)
    assert sum(read) == total
    assert max(read) < 1.6 * total / len(read)


def _read(world: World, directory: Path, tp: int, pp: int, dp: int) -> int:
    config = read_config(directory)
    with ParallelState.build(Layout.of(tp=tp, pp=pp, dp=dp), world) as state:
        build, layers = Build(state.axis("tp"), False, torch.float32), config.model.layers
        edges, stage = [0, 1, layers] if pp == 2 else [0, layers], state.axis("pp").rank
        spec = StageSpec.of(range(edges[stage], edges[stage + 1]), first=stage == 0, last=stage == pp - 1)
        model = Transformer(config.model, spec, build, seq_len=16)
        for param in model.parameters():
            param.data.fill_(torch.nan)
        mine = slices(collect(model), lambda p: p.data, {"tp": state.axis("tp").rank})
        everyone = state.axis("tp", "cp", "dp", "pp")
        read = load_weights(directory, config, logical_shapes(config.model, 16), mine, everyone)
        full = whole(directory)
        for part in mine:
            wanted: Tensor = full[part.name]
            for dim, (first, n) in enumerate(zip(part.offsets, part.tensor.shape, strict=True)):
                wanted = wanted.narrow(dim, first, n)
            assert torch.equal(part.tensor, wanted), part.name
        return read


def test_reading_needs_little_memory(tmp_path: Path) -> None:
    """A file of 256 MB, cast as it is read: beside the target a buffer for each thread, and what threads cost."""
    large = torch.zeros(1 << 13, 1 << 14, dtype=torch.bfloat16)
    save_file({"x": large}, tmp_path / SINGLE)
    del large
    gc.collect()
    into = torch.ones(1 << 13, 1 << 14)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    with TensorFiles(tmp_path) as files:
        files.read("x", ((0, 1 << 13), (0, 1 << 14)), into)
        assert files.wait() == 1 << 28
    assert not into.any()
    assert _memory("VmHWM") - before < 200 << 20


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])
