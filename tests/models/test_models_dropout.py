"""P11: what falls away is a function of seed, place in the model, sample, position and channel.

Faults to catch: a mask that knows the row of the microbatch in place of the sample; the same mask for every layer; the
same mask for every channel of four; no scaling by 1 / (1 - p); dropout in evaluation; a recomputation that draws anew.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stretto.arguments.schema import ModelConfig
from stretto.batch import Batch
from stretto.estimate.kept import BLOCK, Parts
from stretto.models import Microbatch, StageSpec, Transformer
from stretto.random import bits, chance, dropped, stream_key
from stretto.structure import Structure
from stretto.tensor_parallel import Build, Dropout
from stretto.world import Axis

pytestmark = pytest.mark.gloo

BUILD = Build(Axis.single("tp"), False, torch.float64, seed=5)
CONFIG = ModelConfig(layers=2, hidden=12, heads=2, ffn=16, vocab=11, dropout=0.3, position="learned", bias=True)
ROWS, SEQ = 4, 6


@given(seed=st.integers(0, 9), width=st.integers(1, 9), p=st.sampled_from([0.1, 0.5, 0.9]))
def test_an_element_follows_from_its_place_alone(seed: int, width: int, p: float) -> None:
    """Element by element, from the published generator's words: four channels read one word, low bits first."""
    keys, samples, positions = stream_key(seed, "x"), [3, 2**40, 0], [7, 0]
    mask = dropped(keys, torch.tensor(samples), torch.tensor(positions), width, p)
    for i, position in enumerate(positions):
        for j, sample in enumerate(samples):
            token = _word(_word(keys[1], _word(keys[0], sample)), position)
            for c in range(width):
                lane = _word(token, c // 4) >> 16 * (c % 4) & 0xFFFF
                signed = lane - 0x10000 if lane >= 0x8000 else lane
                assert mask[i, j, c].item() == (signed + 0x8000 < round(p * 0x10000))


def _word(key: int, index: int) -> int:
    return int(bits(key, torch.tensor(index)))


def test_as_many_fall_away_as_said_and_independently() -> None:
    p, n = 0.1, (128, 64, 256)
    masks = [
        dropped(stream_key(1, name), torch.arange(n[1]), torch.arange(n[0]), n[2], p).double() for name in ("a", "b")
    ]
    a, b = masks
    assert abs(a.mean() - p) < 1e-3  # 0.1 +- 0.0002
    shifted = [b, *(a.roll(by, dim) for dim in range(3) for by in (1, 2, 3, 4))]
    for other in shifted:
        assert abs((a * other).mean() - p * p) < 5e-4


def test_expectation_and_variance_are_those_of_inverted_dropout() -> None:
    x = torch.ones(256, 16, 64, dtype=torch.float64)
    y = Dropout(0.25, "x", BUILD)(x, Structure.of_tokens(len(x), torch.arange(16)))
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(y.mean() - 1) < 5e-3
    assert abs(y.var() - 0.25 / 0.75) < 5e-3


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_the_chance_is_never_none_nor_one(p: float) -> None:
    assert 0 < chance(p) < 1
    assert abs(chance(p) - p) <= 2**-16


def test_seed_and_name_matter() -> None:
    x, samples = torch.ones(8, 2, 32), Structure.of_tokens(8, torch.arange(2))
    made = [Dropout(0.5, n, replace(BUILD, seed=s))(x, samples) for s, n in ((0, "a"), (0, "b"), (1, "a"))]
    assert not any(torch.equal(a, b) for k, a in enumerate(made) for b in made[:k])


def test_the_gradient_falls_away_with_the_output() -> None:
    x = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.5, "x", BUILD)(x, Structure.of_tokens(len(x), torch.arange(3)))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), y.detach(), rtol=0, atol=0)


def test_a_sequence_in_parts_is_the_whole() -> None:
    x, samples = torch.ones(6, 2, 5), Structure.of_tokens(6, torch.tensor([8, 1]))
    whole = Dropout(0.5, "x", BUILD)(x, samples)
    ranks = [Build(Axis("tp", r, (0, 1, 2), None), True, torch.float32, seed=BUILD.seed) for r in range(3)]
    parts = [Dropout(0.5, "x", place)(x[:2], samples) for place in ranks]
    assert torch.equal(torch.cat(parts), whole)


