"""Every pipeline computes what one process computes: loss and every gradient."""

from __future__ import annotations

from functools import partial

import pipeline_reference as pt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_reference import Model
from torch import nn

from stretto.pipeline_parallel import Executor, Link, OwnWeights, Stage
from stretto.schedule import gpipe, one_f_one_b
from stretto.schedule.generators import forward_only
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo

unscoped = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def models(draw: st.DrawFn, stages: int) -> Model:
    """Layers of uneven widths; a stage may have none."""
    width = draw(st.integers(1, 6))
    widths = []
    for _ in range(stages):
        inner = draw(st.lists(st.integers(1, 6), max_size=3))
        widths.append((width, *inner))
        width = widths[-1][-1]
    return Model(tuple(widths), seed=draw(st.integers(0, 99)))


@unscoped
@given(data=st.data(), p=st.sampled_from([1, 2, 4]), m=st.integers(1, 6), two_ways=st.booleans())
@pytest.mark.parametrize("generator", [gpipe, one_f_one_b])
def test_pipeline_equals_one_process(
    pool: Pool, generator: pt.Generator, data: st.DataObject, p: int, m: int, two_ways: bool
) -> None:
    model = data.draw(models(p))
    outcomes = pool.run(p, pt.run_step, model, pt.program(generator, p, m), two_ways)
    pt.assert_equal_to_reference(outcomes, pt.reference(model, m), last_rank=p - 1)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_v_hands_over_on_the_rank_at_the_turn(pool: Pool, p: int, m: int) -> None:
    model = Model(tuple((3 + s % 3, 2, 3 + (s + 1) % 3) for s in range(2 * p)))
    outcomes = pool.run(p, pt.run_step, model, pt.program(pt.v_shape, p, m))
    pt.assert_equal_to_reference(outcomes, pt.reference(model, m), last_rank=0)


@pytest.mark.parametrize("two_ways", [False, True])
@pytest.mark.parametrize("p", [2, 3])
def test_stages_dealt_round_the_ranks(pool: Pool, p: int, two_ways: bool) -> None:
    model = Model(tuple((4, 4) for _ in range(2 * p)))
    outcomes = pool.run(p, pt.run_step, model, pt.program(partial(pt.looped, rounds=2), p, 3), two_ways)
    pt.assert_equal_to_reference(outcomes, pt.reference(model, 3), last_rank=p - 1)


def test_stages_without_layers_pass_everything_through(pool: Pool) -> None:
    model = Model(((3, 5), (5,), (5,), (5, 2)))
    outcomes = pool.run(4, pt.run_step, model, pt.program(one_f_one_b, 4, 5))
    pt.assert_equal_to_reference(outcomes, pt.reference(model, 5), last_rank=3)


def test_step_after_step(pool: Pool) -> None:
    model = Model(((3, 5), (5, 2)))
    outcomes = pool.run(2, pt.run_step, model, pt.program(one_f_one_b, 2, 3), False, 4)
    pt.assert_equal_to_reference(outcomes, pt.reference(model, 3), last_rank=1)


def test_many_messages_may_be_ahead(pool: Pool) -> None:
    model = Model(((3, 5), (5, 4), (4, 2)))
    outcomes = pool.run(3, pt.run_step, model, pt.program(gpipe, 3, 40))
    pt.assert_equal_to_reference(outcomes, pt.reference(model, 40), last_rank=2)


def _evaluate(world: World, model: Model, m: int) -> pt.Outcome:
    with torch.no_grad():
        return pt.run_step(world, model, pt.program(forward_only, world.size, m))


@pytest.mark.parametrize("p", [1, 2, 4])
def test_forward_only_gives_the_loss_and_keeps_nothing(pool: Pool, p: int) -> None:
    model = Model(tuple((4, 4) for _ in range(p)))
    outcomes = pool.run(p, _evaluate, model, 5)
    expected = pt.reference(model, 5)
    assert pt.close(outcomes[-1].loss, expected.loss, 1e-12)
    assert all(not g.any() for outcome in outcomes for g in outcome.gradients.values())


