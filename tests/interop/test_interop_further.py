"""Multi-token prediction of DeepSeek-V3: against its blocks in transformers, in fp64, and out of and into its files.

transformers itself leaves these layers out, so what joins and leads out of a block is written here once more, plainly.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import interop_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_interop_families import close, fill, fill_biases, logical
from torch import Tensor, nn

from stretto.arguments.model import ModelConfig
from stretto.batch import Batch
from stretto.estimate import count_parameters
from stretto.interop.config import read_config
from stretto.interop.errors import InteropError
from stretto.interop.export import export, plan
from stretto.interop.load import load_weights
from stretto.interop.names import further_copies
from stretto.interop.shapes import logical_shapes
from stretto.interop.write import write_config
from stretto.models import Microbatch, StageSpec, Transformer
from stretto.params import Slice, collect
from stretto.tensor_parallel import Build
from stretto.world import Axis

pytestmark = pytest.mark.gloo
DEPTH, LOSS, LAYERS = 2, 0.3, 4


class Further(nn.Module):
    """One of the layers, of the parts of transformers."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

        h, eps = config.hidden_size, config.rms_norm_eps
        self.block = DeepseekV3DecoderLayer(config, layer)
        self.enorm, self.hnorm, self.norm = (DeepseekV3RMSNorm(h, eps=eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * h, h, bias=False)

    def forward(self, hidden: Tensor, embedded: Tensor, **places: Any) -> Tensor:
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        out: Tensor = self.norm(self.block(x, **places))
        return out


def theirs() -> tuple[Any, list[Further]]:
    """The model, and its further layers, all at random."""
    model = oracle.build("deepseek_v3")
    with oracle.in_fp64():
        further = [Further(model.config, LAYERS + n) for n in range(DEPTH)]
        generator = torch.Generator().manual_seed(11)
        for each in further:
            for name, x in [*each.named_parameters(), *each.named_buffers()]:
                x.data = 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64) + 0.5 * ("norm" in name)
    return model, further


def loss_of(model: Any, further: list[Further]) -> tuple[Tensor, Tensor]:
    """The loss of the next token, and that which is minimized."""
    tokens, labels, mask = oracle.rows()
    count, s = mask.sum(), tokens.shape[1]
    with oracle.in_fp64():
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        losses = nn.functional.cross_entropy(model.lm_head(hidden).transpose(1, 2), labels, reduction="none")
        first = (losses * mask).sum() / count
        causal = torch.full((s, s), -torch.inf).triu(1)[None, None]
        ids = torch.arange(s)[None]
        places = {"position_embeddings": model.model.rotary_emb(hidden, ids), "attention_mask": causal}
        every = torch.cat([tokens, labels[:, -1:]], 1)
        total = first
        for n, layer in enumerate(further, start=1):
            read = torch.zeros_like(tokens)
            read[:, : s + 1 - n] = every[:, n:]
            hidden = layer(hidden, model.model.embed_tokens(read), position_ids=ids, **places)
            losses = nn.functional.cross_entropy(
                model.lm_head(hidden[:, : s - n]).transpose(1, 2), every[:, n + 1 :], reduction="none"
            )
            total = total + LOSS / DEPTH * (losses * mask[:, n:]).sum() / count
    return first, total


def files_of(model: Any, further: list[Further], what: str) -> dict[str, Tensor]:
    """Weights, or gradients, by the names that the published files have."""

    def pick(p: Tensor) -> Tensor:
        return (p if what == "weights" else p.grad).detach().clone()

    found = oracle.weights_of(model) if what == "weights" else {n: pick(p) for n, p in model.named_parameters()}
    for n, layer in enumerate(further, start=LAYERS):
        named = {**dict(layer.named_parameters()), **(dict(layer.named_buffers()) if what == "weights" else {})}
        for name, x in named.items():
            said = f"shared_head.{name}" if name.startswith("norm.") else name.removeprefix("block.")
            found[f"model.layers.{n}.{said}"] = pick(x) if what == "gradients" else x.detach().clone()
    return oracle.in_files(found, model)


def ours(config: ModelConfig) -> Transformer:
    return Transformer(config, StageSpec.whole(config), Build(Axis.single("tp"), False, torch.float64), seq_len=16)


