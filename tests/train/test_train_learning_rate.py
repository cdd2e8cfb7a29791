"""The learning rate against recorded figures, and by its invariants.

Faults to catch: a warm-up that counts from 0; a decay that starts at 0 instead of after the warm-up; a cooldown that
begins one update early; a floor that is not reached; a floor that is passed; half a cosine.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.arguments.schema import OptimizerConfig
from stretto.train.learning_rate import learning_rate

pytestmark = pytest.mark.pure

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "train" / "learning_rates.json").read_text())["cases"]


@st.composite
def configs(draw: st.DrawFn) -> OptimizerConfig:
    schedule = draw(st.sampled_from(["cosine", "linear", "constant", "wsd"]))
    warmup, decay = draw(st.integers(0, 40)), draw(st.integers(1, 200))
    end = warmup + decay
    peak = draw(st.floats(1e-6, 1.0))
    return OptimizerConfig(
        lr=peak,
        min_lr=peak * draw(st.floats(0, 1)),
        lr_schedule=schedule,
        warmup_steps=warmup,
        decay_steps=None if schedule == "constant" else end,
        cooldown_steps=draw(st.integers(1, decay)) if schedule == "wsd" else None,
    )


@pytest.mark.parametrize("case", RECORDED, ids=[f"{i}-{c['config']['lr_decay_style']}" for i, c in enumerate(RECORDED)])
def test_recorded_rates(case: dict[str, Any]) -> None:
    c = case["config"]
    config = OptimizerConfig(
        lr=c["max_lr"],
        min_lr=c["min_lr"],
        lr_schedule=c["lr_decay_style"].lower(),
        warmup_steps=c["lr_warmup_steps"],
        decay_steps=c["lr_decay_steps"],
        cooldown_steps=c.get("wsd_decay_steps"),
    )
    for update, rate in enumerate(case["rates"]):
        assert learning_rate(config)(update) == pytest.approx(rate, rel=1e-12, abs=1e-18), f"update {update}"


@given(config=configs())
def test_it_rises_to_the_peak_then_never_rises_again(config: OptimizerConfig) -> None:
    end = config.decay_steps or config.warmup_steps + 100
    rates = [learning_rate(config)(k) for k in range(1, end + 20)]
    tiny = 1e-12 * config.lr
    rising, falling = rates[: config.warmup_steps], rates[max(0, config.warmup_steps - 1) :]
    assert all(a < b for a, b in pairwise(rising))
    assert all(b <= a + tiny for a, b in pairwise(falling))
    assert max(rates) <= config.lr + tiny
    if config.warmup_steps:
        assert rates[config.warmup_steps - 1] == config.lr


@given(config=configs())
def test_it_has_no_jumps(config: OptimizerConfig) -> None:
    """No update changes the rate by more than the steepest slope of its phase: a cosine's is pi/2 times the mean."""
    end = config.decay_steps or config.warmup_steps + 100
    length = config.cooldown_steps or max(1, end - config.warmup_steps)
    steepest = 1.5708 * (config.lr - config.min_lr) / length + 1e-12 * config.lr
    rates = [learning_rate(config)(k) for k in range(config.warmup_steps, end + 5)]
    first = 1 if config.warmup_steps == 0 else 0  # without a warm-up there is no update 0
    assert all(a - b <= steepest for a, b in pairwise(rates[first:]))


@given(config=configs())
def test_it_ends_at_the_floor_and_stays(config: OptimizerConfig) -> None:
    floor = config.lr if config.lr_schedule == "constant" else config.min_lr
    end = config.decay_steps or config.warmup_steps + 1
    for update in (end, end + 1, 10 * end + 10**6):
        assert learning_rate(config)(update) == pytest.approx(floor, rel=1e-12, abs=1e-12 * config.lr)


@pytest.mark.parametrize(("schedule", "name"), [("cosine", "end"), ("wsd", "cooldown")])
def test_an_unresolved_config_is_rejected(schedule: Any, name: str) -> None:
    config = OptimizerConfig(lr_schedule=schedule, warmup_steps=0, decay_steps=10 if schedule == "wsd" else None)
    with pytest.raises(ValueError, match=f"needs {name}"):
        learning_rate(config)(5)