def _train_evaluate_train(world: World, model: Model, m: int) -> list[pt.Outcome]:
    """One link and one set of stages under two programs, in turn."""
    link = Link(pt.pp_axis(world), world.device)
    stages = {world.rank: model.stage(world.rank)}
    train, evaluate = (
        Executor(pt.program(generator, world.size, m), world.rank, stages, link, OwnWeights())
        for generator in (one_f_one_b, forward_only)
    )
    outcomes = []
    for _ in range(2):
        stages[world.rank].module.zero_grad()
        loss = train.step(model.microbatches(m))
        with torch.inference_mode():
            evaluated = evaluate.step(model.microbatches(m))
        assert torch.equal(loss, evaluated)
        outcomes.append(pt.Outcome(loss, pt.gradients({world.rank: stages[world.rank].module})))
    return outcomes


def test_training_and_evaluation_in_turn(pool: Pool) -> None:
    model = Model(((3, 5), (5, 4), (4, 2)))
    for outcomes in zip(*pool.run(3, _train_evaluate_train, model, 4), strict=True):
        pt.assert_equal_to_reference(list(outcomes), pt.reference(model, 4), last_rank=2)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 3e-5), (torch.bfloat16, 0.05)])
def test_narrower_floats_travel_as_they_are(pool: Pool, dtype: torch.dtype, tol: float) -> None:
    model = Model(((3, 5), (5, 2)), dtype=dtype)
    outcomes = pool.run(2, pt.run_step, model, pt.program(one_f_one_b, 2, 3))
    pt.assert_equal_to_reference(outcomes, pt.reference(model, 3), last_rank=1, tol=tol)


class Transposed(nn.Module):
    """Gives the part's output, and takes its gradient, in columns instead of rows."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor | None, microbatch: object) -> torch.Tensor:
        y: torch.Tensor = self.part(x, microbatch)
        return y if y.dim() < 2 else y.T.contiguous().T


def _transposed(world: World, model: Model, m: int) -> pt.Outcome:
    stage = model.stage(world.rank)
    part = stage.module
    stage.module = Transposed(part)
    program = pt.program(one_f_one_b, world.size, m)
    link = Link(pt.pp_axis(world), world.device)
    loss = Executor(program, world.rank, {world.rank: stage}, link, OwnWeights()).step(model.microbatches(m))
    return pt.Outcome(loss, pt.gradients({world.rank: part}))


def test_outputs_of_any_strides(pool: Pool) -> None:
    model = Model(((3, 5), (5, 4), (4, 2)))
    pt.assert_equal_to_reference(pool.run(3, _transposed, model, 3), pt.reference(model, 3), last_rank=2)


class Counts(nn.Module):
    """Writes down for how many microbatches the stage keeps something, this one included."""

    def __init__(self, stage: Stage, peak: list[int]) -> None:
        super().__init__()
        self.inner, self.stage, self.peak = stage.module, [stage], peak

    def forward(self, x: torch.Tensor | None, microbatch: object) -> torch.Tensor:
        self.peak.append(1 + len(self.stage[0].kept))
        y: torch.Tensor = self.inner(x, microbatch)
        return y


def _most_kept(world: World, model: Model, generator: pt.Generator, m: int) -> int:
    stage, peak = model.stage(world.rank), list[int]()
    stage.module = Counts(stage, peak)
    link = Link(pt.pp_axis(world), world.device)
    program = pt.program(generator, world.size, m)
    Executor(program, world.rank, {world.rank: stage}, link, OwnWeights()).step(model.microbatches(m))
    return max(peak)


def test_memory_is_that_of_the_schedule(pool: Pool) -> None:
    """1F1B keeps p - r microbatches on rank r, GPipe all of them."""
    model = Model(((3, 4), (4, 4), (4, 4), (4, 2)))
    assert pool.run(4, _most_kept, model, one_f_one_b, 6) == [4, 3, 2, 1]
    assert pool.run(4, _most_kept, model, gpipe, 6) == [6, 6, 6, 6]
