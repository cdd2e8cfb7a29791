"""P1 where not all is trained: adapters and frozen parameters in each layout give what one process gives.

Faults to catch: a part of the gradient of a matrix that all ranks hold not summed; an adapter behind the sum over the
ranks, which counts it once each; a frozen head that still takes a gradient; a scale left out; a mask that each rank
draws from channel 0 on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_verify_layouts import arguments, prove

from stretto.arguments import ConfigError
from stretto.arguments.schema import Arguments, TuningConfig
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify.session import build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

ALL = TuningConfig(lora_rank=3, lora_targets=("q", "k", "v", "o", "gate", "up", "down"))
SOME = TuningConfig(lora_rank=2, lora_alpha=3.0, lora_targets=("q", "v", "down"))
DROPPING = TuningConfig(lora_rank=2, lora_dropout=0.4, lora_targets=("q", "k", "o", "up", "down"))
FROZEN = TuningConfig(freeze=("model.embed_tokens.*", "*.0.*", "*.mlp.down_proj.*"))
CASES: list[tuple[tuple[int, int, int], int, TuningConfig, dict[str, Any]]] = [
    ((2, 2, 2), 0b01000000, ALL, {}),
    ((4, 1, 2), 0b01010000, SOME, {"sharding": "fsdp"}),
    ((4, 1, 1), 0b00110010, SOME, {}),
    ((1, 3, 2), 0b00000001, ALL, {"sharding": "zero1"}),
    ((2, 2, 1), 0b01000001, SOME, {"schedule": "zb-h1"}),
    ((2, 1, 2), 0b01000000, DROPPING, {}),
    ((2, 2, 2), 0b01000001, FROZEN, {"sharding": "zero2"}),
    ((1, 3, 1), 0b00000000, FROZEN, {"stage_layers": (0, 3, 2)}),
]


@pytest.mark.parametrize(
    ("sizes", "variant", "tuning", "more", "recompute"),
    [
        pytest.param(*case, recompute, marks=[pytest.mark.nightly] * (k != number % 2 or number in (1, 2)))
        for number, case in enumerate(CASES)
        for k, recompute in enumerate(("selective", "none"))
    ],
)
def test_a_layout_equals_one_process(
    pool: Pool,
    sizes: tuple[int, int, int],
    variant: int,
    tuning: TuningConfig,
    more: dict[str, Any],
    recompute: str,
) -> None:
    prove(pool, tuned(sizes, variant, tuning, recompute, **more), steps=1)


def tuned(sizes: tuple[int, int, int], variant: int, tuning: TuningConfig, recompute: str, **more: Any) -> Arguments:
    args = arguments(*sizes, variant=variant)
    parallel, run = replace(args.parallel, **more), replace(args.run, recompute=recompute)  # type: ignore[arg-type]
    return replace(args, tuning=tuning, parallel=parallel, run=run)


def test_adapters_have_the_gradients_that_follow_from_the_whole_matrix(pool: Pool) -> None:
    """With W + s B A in the place of W, dA = s B^T dW and dB = s dW A^T; and nothing else moves."""
    pool.run(1, _follow)


def _follow(world: World) -> None:
    args = replace(tuned((1, 1, 1), 0b00000001, ALL, "none"), batch=arguments(1, 1, 1, variant=0).batch)
    with build(args, Layout.of(), World.single()) as session:
        weights = random_weights(session, 0)
        session.load_full(weights)
        session.step(random_batch(args, 1))
        found, after = session.full_grads(), session.full_params()
        frozen = {n for n, x in after.items() if torch.equal(x, weights[n])}
    assert frozen == {n for n in weights if "lora" not in n}
    assert found.keys() == weights.keys() - frozen
    scale, base = 16 / 3, {n: weights[n] for n in frozen}
    pairs = [n.removesuffix(".lora_A") for n in found if n.endswith("lora_A")]
    for n in pairs:
        base[f"{n}.weight"] = base[f"{n}.weight"] + scale * weights[f"{n}.lora_B"] @ weights[f"{n}.lora_A"]
    whole = replace(args, tuning=TuningConfig())
    with build(whole, Layout.of(), World.single()) as session:
        session.load_full(base)
        session.step(random_batch(args, 1))
        full = session.full_grads()
    assert len(pairs) == 7 * args.model.layers
    for n in pairs:
        dw = full[f"{n}.weight"]
        torch.testing.assert_close(found[f"{n}.lora_A"], scale * weights[f"{n}.lora_B"].T @ dw, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[f"{n}.lora_B"], scale * dw @ weights[f"{n}.lora_A"].T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (("model.nothing",), "'model.nothing' is the name of no parameter"),
        (("*.3.self_attn.q_proj.weight",), "q_proj.weight cannot be frozen without model.layers.3.self_attn.k_proj"),
        (("*",), "it leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_said(patterns: tuple[str, ...], said: str) -> None:
    args = tuned((1, 1, 1), 0, TuningConfig(freeze=patterns), "none")
    with pytest.raises(ConfigError, match=said.replace("*", r"\*")), build(args, Layout.of(), World.single()):
        pass
