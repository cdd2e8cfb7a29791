"""Keys and values that are kept give the logits that come without: whatever lies between a token and its past.

Faults to catch: new tokens at positions counted from 0; a window that is counted from the new tokens; queries that see
what comes after them.
"""

from __future__ import annotations

import pytest
import torch

from stretto.arguments.model import ModelConfig
from stretto.layout import Layout
from stretto.models import KeyValues, StageSpec, Transformer
from stretto.parallel_state import ParallelState
from stretto.params import collect, fill
from stretto.tensor_parallel import Build
from stretto.train.sample import Spread, sample
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

PLAIN = {"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 61, "init_std": 0.3}
SHAPES = {
    "rope": {},
    "learned": {"position": "learned"},
    "windows": {"window": 3, "global_layers": (1,), "rope_local_base": 50.0},
    "latent": {
        "kv_heads": None,
        "kv_lora_rank": 10,
        "q_lora_rank": 6,
        "rope_head_dim": 4,
        "v_head_dim": 6,
        "window": 4,
    },
    "softcap": {"attention_softcap": 2.0, "window": 4, "logit_softcap": 3.0, "qkv_clip": 0.4},
}


def built(name: str) -> Transformer:
    config = ModelConfig(**{**PLAIN, **SHAPES[name]})
    model = Transformer(config, StageSpec.whole(config), Build(Axis.single("tp"), False, torch.float64), seq_len=12)
    fill(collect(model), 5, lambda p: p.data)
    return model


def alone(model: Transformer) -> Spread:
    return Spread.over(model, ParallelState.build(Layout.of(), World.single()))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_what_is_kept_changes_no_logit(name: str) -> None:
    model = built(name)
    tokens = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1))
    wanted, before, found = model.logits(tokens), KeyValues(), []
    for first, last in ((0, 5), (5, 6), (6, 10), (10, 12)):
        found.append(model.logits(tokens[:, first:last], before))
    torch.testing.assert_close(torch.cat(found), wanted, rtol=0, atol=1e-12)
    assert before.length == 12


@torch.no_grad()
def test_a_sample_is_the_one_that_is_drawn_without_keeping_anything() -> None:
    """Beyond the context, too, where every token has another position with each step."""
    model = built("rope")
    tokens = [3, 1, 4]
    for _ in range(14):
        tokens.append(int(model.logits(torch.tensor([tokens[-9:]]))[-1, 0, :61].argmax()))
    assert sample(alone(model), tokens[:3], 14, context=9, vocab=61, temperature=0) == tokens[3:]


def test_top_p_leaves_the_likeliest_alone() -> None:
    model = alone(built("rope"))
    likeliest = sample(model, [3, 1], 6, context=12, vocab=61, temperature=0)
    assert sample(model, [3, 1], 6, context=12, vocab=61, temperature=1.0, top_p=1e-6) == likeliest
    assert sample(model, [3, 1], 6, context=12, vocab=61, temperature=9.0, top_p=1.0) != likeliest
