"""What a run says of its speed is what its steps took, whatever came between them.

A clock goes on by a second for each step and by ten for all that is no training.

Faults to catch: a skipped step whose time is that of the next one; the first step in a mean with others; replicas
compared in the time of a step; seconds of an earlier `fit` told of the next one; a step that the device was done with
before the host came to wait for it, and that took less than no time; rows of the step that is launched next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.train import loop
from stretto.train.batches import RowBatches
from stretto.train.busy import BusyTime
from stretto.train.loop import Loop
from stretto.train.meter import Meter, Work
from stretto.train.optimizers import SGD
from stretto.train.record import Listener, StepRecord
from stretto.train.step import Stepper
from stretto.train.trainer import Trainer
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo


class Clock:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spends(self, seconds: float | Iterator[float], patch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        """A function takes so long from now on."""
        inner = getattr(where, name)

        def spending(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            self.now += seconds if isinstance(seconds, float) else next(seconds)
            return found

        patch.setattr(where, name, spending)


class Rows(Listener):
    def __init__(self) -> None:
        self.ms: dict[int, float] = {}
        self.data: dict[int, float | None] = {}

    def stepped(self, record: StepRecord) -> None:
        assert record.ms_per_step is not None
        assert record.tokens_per_second == pytest.approx(8e3 / record.ms_per_step)
        self.ms[record.step], self.data[record.step] = record.ms_per_step, record.data_wait_ms


@contextmanager
def trainer(clock: Clock, *, wrong: int | None = None, **options: Any) -> Iterator[Trainer]:
    """A run of one rank, whose batch `wrong` is no number."""
    batches = [torch.full((8, 3), torch.nan if n == wrong else 1.0) for n in range(1, 20)]
    with (
        ParallelState.build(Layout.of(), World.single()) as state,
        Trainer(
            nn.Linear(3, 1),
            state,
            data=batches,
            loss=lambda y, _: y.square().mean(),
            global_batch=8,
            optimizer=SGD(),
            on_nonfinite="skip",
            evaluation=batches[:1],
            **options,
        ) as made,
    ):
        made.meter._clock = clock
        made.meter.resume()
        yield made


def test_a_step_takes_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third is skipped, and rows come later and later; there are evaluations, saves, comparisons of replicas."""
    clock, rows = Clock(), Rows()
    clock.spends(1.0, monkeypatch, Stepper, "step")
    clock.spends((n / 10 for n in count(1)), monkeypatch, RowBatches, "next")
    clock.spends(10.0, monkeypatch, Loop, "_save")
    clock.spends(10.0, monkeypatch, Loop, "_evaluate")
    clock.spends(10.0, monkeypatch, loop, "require_equal_replicas")
    every = {"save_every": 4, "eval_every": 5, "check_replicas": 7, "log_every": 1}
    with trainer(clock, wrong=3, out=tmp_path, **every) as made:
        made.fit(11, [rows], stop=bool)
    data = {n: 100.0 * n for n in range(1, 12) if n != 3} | {4: 350.0}  # the mean of the third and the fourth
    assert rows.data == pytest.approx(data)
    assert rows.ms == pytest.approx({n: 1000 + each for n, each in data.items()})


@pytest.mark.parametrize("wrong", [None, 1])
def test_the_first_step_is_in_no_mean_with_others(monkeypatch: pytest.MonkeyPatch, wrong: int | None) -> None:
    clock, rows = Clock(), Rows()
    clock.spends(1.0, monkeypatch, Stepper, "step")
    clock.spends(60.0, monkeypatch, Loop, "_first_step")
    with trainer(clock, wrong=wrong, log_every=4) as made:
        made.fit(6, [rows], stop=bool)
    assert rows.ms == pytest.approx(({} if wrong else {1: 61000.0}) | dict.fromkeys(range(2, 7), 1000.0))


def test_each_fit_tells_of_its_own_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.spends(1.0, monkeypatch, Stepper, "step")
    with trainer(clock, eval_every=1) as made:
        clock.spends(10.0, monkeypatch, made.assembly.evaluator, "step")
        assert [made.fit(steps, stop=bool).evaluation_seconds for steps in (3, 4)] == [30.0, 20.0]


def test_no_step_takes_less_than_no_time() -> None:
    """The host waits for each other step, and finds the one after it done: together they took what they took."""
    clock = Clock()
    meter = Meter(Work(8), Axis.single("world"), torch.device("cpu"), BusyTime(torch.device("cpu")), clock=clock)
    found = []
    for step in range(6):
        clock.now += 0.75
        meter.stepped(clock.now - 0.8, ago=None if step % 2 else 0.0)
        found.append(meter.figures()["ms_per_step"])
        meter.new_line()
    assert all(each > 0 for each in found)
    assert sum(found) == pytest.approx(1e3 * clock.now, abs=500)
