"""P1 for layouts and models that nobody chose."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from verify_checks import compare, first_wrong, small

from stretto.arguments.schema import Arguments
from stretto.schedule.sharding import MODES
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

SIZES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 3, 1), (1, 1, 3), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1)]
LARGE = [(2, 2, 2), (1, 6, 1), (1, 2, 3), (4, 2, 1), (2, 3, 1), (1, 5, 1), (8, 1, 1)]


@st.composite
def runs(draw: Any) -> Arguments:
    """A small model in a layout of at most 8 ranks; stages may be uneven, cut blocks, or be empty."""
    tp, pp, dp = draw(st.sampled_from(SIZES * 2 + LARGE))
    layers = draw(st.integers(1, 4))
    cuts = sorted(draw(st.lists(st.integers(0, 2 * layers), min_size=pp - 1, max_size=pp - 1)))
    stages = tuple((b - a) / 2 for a, b in zip([0, *cuts], [*cuts, 2 * layers], strict=True))
    args = small(
        tp=tp,
        pp=pp,
        dp=dp,
        sp=tp > 1 and draw(st.booleans()),
        dtype=draw(st.sampled_from(["fp64", "fp64", "fp32"])),
        rows=dp * draw(st.sampled_from([1, 2, 3, 4])),
        layers=layers,
        heads=8,
        kv_heads=draw(st.sampled_from([1, 2, 4, 8])),
        vocab=draw(st.integers(2, 70)),
        norm=draw(st.sampled_from(["rms", "layer"])),
        position=draw(st.sampled_from(["rope", "learned"])),
        activation=draw(st.sampled_from(["swiglu", "gelu", "gelu-tanh"])),
        **draw(st.sampled_from([{}, {"bias": True}, {"qkv_bias": True}])),
        tied=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )
    schedule = draw(st.sampled_from(["1f1b", "gpipe"]))
    given_stages = draw(st.sampled_from([stages, None]))
    order = draw(st.sampled_from([args.parallel.order, "pp-dp-ep-cp-tp", "dp-tp-cp-ep-pp"]))
    parallel = replace(args.parallel, order=order, schedule=schedule, stage_layers=given_stages if pp > 1 else None)
    if dp > 1:
        mode, size = draw(st.sampled_from(sorted(MODES))), draw(st.sampled_from([1e-6, 0.005, 25.0]))
        parallel = replace(parallel, sharding=mode, bucket_mb=size)
        if mode == "fsdp":
            parallel = replace(parallel, keep_units=draw(st.integers(0, 2)))
    return replace(args, parallel=parallel)


@settings(
    max_examples=settings.default.max_examples // 5,
    derandomize="CI" in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(args=runs())
def test_any_layout_of_any_model_equals_one_process(pool: Pool, args: Arguments) -> None:
    p = args.parallel
    assert set(pool.run(p.tp * p.pp * (p.dp or 1), differs, args)) == {""}


def differs(world: World, args: Arguments) -> str:
    return first_wrong(compare(world, args))
