"""A block that is cut between attention and feed-forward is the same block: loss and gradients to the bit.

Faults to catch: a cut block that leaves out its residual; a norm of the other sublayer; a feed-forward that has the
number of the next layer; dropout that is drawn anew; a parallel residual that is cut.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stretto.arguments.schema import ModelConfig
from stretto.batch import Batch
from stretto.estimate.kept import BLOCK, NOTHING, Parts
from stretto.models import Microbatch, StageSpec, Transformer
from stretto.params import collect, fill
from stretto.schedule.blocks import StageBlock, Sublayers, blocks_of
from stretto.tensor_parallel import Build
from stretto.world import Axis

pytestmark = pytest.mark.gloo

SEQ, ROWS, VOCAB = 8, 2, 29
CONFIG = ModelConfig(layers=3, hidden=16, heads=4, kv_heads=2, head_dim=4, ffn=24, vocab=VOCAB, dropout=0.2)
SPARSE: dict[str, Any] = {"experts": 4, "top_k": 2, "expert_ffn": 16, "balance_loss": 0.05}
KINDS: list[dict[str, Any]] = [
    {},
    {"norm": "layer", "bias": True, "activation": "gelu", "position": "learned"},
    {"norm_placement": "both", "qk_norm": True, "window": 4, "global_layers": (1,)},
    {"norm_placement": "post", "qk_norm": True, "qk_norm_width": "full"},
    {"kv_lora_rank": 6, "q_lora_rank": 5, "rope_head_dim": 2, "kv_heads": 4},
    {**SPARSE, "shared_ffn": 8, "shared_gate": True, "first_dense": 1},
    {**SPARSE, "norm_placement": "both"},
]


def stages(config: ModelConfig, counts: tuple[float, ...], parts: Parts) -> list[Transformer]:
    build = Build(Axis.single("tp"), False, torch.float32, seed=3, tokens=SEQ * ROWS)
    made, last = [], len(counts) - 1
    for n, blocks in enumerate(blocks_of(counts)):
        again = {block.layer: parts for block in blocks}
        spec = StageSpec(blocks, first=n == 0, last=n == last)
        made.append(Transformer(config, spec, build, seq_len=SEQ, recompute=again))
        fill(collect(made[-1]), 7, lambda p: p.data)
    return made


def gradients(config: ModelConfig, counts: tuple[float, ...], parts: Parts = NOTHING) -> dict[str, Tensor]:
    """By logical name, with the loss; each stage computes from what it was sent, and sends the gradient of that."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCAB, (ROWS, SEQ + 1), generator=generator)
    mask = torch.rand(ROWS, SEQ, generator=generator) < 0.8
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.arange(ROWS))
    microbatch, made, sent = Microbatch(batch, mask.sum().double()), stages(config, counts, parts), []
    x: Tensor | None = None
    for stage in made:
        x = None if x is None else x.detach().requires_grad_()
        out = stage(x, microbatch)
        sent.append((x, out))
        x = out
    dy: Tensor | None = None
    for x, out in reversed(sent):
        out.backward(dy)
        dy = None if x is None else x.grad
    found = {
        logical.name: param.grad if param.grad is not None else torch.zeros_like(param)
        for stage in made
        for item in collect(stage)
        for logical, param in [(item.logical[0], item.param)]
    }
    return {**found, "loss": sent[-1][1].detach()}


@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.sampled_from([NOTHING, frozenset({"activation", "attention"}), BLOCK]),
)
@settings(deadline=None)
def test_stages_of_cut_blocks_are_the_whole_model(kind: dict[str, Any], cuts: list[int], parts: Parts) -> None:
    """P13 in halves: any cut, empty stages included, in every form of block that can be cut."""
    config = replace(CONFIG, **kind)
    edges = [0, *sorted(cuts), 2 * config.layers]
    counts = tuple((b - a) / 2 for a, b in pairwise(edges))
    wanted, found = gradients(config, (3.0,)), gradients(config, counts, parts)
    assert found.keys() == wanted.keys()
    wrong = [name for name, each in found.items() if not torch.equal(each, wanted[name])]
    assert not wrong, (counts, wrong)


@pytest.mark.parametrize("sublayers", [Sublayers.ATTENTION, Sublayers.FEED_FORWARD])
def test_a_parallel_residual_is_not_cut(sublayers: Sublayers) -> None:
    spec = StageSpec((StageBlock(1, sublayers),), first=False, last=False)
    with pytest.raises(ValueError, match="block 1: attention and feed-forward of a parallel residual are on one stage"):
        Transformer(
            replace(CONFIG, parallel_residual=True),
            spec,
            Build(Axis.single("tp"), False, torch.float32),
            seq_len=SEQ,
        )
