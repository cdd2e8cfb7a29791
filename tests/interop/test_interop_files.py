"""Weights in and out: a directory of transformers comes back byte by byte, from any layout, or is rejected whole.

Faults to catch: a piece of a stack read from where another lies; a transposed matrix read as it is; a tensor of
the directory that nobody reads; a target that nobody fills; an index that leads out of its directory.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import interop_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stretto.interop.config import read_config
from stretto.interop.errors import InteropError
from stretto.interop.export import all_or_nothing, export, plan, write_tensors
from stretto.interop.files import INDEX, SINGLE, TensorFiles
from stretto.interop.load import load_weights
from stretto.interop.shapes import logical_shapes
from stretto.layout import Layout
from stretto.models import StageSpec, Transformer
from stretto.parallel_state import ParallelState
from stretto.params import Slice, collect, slices
from stretto.tensor_parallel import Build
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo
ONE_OF_A_KIND = ["llama3", "mistral", "gemma3", "olmo3", "phi3", "gpt_neox", "gpt2", "mixtral", "glm4_moe", "qwen2_moe"]
ONE_OF_A_KIND += ["deepseek_v2", "deepseek_v3", "gpt_oss"]


def whole(directory: Path) -> dict[str, Tensor]:
    """All logical tensors of a directory, in fp32."""
    config = read_config(directory)
    shapes = logical_shapes(config.model, 16)
    found = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    mine = [Slice(name, x, tuple(x.shape), (0,) * x.dim(), True) for name, x in found.items()]
    load_weights(directory, config, shapes, mine)
    return found


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_out_is_what_came_in(name: str, tmp_path: Path) -> None:
    """Several files, dtypes side by side; what transformers loads again gives the same logits."""
    model = oracle.build(name)
    oracle.save(model, tmp_path / "in", torch.bfloat16, shard="6KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    _one_in_fp16(tmp_path / "in")
    config, tensors = read_config(tmp_path / "in"), whole(tmp_path / "in")
    named = plan(config, {name: tuple(x.shape) for name, x in tensors.items()}, torch.float32, tmp_path / "in")
    export(tmp_path / "out", config.raw, named, lambda wanted: {n: tensors[n] for n in wanted}, limit=8000)
    before, after = _bytes(tmp_path / "in"), _bytes(tmp_path / "out")
    assert before == after
    from transformers import AutoModelForCausalLM

    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / at, dtype=torch.float32) for at in ("in", "out"))
    tokens = oracle.rows()[0]
    assert torch.equal(one(tokens).logits, other(tokens).logits)


@pytest.mark.parametrize(("name", "tp"), [("gemma3", 4), ("gpt_neox", 2), ("gpt2", 2), ("phi3", 4)])
def test_each_rank_reads_its_part(name: str, tp: int, tmp_path: Path, pool: Pool) -> None:
    """Two kv heads on four ranks, stacked heads and transposed matrices, a vocabulary with padding."""
    oracle.save(oracle.build(name), tmp_path)
    pool.run(tp, _parts, tmp_path)


def _parts(world: World, directory: Path) -> None:
    config = read_config(directory)
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        build = Build(state.axis("tp"), False, torch.float32)
        model = Transformer(config.model, StageSpec.whole(config.model), build, seq_len=16)
        for param in model.parameters():
            param.data.fill_(torch.nan)
        mine = slices(collect(model), lambda p: p.data, {"tp": world.rank})
        load_weights(directory, config, logical_shapes(config.model, 16), mine)
        full = whole(directory)
        for part in mine:
            wanted = full[part.name]
            for dim, (first, n) in enumerate(zip(part.offsets, part.tensor.shape, strict=True)):
                wanted = wanted.narrow(dim, first, n)
            assert torch.equal(part.tensor, wanted), part.name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    oracle.save(oracle.build("llama"), directory)
    return directory


def test_every_tensor_that_does_not_fit_is_listed(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / SINGLE)
    tensors["model.layers.0.mlp.bonus"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(3)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # what old files hold, and nobody needs
    with pytest.raises(InteropError) as raised:
        whole(_directory(tmp_path, llama, tensors))
    assert sorted(raised.value.reasons) == [
        "lm_head.weight: I8 in model.safetensors, must be one of F64, F32, F16, BF16",
        "model.layers.0.mlp.bonus [2]: left over",
        "model.layers.2.self_attn.q_proj.weight [32, 36]: missing",
        "model.norm.weight: [3] in model.safetensors, but config.json makes it [36]",
    ]


def test_a_tied_head_may_stand_there_again_but_must_be_the_embedding(tmp_path: Path) -> None:
    oracle.save(oracle.build("llama3"), tmp_path / "in")
    before, tensors = whole(tmp_path / "in"), load_file(tmp_path / "in" / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (tmp_path / "again").mkdir()
    directory = _directory(tmp_path / "again", tmp_path / "in", tensors)
    after = whole(directory)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    tensors["lm_head.weight"][-1, -1] += 1
    with pytest.raises(InteropError, match=r"lm_head\.weight must hold model\.embed_tokens\.weight once more"):
        whole(_directory(tmp_path / "again", tmp_path / "in", tensors))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "../a.safetensors"}}, "must be a .safetensors beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "must be a .safetensors beside it"),
        ({"weight_map": {"a": 3}}, "weight_map must say"),
        ({}, "weight_map must say"),
        ({"weight_map": {"a": "missing.safetensors"}}, "cannot be read as safetensors"),
        ({"weight_map": {"a": "b.safetensors"}}, "a: model.safetensors.index.json says 'b.safetensors'"),
        ({"weight_map": {"b": "b.safetensors"}}, "c: in b.safetensors, not in model.safetensors.index.json"),
    ],
)
def test_an_index_that_is_not_of_its_directory_is_rejected(index: Any, said: str, tmp_path: Path) -> None:
    save_file({"b": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "b.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InteropError) as raised:
        TensorFiles(tmp_path)
    assert said in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"no tensors here at all"])
def test_a_damaged_file_is_one_error(content: bytes, llama: Path, tmp_path: Path) -> None:
    directory = _directory(tmp_path, llama, {})
    (directory / SINGLE).write_bytes(content)
    with pytest.raises(InteropError):
        whole(directory)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InteropError, match="is a pickle"):
        TensorFiles(tmp_path)


def _directory(to: Path, like: Path, tensors: Mapping[str, Tensor]) -> Path:
    shutil.copyfile(like / "config.json", to / "config.json")
    save_file(dict(tensors), to / SINGLE)
    return to


def _one_in_fp16(directory: Path) -> None:
    """One tensor of another dtype than the rest."""
    file = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = min(name for name in tensors if tensors[name].dim() == 2)
    save_file({**tensors, name: tensors[name].half()}, file, metadata={"format": "pt"})


def _bytes(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Each tensor's dtype and data."""
    found = {}
    for file in directory.glob("*.safetensors"):
        for name, x in load_file(file).items():
            found[name] = str(x.dtype), x.contiguous().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_nothing_that_the_next_try_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Catches: half a file, or a whole one, for which the next export says that the directory is not empty."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with all_or_nothing(to, "x", "y"):
            write_tensors(to / "x", [("a", torch.float32, (2,))], iter([("a", torch.zeros(2))]))
            monkeypatch.setattr("stretto.interop.export._write", full)
            write_tensors(to / "y", [("a", torch.float32, (2,))], iter([("a", torch.zeros(2))]))

    to = tmp_path / "out"
    if there:
        to.mkdir()
    with pytest.raises(OSError, match="No space left") as raised:
        write()
    assert raised.value.filename == str(to)
    assert to.exists() == there
    assert not there or not any(to.iterdir())