def test_nothing_falls_away_but_in_training() -> None:
    model, sure = _model(), _model(replace(CONFIG, dropout=0.0))
    with torch.no_grad():
        assert torch.equal(model(None, _microbatch()), sure(None, _microbatch()))
    assert torch.equal(model.eval()(None, _microbatch()), sure(None, _microbatch()))
    assert not torch.equal(model.train()(None, _microbatch()), sure(None, _microbatch()))


def test_a_batch_must_number_its_samples() -> None:
    microbatch = _microbatch()
    without = Microbatch(replace(microbatch.batch, samples=None), microbatch.count)
    with pytest.raises(ValueError, match=r"model.embed_tokens drops with p=0.3, but the batch .* set dropout=0"):
        _model()(None, without)
    with torch.no_grad():
        _model()(None, without)
    with pytest.raises(ValueError, match=r"samples must be \[b\] = \[4\]"):
        replace(microbatch.batch, samples=torch.arange(3))


def test_rows_in_any_order_and_any_company_drop_the_same() -> None:
    """Loss and gradients of a batch are those of its rows one by one: the mask knows the sample, not the row."""
    model = _model()
    whole = _gradients(model, [_microbatch()])
    batch, count = _microbatch().batch, _microbatch().count
    singles = [Microbatch(batch.rows(slice(i, i + 1)), count) for i in (2, 0, 3, 1)]
    for a, b in zip(whole, _gradients(model, singles), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_places_are_those_of_gpt2() -> None:
    """After the embedding, and on what attention and feed-forward add to the residual: written down once more."""
    model, microbatch = _model(), _microbatch()
    trunk, batch = model.model, microbatch.batch

    def drop(x: Tensor, name: str) -> Tensor:
        assert batch.samples is not None
        mask = dropped(stream_key(5, f"dropout/{name}"), batch.samples, torch.arange(SEQ), x.shape[-1], 0.3)
        return x * ~mask / (1 - chance(0.3))

    assert trunk.embed_tokens is not None
    assert trunk.embed_positions is not None
    x = drop(trunk.embed_positions(trunk.embed_tokens(batch.tokens), microbatch.known_structure), "model.embed_tokens")
    for n, block in trunk.layers.items():
        x = x + drop(
            block.self_attn(block.input_layernorm(x).output, None, microbatch.known_structure),
            f"model.layers.{n}.self_attn",
        )
        x = x + drop(block.mlp(block.post_attention_layernorm(x).output), f"model.layers.{n}.mlp")
    logits = F.linear(F.rms_norm(x, (CONFIG.hidden,), eps=CONFIG.norm_eps), model.lm_head.weight[: CONFIG.vocab])
    loss = F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(model(None, microbatch), loss / microbatch.count, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_bit_and_keeps_less(dropout: float) -> None:
    config = replace(CONFIG, dropout=dropout)
    plain, recompute = _model(config), _model(config, recompute=dict.fromkeys(range(config.layers), BLOCK))
    kept = [_kept(model) for model in (plain, recompute)]
    assert kept[1] < kept[0] / 2
    for a, b in zip(_gradients(plain, [_microbatch()]), _gradients(recompute, [_microbatch()]), strict=True):
        assert torch.equal(a, b)


def _model(config: ModelConfig = CONFIG, *, recompute: dict[int, Parts] | None = None) -> Transformer:
    model = Transformer(config, StageSpec.whole(config), BUILD, seq_len=SEQ, recompute=recompute or {})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            mean = 1.0 if "norm" in name and "weight" in name else 0.0
            scale = 0.0 if mean else 0.5
            param.copy_(mean + scale * torch.randn(param.shape, generator=generator, dtype=torch.float64))
    return model


def _microbatch() -> Microbatch:
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(ROWS, SEQ, dtype=torch.bool)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.tensor([40, 7, 8, 1 << 40]))
    return Microbatch(batch, torch.tensor(float(ROWS * SEQ)))


def _gradients(model: Transformer, microbatches: list[Microbatch]) -> list[Tensor]:
    model.zero_grad()
    for microbatch in microbatches:
        model(None, microbatch).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _kept(model: Transformer) -> int:
    """Elements that autograd keeps for the backward, parameters apart."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(None, _microbatch())
    found = sum(kept.values())
    loss.backward()
    return found
