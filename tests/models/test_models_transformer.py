"""The model against its equations, written down once more as plain functions of named tensors.

Loss and every gradient in fp64, for every switch of the config, and all of them against each other in pairs.

Faults to catch: rotation of the wrong halves; a norm left out; heads grouped in another order; a scale of
1/sqrt(hidden/heads) where head_dim says otherwise; the causal mask left out; the bias of one matrix ignored; the mask
of the loss ignored; the gradient of a tied embedding counted once; a single pair of a latent rotated where it lies.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stretto.arguments.schema import ModelConfig
from stretto.batch import Batch
from stretto.estimate import count_parameters
from stretto.models import Microbatch, StageSpec, Transformer
from stretto.models.frequencies import plain
from stretto.models.rope import rotation
from stretto.params import collect
from stretto.tensor_parallel import Build
from stretto.world import Axis

pytestmark = pytest.mark.gloo

SEQ, ROWS = 6, 3
BUILD = Build(Axis.single("tp"), False, torch.float64)
PLAIN = ModelConfig(layers=2, hidden=12, heads=4, kv_heads=4, head_dim=6, ffn=10, vocab=11, rope_base=100.0)
SWITCHES: dict[str, tuple[Any, ...]] = {
    "norm": ("rms", "layer"),
    "position": ("rope", "learned"),
    "activation": ("swiglu", "gelu", "gelu-tanh"),
    "kv_heads": (4, 2, 1),
    "bias": (False, True),
    "qkv_bias": (False, True),
    "tied": (False, True),
    "qk_norm": (False, True),
    "head_dim": (6, None, 2),
    "layers": (2, 1, 3),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in SWITCHES.items() for v in values])
def test_each_switch_is_its_equation(name: str, value: object) -> None:
    hold(replace(_fitting(PLAIN, name, value), **{name: value}))


@given(values=st.fixed_dictionaries({n: st.sampled_from(v) for n, v in SWITCHES.items()}))
def test_switches_together(values: dict[str, Any]) -> None:
    hold(_fitting(replace(PLAIN, **values), "head_dim", values["head_dim"]))


@pytest.mark.parametrize("cuts", [(1,), (0, 2), (1, 2, 3), (3,), (0,), (1, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_one_behind_the_other_are_the_whole(cuts: tuple[int, ...], tied: bool) -> None:
    """P13: any cut, empty stages included; a tied matrix has a copy at each end, whose gradients add up."""
    config = replace(PLAIN, layers=3, tied=tied, position="learned", bias=True)
    edges = (0, *cuts, config.layers)
    held = [range(a, b) for a, b in pairwise(edges)]
    parts = [StageSpec.of(r, first=i == 0, last=i == len(held) - 1) for i, r in enumerate(held)]
    stages = [Transformer(config, part, BUILD, seq_len=SEQ) for part in parts]
    for stage in stages:
        set_weights(stage)
    x = None
    for stage in stages:
        x = stage(x, microbatch())
    assert x is not None
    x.backward()
    found: dict[str, Tensor] = {}
    for stage in stages:
        for name, grad in gradients(stage).items():
            found[name] = found[name] + grad if name in found else grad
    check(x, found, *reference(config))


def test_a_single_rotated_pair_of_a_latent_is_its_own_halves() -> None:
    """Its features are neighbours and halves at once: the same loss and gradients, whichever of the two is said."""
    found = []
    for interleaved in (False, True):
        latent = {"kv_lora_rank": 5, "rope_head_dim": 2, "rope_interleaved": interleaved}
        model = Transformer(replace(PLAIN, kv_heads=None, **latent), StageSpec.whole(PLAIN), BUILD, seq_len=SEQ)
        set_weights(model)
        loss = model(None, microbatch())
        loss.backward()
        found.append((loss, gradients(model)))
    check(*found[0], *found[1])


@pytest.mark.parametrize("name", list(SWITCHES))
def test_parameters_are_counted_exactly(name: str) -> None:
    for value in SWITCHES[name]:
        config = replace(_fitting(PLAIN, name, value), **{name: value})
        model = Transformer(config, StageSpec.whole(config), BUILD, seq_len=SEQ)
        logical = [part for item in collect(model) for part in item.logical]
        count = count_parameters(config, SEQ)
        assert count.total == sum(math.prod(part.spec.shape) for part in logical)
        block = sum(math.prod(part.spec.shape) for part in logical if ".layers.0." in part.name)
        assert (count.layers, count.layer) == (config.layers, block)
        ends = {"embedding": ("embed_tokens", "embed_positions"), "final_norm": ("model.norm",), "head": ("lm_head",)}
        for field, names in ends.items():
            held = sum(math.prod(part.spec.shape) for part in logical if any(n in part.name for n in names))
            assert getattr(count, field) == held, field


def test_names_are_those_of_hugging_face_with_global_numbers() -> None:
    config = replace(PLAIN, layers=8, qk_norm=True)
    stage = Transformer(config, StageSpec.of(range(6, 8), first=False, last=True), BUILD, seq_len=SEQ)
    names = [part.name for item in collect(stage) for part in item.logical]
    layer = [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ]
    assert names == [
        *(f"model.layers.{n}.{each}" for n in (6, 7) for each in layer),
        "model.norm.weight",
        "lm_head.weight",
    ]


def test_the_future_does_not_reach_the_past() -> None:
    model = Transformer(PLAIN, StageSpec.whole(PLAIN), BUILD, seq_len=SEQ)
    set_weights(model)
    tokens = microbatch().batch.tokens
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    assert torch.equal(model.logits(tokens)[:4], model.logits(other)[:4])
    assert not torch.equal(model.logits(tokens)[4:], model.logits(other)[4:])


def test_logits_of_a_prefix_are_a_prefix_of_the_logits() -> None:
    """What a sample is drawn from: shorter sequences than the model was built for, with either kind of position."""
    for position in ("rope", "learned"):
        config = replace(PLAIN, position=position)
        model = Transformer(config, StageSpec.whole(config), BUILD, seq_len=SEQ)
        set_weights(model)
        tokens = microbatch().batch.tokens
        torch.testing.assert_close(model.logits(tokens[:, :3]), model.logits(tokens)[:3], rtol=0, atol=1e-13)


def test_more_tokens_than_learned_positions_are_rejected() -> None:
    config = replace(PLAIN, position="learned")
    model = Transformer(config, StageSpec.whole(config), BUILD, seq_len=1)
    with pytest.raises(ValueError, match="6 tokens, but positions were learned for 1"):
        model.logits(microbatch().batch.tokens)


def test_a_middle_stage_without_an_activation_is_an_error() -> None:
    stage = Transformer(PLAIN, StageSpec.of(range(1), first=False, last=False), BUILD, seq_len=SEQ)
    with pytest.raises(ValueError, match="must be called with an activation"):
        stage(None, microbatch())


def test_positions_beyond_the_precision_of_fp32() -> None:
    """Angles are computed in fp64: in fp32 the angle of position 100,003 would be off by 4e-3."""
    cos, sin = rotation(100_004, plain(4, 10_000.0), dtype=torch.float32, device="cpu")
    for pair, frequency in ((0, 1.0), (1, 10_000.0**-0.5)):
        assert cos[-1, 0, 0, pair].item() == pytest.approx(math.cos(100_003 * frequency), abs=1e-7)
        assert sin[-1, 0, 0, pair + 2].item() == pytest.approx(math.sin(100_003 * frequency), abs=1e-7)


def hold(config: ModelConfig) -> None:
    model = Transformer(config, StageSpec.whole(config), BUILD, seq_len=SEQ)
    set_weights(model)
    loss = model(None, microbatch())
    loss.backward()
    check(loss, gradients(model), *reference(config))


def check(loss: Tensor, found: dict[str, Tensor], plain: Tensor, wanted: dict[str, Tensor]) -> None:
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
        error = (found[name] - want).abs().max().item()
        assert error <= 1e-12 * max(1.0, want.abs().max().item()), f"{name}: {error:.1e}"


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()) * 31 + len(name))
    return 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64) + (0.5 if "norm" in name else 0.0)


def set_weights(model: Transformer) -> None:
    with torch.no_grad():
        for item in collect(model):
            item.param.zero_()
            for part in item.logical:
                part.view(item.param.data).copy_(draw(part.name, part.spec.shape))


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {}
    for item in collect(model):
        for part in item.logical:
            assert item.param.grad is not None, item.name
            found[part.name] = part.view(item.param.grad)
    return found


def microbatch() -> Microbatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (ROWS, SEQ + 1), generator=generator)
    mask = torch.rand(ROWS, SEQ, generator=generator) > 0.3
    mask[0] = False
    return Microbatch(Batch(tokens[:, :-1], tokens[:, 1:], mask), torch.tensor(17.0))


def reference(c: ModelConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, one sequence, one head and one position at a time."""
    w = {name: draw(name, shape).requires_grad_() for name, shape in shapes(c).items()}
    batch = microbatch().batch
    total = torch.zeros((), dtype=torch.float64)
    for row in range(ROWS):
        x = w["model.embed_tokens.weight"][batch.tokens[row]]
        if c.position == "learned":
            x = x + w["model.embed_positions.weight"]
        for n in range(c.layers):
            x = x + attention(c, w, f"model.layers.{n}.", normed(c, w, f"model.layers.{n}.input_layernorm", x))
            x = x + forward(
                c, w, f"model.layers.{n}.mlp.", normed(c, w, f"model.layers.{n}.post_attention_layernorm", x)
            )
        head = w["model.embed_tokens.weight" if c.tied else "lm_head.weight"]
        for position, h in enumerate(normed(c, w, "model.norm", x)):
            logits = head @ h
            if batch.loss_mask[row, position]:
                total = total + torch.log(torch.exp(logits).sum()) - logits[batch.labels[row, position]]
    loss = total / 17.0
    return loss, dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


