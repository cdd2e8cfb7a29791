"""What a plan says of a model before there is one: its parameters, and which stage holds which layers.

That the count is the real model's is tested with the model. Faults seen red: the head counted when it is tied, layers
left out or dealt twice, an explicit list ignored, the head's work ignored.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig
from stretto.estimate import count_parameters, stage_blocks, stage_counts
from stretto.schedule.blocks import blocks_of

pytestmark = pytest.mark.pure

GPT2 = ModelConfig(
    layers=12,
    hidden=768,
    heads=12,
    ffn=3072,
    vocab=50257,
    norm="layer",
    position="learned",
    activation="gelu",
    bias=True,
    tied=True,
)
LLAMA_3_8B = ModelConfig(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
QWEN_3_0_6B = ModelConfig(
    layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072, vocab=151936, tied=True, qk_norm=True
)
QWEN_2_5_0_5B = ModelConfig(
    layers=24, hidden=896, heads=14, kv_heads=2, ffn=4864, vocab=151936, tied=True, qkv_bias=True
)


@pytest.mark.parametrize(
    ("model", "published"),
    [(GPT2, 124_439_808), (LLAMA_3_8B, 8_030_261_248), (QWEN_3_0_6B, 596_049_920), (QWEN_2_5_0_5B, 494_032_768)],
    ids=["gpt2", "llama-3-8b", "qwen3-0.6b", "qwen2.5-0.5b"],
)
def test_counts_of_models_that_others_publish(model: ModelConfig, published: int) -> None:
    assert count_parameters(model, 1024).total == published


@given(
    layers=st.integers(1, 60), pp=st.integers(1, 12), vocab=st.integers(2, 300_000), hidden=st.sampled_from([64, 512])
)
def test_each_layer_is_on_one_stage_in_order(layers: int, pp: int, vocab: int, hidden: int) -> None:
    """P13, for any number of layers and stages; and no stage is far from the lightest that there could be."""
    args = _arguments(layers, pp, vocab=vocab, hidden=hidden)
    held = stage_blocks(args)
    assert len(held) == pp
    assert [block.layer for stage in held for block in stage if block.attention] == list(range(layers))
    assert [block.layer for stage in held for block in stage if block.feed_forward] == list(range(layers))
    head = vocab * hidden / count_parameters(args.model, 32).layer
    loads = [count + head * (i == pp - 1) for i, count in enumerate(stage_counts(args))]
    assert max(loads) <= max(head, (layers + head) / pp + 1) + 1e-9


def test_a_large_vocabulary_takes_layers_off_the_last_stage() -> None:
    small, large = (stage_blocks(_arguments(16, 4, vocab=v, hidden=64)) for v in (2, 4 * 64 * 64))
    assert [len(s) for s in small] == [4, 4, 4, 4]
    assert len(large[-1]) < 4


def test_an_explicit_list_is_obeyed() -> None:
    args = _arguments(6, 3, vocab=100, hidden=64)
    explicit = replace(args, parallel=replace(args.parallel, stage_layers=(0, 5, 1)))
    assert stage_blocks(explicit) == blocks_of((0, 5, 1))


def test_a_vocabulary_that_is_not_known_yet_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab is not resolved yet"):
        count_parameters(ModelConfig(), 32)


def _arguments(layers: int, pp: int, *, vocab: int, hidden: int) -> Arguments:
    return Arguments(
        model=ModelConfig(layers=layers, hidden=hidden, heads=4, ffn=4 * hidden, vocab=vocab),
        parallel=ParallelConfig(pp=pp),
        batch=BatchConfig(seq_len=32),
    )
