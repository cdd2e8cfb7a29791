"""What a run measures: means since the last line, both conventions of operations, memory and waits.

Each test names the fault that it catches.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train.flops import flops_per_token as counted_by_hand
from benchmarks.train.shapes import SHAPES
from stretto.arguments.schema import ModelConfig
from stretto.estimate import Flops, flops_per_token
from stretto.notation.profile import ProfileWindow
from stretto.train.busy import BusyTime
from stretto.train.meter import Meter, Work
from stretto.train.profile import Profile
from stretto.world import Axis

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def meter(clock: Clock) -> Meter:
    return Meter(Work(1000, Flops(4e9, 2e9), peak_tflops=100.0), Axis.single("world"), CPU, BusyTime(CPU), clock=clock)


@pytest.mark.gloo
def test_means_are_over_the_steps_since_the_last_line(clock: Clock) -> None:
    """Catches: the figures of the last step alone, and a window that is never closed."""
    made = meter(clock)
    for seconds in (1.0, 3.0):
        with made.spent("data"):
            clock.now += 0.5
        clock.now += seconds - 0.5
        made.stepped(clock.now, data=made.last("data"))
    found = made.figures()
    assert (found["ms_per_step"], found["tokens_per_second"], found["data_wait_ms"]) == (2000.0, 500.0, 500.0)
    assert (found["tflops_per_gpu_full"], found["tflops_per_gpu_causal"]) == (pytest.approx(2.0), pytest.approx(1.0))
    assert (found["mfu_full"], found["mfu_causal"]) == (pytest.approx(0.02), pytest.approx(0.01))
    assert found["peak_gib"] > 0.05, "the memory of this process"
    made.new_line()
    clock.now += 4
    made.stepped(clock.now)
    assert made.figures()["ms_per_step"] == 4000.0


@pytest.mark.gloo
def test_what_is_not_training_is_told_and_not_counted_as_it(clock: Clock) -> None:
    """Catches: a save that makes a step look slow, or that is told of twice."""
    made = meter(clock)
    clock.now += 1
    made.stepped(clock.now)
    with made.spent("checkpoint"):
        clock.now += 30
    made.resume()
    made.new_line()
    with made.spent("checkpoint"):
        clock.now += 7
    made.resume()
    clock.now += 1
    made.stepped(clock.now)
    found = made.figures()
    assert (found["ms_per_step"], found["checkpoint_seconds"]) == (1000.0, 7.0)
    assert "evaluation_seconds" not in found
    assert (made.last("checkpoint"), made.totals["checkpoint"]) == (7.0, 37.0)


@pytest.mark.pure
@pytest.mark.parametrize("name", SHAPES)
def test_operations_are_those_counted_by_hand(name: str) -> None:
    """Against the count of the benchmarks. Catches: an embedding that multiplies, a head that does not, GQA ignored."""
    shape = SHAPES[name]
    model = ModelConfig(
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        ffn=shape.ffn,
        vocab=shape.vocab,
        activation=shape.activation,  # type: ignore[arg-type]
    )
    for tied in (False, True):
        found = flops_per_token(replace(model, tied=tied), shape.seq_len)
        assert found.full == pytest.approx(counted_by_hand(shape), rel=1e-12)
        assert found.causal == pytest.approx(counted_by_hand(shape, causal=True), rel=1e-12)


@pytest.mark.gloo
def test_a_profile_has_the_work_of_its_steps_alone(tmp_path: Path) -> None:
    """Catches: a trace of all steps, of none, or one that is never written when the run ends within the window."""
    window = ProfileWindow.read("steps=2:4")
    for last, expected in ((5, {"step 2", "step 3"}), (2, {"step 2"})):
        profile = Profile(window, tmp_path / str(last), 0, CPU)
        other = Profile(window, tmp_path / "other", 1, CPU)
        for step in range(1, last + 1):
            profile.begin(step)
            other.begin(step)
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(3).sum()
        profile.close()
        other.close()
        assert not (tmp_path / "other").exists(), "only the chosen ranks"
        assert named(tmp_path / str(last)) == expected


def named(directory: Path) -> set[Any]:
    import gzip

    with gzip.open(directory / "rank-0.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return {name for event in events if str(name := event.get("name", "")).startswith("step ")}