def attention(c: ModelConfig, w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    d = c.head_dim or c.hidden // c.heads
    kv_heads = c.kv_heads or c.heads
    q, k, v = (linear(w, f"{at}self_attn.{part}_proj", x) for part in "qkv")
    heads = []
    for head in range(c.heads):
        shared = head // (c.heads // kv_heads)
        qh, kh, vh = (
            q[:, head * d : (head + 1) * d],
            k[:, shared * d : (shared + 1) * d],
            v[:, shared * d : (shared + 1) * d],
        )
        if c.qk_norm:
            qh, kh = (rms(t, w[f"{at}self_attn.{n}_norm.weight"], c.norm_eps) for t, n in ((qh, "q"), (kh, "k")))
        if c.position == "rope":
            qh, kh = rotated(qh, c.rope_base), rotated(kh, c.rope_base)
        rows = []
        for i in range(len(x)):
            scores = torch.exp(torch.stack([qh[i] @ kh[j] / math.sqrt(d) for j in range(i + 1)]))
            rows.append((scores / scores.sum()) @ vh[: i + 1])
        heads.append(torch.stack(rows))
    return linear(w, f"{at}self_attn.o_proj", torch.cat(heads, 1))


def rotated(x: Tensor, base: float) -> Tensor:
    """Element i and i + d/2 are a point in the plane, turned by position / base^(2i/d)."""
    d = x.shape[1]
    out = []
    for position, row in enumerate(x):
        angles = [position / base ** (2 * i / d) for i in range(d // 2)]
        low = [row[i] * math.cos(a) - row[i + d // 2] * math.sin(a) for i, a in enumerate(angles)]
        high = [row[i + d // 2] * math.cos(a) + row[i] * math.sin(a) for i, a in enumerate(angles)]
        out.append(torch.stack(low + high))
    return torch.stack(out)


def forward(c: ModelConfig, w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    up = linear(w, f"{at}up_proj", x)
    if c.activation == "swiglu":
        gate = linear(w, f"{at}gate_proj", x)
        return linear(w, f"{at}down_proj", gate / (1 + torch.exp(-gate)) * up)
    if c.activation == "gelu":
        return linear(w, f"{at}down_proj", 0.5 * up * (1 + torch.erf(up / math.sqrt(2))))
    inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
    return linear(w, f"{at}down_proj", 0.5 * up * (1 + torch.tanh(inner)))


def normed(c: ModelConfig, w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    if c.norm == "rms":
        return rms(x, w[f"{at}.weight"], c.norm_eps)
    centred = x - x.mean(1, keepdim=True)
    spread = torch.sqrt((centred**2).mean(1, keepdim=True) + c.norm_eps)
    return centred / spread * w[f"{at}.weight"] + w[f"{at}.bias"]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(1, keepdim=True) + eps) * weight


def linear(w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    y = x @ w[f"{at}.weight"].t()
    return y + w[f"{at}.bias"] if f"{at}.bias" in w else y


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, worked out from the config alone."""
    h, inner, vocab = c.hidden, c.ffn, c.vocab
    assert inner is not None
    assert vocab is not None
    d = c.head_dim or h // c.heads
    kv = (c.kv_heads or c.heads) * d
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, h)}
    if c.position == "learned":
        found["model.embed_positions.weight"] = (SEQ, h)
    for n in range(c.layers):
        matrices = {"q": (c.heads * d, h), "k": (kv, h), "v": (kv, h), "o": (h, c.heads * d)}
        block = {f"self_attn.{name}_proj": shape for name, shape in matrices.items()}
        block |= {"mlp.up_proj": (inner, h), "mlp.down_proj": (h, inner)}
        if c.activation == "swiglu":
            block["mlp.gate_proj"] = (inner, h)
        for name, shape in block.items():
            found[f"model.layers.{n}.{name}.weight"] = shape
            if c.bias or (c.qkv_bias and any(part in name for part in ("q_proj", "k_proj", "v_proj"))):
                found[f"model.layers.{n}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found |= _norm(c, f"model.layers.{n}.{name}")
        if c.qk_norm:
            found |= {f"model.layers.{n}.self_attn.{part}_norm.weight": (d,) for part in "qk"}
    found |= _norm(c, "model.norm")
    return found if c.tied else found | {"lm_head.weight": (vocab, h)}


def _norm(c: ModelConfig, at: str) -> dict[str, tuple[int, ...]]:
    kinds = ("weight",) if c.norm == "rms" else ("weight", "bias")
    return {f"{at}.{kind}": (c.hidden,) for kind in kinds}


def _fitting(config: ModelConfig, name: str, value: object) -> ModelConfig:
    """Rotation needs an even head_dim, and hidden / heads = 3 is odd: then the model is wider."""
    return replace(config, hidden=16) if name == "head_dim" and value is None else config