def test_it_is_what_the_blocks_of_transformers_compute(tmp_path: Path) -> None:
    """Catches halves of the matrix that change places; a norm left out; a label one place too near or too far; the
    weight of the losses not divided by their number, or told as loss; a gradient of one use of embedding or head."""
    model, further = theirs()
    first, total = loss_of(model, further)
    total.backward()
    weights = files_of(model, further, "weights")
    model.config.num_nextn_predict_layers = DEPTH
    oracle.write_config(model, tmp_path)
    config = replace(read_config(tmp_path).predicting(DEPTH).model, mtp_loss=LOSS)
    shapes = logical_shapes(config, 16)
    assert count_parameters(config, 16).total == sum(x.numel() for x in weights.values())
    module = ours(config)
    held = logical("deepseek_v3", config, dict(shapes), weights)
    fill(collect(module), held)
    fill_biases([module], held)
    tokens, labels, mask = oracle.rows()
    batch = Batch(tokens, labels, mask).with_further(DEPTH)
    loss = module(None, Microbatch(batch, mask.sum().double()))
    close("loss", loss.detach(), first.detach())
    loss.backward()
    grads = files_of(model, further, "gradients") | {n: w for n, w in weights.items() if n.endswith("correction_bias")}
    wanted = logical("deepseek_v3", config, dict(shapes), grads)
    for item in collect(module):
        assert item.param.grad is not None, item.name
        for part in item.logical:
            close(part.name, part.view(item.param.grad), wanted[part.name])
    with torch.no_grad():  # an evaluation does without
        close("evaluated", module(None, Microbatch(Batch(tokens, labels, mask), mask.sum().double())), first.detach())


def test_files_come_in_and_go_out(tmp_path: Path) -> None:
    """Catches a name that is not that of the published files; what they hold twice left out, or not compared."""
    model, further = theirs()
    weights = {n: x.float().contiguous() for n, x in files_of(model, further, "weights").items()}
    model.config.num_nextn_predict_layers = DEPTH
    source = tmp_path / "in"
    oracle.write_config(model, source)
    config = read_config(source).predicting(DEPTH)
    copies = {copy: weights[name].clone() for copy, name in further_copies(config.model).items()}
    assert {"model.layers.4.embed_tokens.weight", "model.layers.5.shared_head.head.weight"} <= copies.keys()
    save_file(weights | copies, source / "model.safetensors", metadata={"format": "pt"})
    found = taken(source, config.model)
    named = plan(config, logical_shapes(config.model, 16), torch.float32, source)
    export(tmp_path / "out", config.raw, named, lambda wanted: {n: found[n] for n in wanted}, limit=10**9)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == (weights | copies).keys()
    assert all(torch.equal(x, after[name]) for name, x in (weights | copies).items())
    # Without these layers the same files are the model alone.
    alone = taken(source, replace(config.model, mtp_layers=0))
    assert all(torch.equal(x, found[name]) for name, x in alone.items())
    assert not any(name.startswith("model.layers.4.") for name in alone)
    # A shape that only such a family has is written as one of it.
    assert write_config(config.model, seq_len=64, dtype="float32").raw["num_nextn_predict_layers"] == DEPTH
    copies["model.layers.5.embed_tokens.weight"][0, 0] += 1
    save_file(weights | copies, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InteropError, match=r"model\.layers\.5\.embed_tokens\.weight must hold model\.embed_tokens"):
        taken(source, config.model)


def test_layers_that_are_not_there_are_not_asked_for(tmp_path: Path) -> None:
    for name, said in (("deepseek_v3", {"num_nextn_predict_layers": 1}), ("qwen3", {})):
        oracle.write_config(oracle.build(name), tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text()) | said
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = read_config(tmp_path)
        assert config.model.mtp_layers == 0
        with pytest.raises(InteropError, match=r"mtp_layers = 2, but num_nextn_predict_layers = [01] of this"):
            config.predicting(2)
    with pytest.raises(InteropError, match="no Hugging Face family"):
        write_config(ModelConfig(mtp_layers=1, vocab=53), seq_len=8, dtype="float32")


def taken(directory: Path, model: ModelConfig) -> dict[str, Tensor]:
    """All logical tensors of a directory, in fp32."""
    config = read_config(directory).predicting(model.mtp_layers)
    shapes = logical_shapes(model, 16)
    found = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    mine = [Slice(name, x, tuple(x.shape), (0,) * x.dim(), True) for name, x in found.items()]
    load_weights(directory, config, shapes, mine)
    return found
