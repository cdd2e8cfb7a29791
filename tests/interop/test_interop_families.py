"""Every family against the code of transformers: logits, loss and all gradients in fp64, in one process and cut.

Faults to catch: a rotated share of a head that is its end; a stretch of wavelengths left out; windows one position
too wide; a norm that multiplies by its weight where it is 1 + weight; a norm after a sublayer left out; a softcap
whose gradient is left out; norms over all heads that do not sum over ranks; gradients of norms over all heads that do
not sum over ranks; latents whose gradient is that of one rank's heads; a scale of attention that YaRN does not
stretch; a bias that each rank of a cut expert adds; a clamp whose gradient goes on beyond it; values that bounds of
queries and keys leave out.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import interop_oracle as oracle
import pytest
import torch
from torch import Tensor

from stretto.arguments.model import ModelConfig
from stretto.batch import Batch
from stretto.estimate import count_parameters
from stretto.experts import expert_axes, routers_of
from stretto.experts.balance import bias_of
from stretto.interop.config import read_config
from stretto.interop.families import FAMILIES
from stretto.interop.names import file_tensors
from stretto.interop.shapes import logical_shapes
from stretto.layout import Layout
from stretto.models import Microbatch, StageSpec, Transformer
from stretto.parallel_state import ParallelState, default_axes
from stretto.params import Declared, collect
from stretto.tensor_parallel import Build
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo
LIMIT = 1e-10


def test_every_family_is_tried_and_documented() -> None:
    """Catches a family whose models nothing holds against transformers, or that no reader finds."""
    assert set(FAMILIES) == {config["model_type"] for config in oracle.FAMILIES.values()}
    page = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", oracle.FAMILIES)
def test_a_family_is_what_transformers_computes(name: str, tmp_path: Path) -> None:
    theirs, family, config = expected(name, tmp_path)
    logits, loss, grads = theirs["logits"], theirs["loss"], theirs["grads"]
    model = Transformer(config, StageSpec.whole(config), Build(Axis.single("tp"), False, torch.float64), seq_len=16)
    names = {part.name: part.spec.shape for item in collect(model) for part in item.logical}
    assert count_parameters(config, 16).total == sum(p.numel() for p in theirs["weights"].values())
    names |= logical_shapes(config, 16)
    held = logical(family, config, names, theirs["weights"])
    fill(collect(model), held)
    fill_biases([model], held)
    found = model.logits(oracle.rows()[0]).detach().transpose(0, 1)[..., : config.vocab_size]
    close("logits", found, logits)
    mine = model(None, microbatch())
    mine.backward()
    close("loss", mine.detach(), loss)
    grads = grads | {name: w for name, w in theirs["weights"].items() if name.endswith("e_score_correction_bias")}
    wanted = logical(family, config, names, grads)
    for item in collect(model):
        assert item.param.grad is not None, item.name
        for part in item.logical:
            close(part.name, part.view(item.param.grad), wanted[part.name])


SPARSE = [
    ("deepseek_v2", {"tp": 4, "ep": 2}),
    ("deepseek_v3", {"tp": 2, "ep": 2, "pp": 2}),
    ("gpt_oss", {"tp": 2, "etp": 2}),
    ("olmoe-clipped", {"tp": 2, "ep": 2}),
]
CUT = [("gemma3", 4, 1), ("olmo2", 4, 1), ("gpt_neox", 2, 2), ("llama3", 2, 2), ("gemma2", 2, 2), ("olmo3", 2, 2)]


@pytest.mark.parametrize(("name", "tp", "pp"), CUT)
@pytest.mark.parametrize("sp", [False, True])
def test_a_family_is_the_same_on_many_ranks(name: str, tp: int, pp: int, sp: bool, tmp_path: Path, pool: Pool) -> None:
    """Two kv heads on four ranks, a vocabulary that does not divide, one matrix at both ends of a pipeline."""
    theirs, family, config = expected(name, tmp_path)
    pool.run(tp * pp, _ranks, config, family, theirs, Layout.of(tp=tp, pp=pp), sp)


@pytest.mark.parametrize(("name", "sizes"), SPARSE)
@pytest.mark.parametrize("sp", [False, True])
def test_experts_and_latents_are_the_same_on_many_ranks(
    name: str, sizes: dict[str, int], sp: bool, tmp_path: Path, pool: Pool
) -> None:
    """Heads cut beside latents that all ranks have; experts spread, or cut with biases that one rank adds."""
    theirs, family, config = expected(name, tmp_path)
    layout = Layout.of(**sizes)
    pool.run(layout.world, _ranks, config, family, theirs, layout, sp)


def _ranks(world: World, config: ModelConfig, family: str, theirs: dict[str, Any], layout: Layout, sp: bool) -> None:
    """Stages one behind the other in each process; the ranks of a stage are real."""
    axes = default_axes(layout, experts=config.experts > 0)
    with ParallelState.build(layout, world, axes=axes) as state:
        edges = [0, config.layers] if layout.size("pp") == 1 else [0, 1, config.layers]
        parts = [StageSpec.of(range(a, b), first=a == 0, last=b == config.layers) for a, b in pairwise(edges)]
        build = Build(state.axis("tp"), sp, torch.float64, experts=expert_axes(state))
        stages = [Transformer(config, part, build, seq_len=16) for part in parts]
        declared = [item for stage in stages for item in collect(stage)]
        held = logical(family, config, logical_shapes(config, 16), theirs["weights"])
        fill(declared, held)
        fill_biases(stages, held)
        x = None
        for stage in stages:
            x = stage(x, microbatch())
        x.backward()
        close("loss", x.detach(), theirs["loss"])
        biases = {name: w for name, w in theirs["weights"].items() if name.endswith("e_score_correction_bias")}
        wanted, found = logical(family, config, logical_shapes(config, 16), theirs["grads"] | biases), {}
        for item in declared:
            for part in item.logical:
                grad = part.view(item.param.grad)
                for axis in {*part.spec.sum_grad, *({"edp"} & {*part.spec.replicas})}:
                    if axis != "embed" and state.axis(axis).size > 1:
                        grad = _summed(grad, part, state.axis(axis))
                found[part.name] = grad + found[part.name] if part.name in found else grad
                block = part.block
        for item in declared:
            for part in item.logical:
                block, full = part.block, wanted[part.name]
                for dim, (o, n) in enumerate(zip(block.offsets, block.shape, strict=True)):
                    full = full.narrow(dim, o, n)
                close(part.name, found[part.name], full)


def _summed(grad: Tensor, part: Any, axis: Axis) -> Tensor:
    """The sum over the ranks that hold the same block, each of which has a part of its gradient."""
    whole = torch.zeros(part.spec.shape, dtype=grad.dtype)
    view = whole
    for dim, (o, n) in enumerate(zip(part.block.offsets, part.block.shape, strict=True)):
        view = view.narrow(dim, o, n)
    view.copy_(grad)
    torch.distributed.all_reduce(whole, group=axis.group)
    return view


@cache
def _theirs(name: str) -> dict[str, Any]:
    model = oracle.build(name)
    logits, loss, grads = oracle.run(model)
    weights = oracle.weights_of(model)
    if model.config.model_type == "gpt_neox":  # in files its head has another name than in memory
        for named in (weights, grads):
            named["embed_out.weight"] = named.pop("lm_head.weight")
    return {"model": model, "logits": logits, "loss": loss, "grads": grads, "weights": weights}


def expected(name: str, directory: Path) -> tuple[dict[str, Any], str, ModelConfig]:
    theirs = dict(_theirs(name))
    oracle.write_config(theirs.pop("model"), directory)
    found = read_config(directory)
    return theirs, found.family.model_type, found.model


def logical(
    family: str, config: ModelConfig, shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Logical tensors out of those of a file; all of them, and none left over."""
    table = file_tensors(family, config, shapes)
    assert {t.name: t.shape for t in table} == {name: tuple(t.shape) for name, t in tensors.items()}
    found = {}
    for held in table:
        for n, piece in enumerate(held.pieces):
            place = held.place(n)
            whole = tensors[held.name] if place is None else tensors[held.name][place]
            whole = whole.t() if held.transposed else whole
            runs = piece.runs(0, piece.shape[0], held.stride)
            found[piece.logical] = torch.cat([whole[there] for _, there in runs])
    return found


def fill(declared: Any, tensors: dict[str, Tensor]) -> None:
    item: Declared
    with torch.no_grad():
        for item in declared:
            item.param.zero_()
            for part in item.logical:
                full = tensors[part.name]
                for dim, (o, n) in enumerate(zip(part.block.offsets, part.block.shape, strict=True)):
                    full = full.narrow(dim, o, n)
                part.view(item.param.data).copy_(full)


def fill_biases(stages: list[Transformer], held: dict[str, Tensor]) -> None:
    for layer, router in routers_of(stages).items():
        if router.config.router_bias:
            router.state.bias.copy_(held[bias_of(layer)])


def microbatch() -> Microbatch:
    tokens, labels, mask = oracle.rows()
    return Microbatch(Batch(tokens, labels, mask), mask.sum().double())


def close(name: str, found: Tensor, wanted: Tensor) -> None:
    error = (found - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
    assert error < LIMIT, f"{name}: {error:.1e}"
