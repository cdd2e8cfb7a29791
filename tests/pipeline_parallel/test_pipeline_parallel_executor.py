"""What the executor rejects, names and records; one process, no messages."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import pipeline_reference as pt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_reference import Model
from torch import nn

from stretto.pipeline_parallel import Executor, LeftoverError, Link, OwnWeights, Stage, TensorMeta
from stretto.pipeline_parallel.meta import DTYPES, MAX_DIM
from stretto.schedule import DDP, FSDP, Op, Schedule, gpipe, lower, one_f_one_b
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

MODEL = Model(((3, 4), (4, 5, 4), (4, 4), (4, 2)))


def executor(schedule: Schedule, model: Model = MODEL) -> Executor:
    """All stages in this process."""
    stages = {s: model.stage(s) for s in range(schedule.num_stages)}
    return Executor(schedule, 0, stages, Link(Axis.single("pp"), torch.device("cpu")), OwnWeights())


def on_one_rank(m: int) -> Schedule:
    """Four stages on one rank."""
    return pt.looped(1, m, rounds=4)


def without(schedule: Schedule, *texts: str) -> Schedule:
    assert set(texts) <= {str(a) for a in schedule.actions}
    return replace(schedule, ranks=tuple(tuple(a for a in r if str(a) not in texts) for r in schedule.ranks))


def test_all_stages_on_one_rank() -> None:
    e = executor(lower(on_one_rank(3)))
    loss = e.step(MODEL.microbatches(3))
    got = pt.Outcome(loss, pt.gradients({s: stage.module for s, stage in e.stages.items()}))
    pt.assert_equal_to_reference([got], pt.reference(MODEL, 3), last_rank=0)


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (("3F1", "3B1", "2B1", "1B1", "0B1"), "the activation of microbatch 1 for stage 3"),
        (("2B1", "1B1", "0B1"), "the gradient of microbatch 1 for the output of stage 2"),
        (("0B1",), "what stage 0 keeps of microbatch 1"),
    ],
)
def test_what_is_left_over_is_named(removed: tuple[str, ...], named: str) -> None:
    with pytest.raises(LeftoverError, match=named):
        executor(without(on_one_rank(2), *removed)).step(MODEL.microbatches(2))


def test_the_stages_must_be_those_of_the_rank() -> None:
    link = Link(Axis.single("pp"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"rank 1 holds stages \[1\], but was given \[0\]"):
        Executor(one_f_one_b(2, 2), 1, {0: MODEL.stage(0)}, link, OwnWeights())


def test_as_many_microbatches_as_the_program_has() -> None:
    with pytest.raises(ValueError, match="2 microbatches for a program of 3"):
        executor(on_one_rank(3)).step(MODEL.microbatches(2))


class Explodes(nn.Module):
    def forward(self, *_: object) -> torch.Tensor:
        raise ArithmeticError("boom")


def test_an_exception_names_the_action() -> None:
    e = executor(on_one_rank(2))
    e.stages[2].module = Explodes()
    with pytest.raises(ArithmeticError, match="boom") as caught:
        e.step(MODEL.microbatches(2))
    assert caught.value.__notes__ == ["in 2F0: F of microbatch 0 in stage 2, on pipeline rank 0"]


def test_a_stage_says_what_it_expects() -> None:
    stage = MODEL.stage(2)
    with pytest.raises(ValueError, match=r"stage 2 expects an input \[3, 4\] of float64, but got \[3, 5\] of float64"):
        stage.forward(0, torch.zeros(3, 5, dtype=torch.float64), None)
    with pytest.raises(ValueError, match="but got None"):
        stage.forward(0, None, None)
    with pytest.raises(ValueError, match="boundary \\[2\\] of complex64: take float64, float32, float16, bfloat16"):
        Stage(1, nn.Identity(), TensorMeta((2,), torch.complex64))
    with pytest.raises(ValueError, match="the first stage, and no other"):
        Stage(0, nn.Identity(), TensorMeta((2,), torch.float32))


def test_the_loss_must_be_a_scalar() -> None:
    model = Model(((3, 4),))
    e = executor(lower(gpipe(1, 1)), model)
    e.stages[0].module = nn.Linear(3, 3)
    e.stages[0].module.forward = lambda *_: torch.zeros(2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"scalar loss, a mean over its rows, not a tensor of shape \[2\]"):
        e.step(model.microbatches(1))


class Blind(nn.Module):
    """Uses its microbatch alone; what it was sent is ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))

    def forward(self, *_: object) -> torch.Tensor:
        return self.weight * 2


def test_an_unused_input_has_gradient_zero() -> None:
    e = executor(lower(on_one_rank(2)))
    e.stages[1].module = Blind()
    e.step(MODEL.microbatches(2))
    grads = [p.grad for p in e.stages[0].module.parameters()]
    assert all(g is not None and not g.any() for g in grads)
    assert e.stages[1].module.weight.grad is not None


def test_a_frozen_stage_passes_gradients_on() -> None:
    e = executor(lower(on_one_rank(2)))
    e.stages[1].module.requires_grad_(False)
    e.step(MODEL.microbatches(2))
    expected = pt.reference(MODEL, 2)
    for name, p in e.stages[0].module.named_parameters():
        assert p.grad is not None
        assert pt.close(p.grad, expected.gradients[f"0.{name}"], 1e-12)


def test_a_frozen_first_stage_needs_no_gradient() -> None:
    e = executor(lower(on_one_rank(2)))
    e.stages[0].module.requires_grad_(False)
    e.step(MODEL.microbatches(2))
    expected = pt.reference(MODEL, 2)
    for name, p in e.stages[1].module.named_parameters():
        assert p.grad is not None
        assert pt.close(p.grad, expected.gradients[f"1.{name}"], 1e-12)


def test_the_output_is_not_kept_for_the_backward() -> None:
    """Sent activations would otherwise stay for as long as their graph."""
    import weakref

    stage = Stage(1, nn.Linear(4, 4), TensorMeta((2, 4), torch.float32))
    stage.module.forward = lambda x, _: x + 1  # type: ignore[assignment]
    y = stage.forward(0, torch.zeros(2, 4), None)
    storage = weakref.ref(y.untyped_storage())
    assert torch.equal(y, torch.ones(2, 4))
    del y
    assert storage() is None
    dx = stage.backward(0, torch.full((2, 4), 3.0))
    assert dx is not None
    assert torch.equal(dx, torch.full((2, 4), 3.0))


@dataclass
class Recorded:
    """Weights that write down what is asked of them."""

    log: list[str] = field(default_factory=list)

    def unshard(self, stage: int) -> None:
        self.log.append(f"unshard {stage}")

    def reshard(self, stage: int) -> None:
        self.log.append(f"reshard {stage}")

    def reduce(self, stage: int) -> None:
        self.log.append(f"reduce {stage}")


class Logs(nn.Module):
    """Writes down when the stage runs forward and back."""

    def __init__(self, stage: int, inner: nn.Module, log: list[str]) -> None:
        super().__init__()
        self.stage, self.inner, self.log = stage, inner, log

    def forward(self, x: torch.Tensor | None, microbatch: object) -> torch.Tensor:
        self.log.append(f"F {self.stage}")
        y: torch.Tensor = self.inner(x, microbatch)
        y.register_hook(lambda _: self.log.append(f"B {self.stage}"))
        return y


def test_the_weights_are_asked_where_the_program_says() -> None:
    weights = Recorded()
    schedule = lower(pt.v_shape(1, 2), FSDP)
    model = Model(((3, 4), (4, 2)))
    stages = {s: model.stage(s) for s in (0, 1)}
    for s, stage in stages.items():
        stage.module = Logs(s, stage.module, weights.log)
    Executor(schedule, 0, stages, Link(Axis.single("pp"), torch.device("cpu")), weights).step(model.microbatches(2))
    verbs = {Op.UNSHARD: "unshard", Op.RESHARD: "reshard", Op.REDUCE: "reduce", Op.F: "F", Op.B: "B"}
    assert weights.log == [f"{verbs[a.op]} {a.stage}" for a in schedule.ranks[0]]
    assert weights.log.index("reduce 1") == len(weights.log) - 1 - weights.log[::-1].index("B 1") - 1


def _mismatched(world: World) -> None:
    """Rank 1 fails in its own stage; its error must not be lost behind what rank 0 then sees."""
    axis = pt.pp_axis(world)
    model = Model(((3, 4), (4, 2)))
    stage = model.stage(world.rank)
    if world.rank == 1:
        stage.module = Explodes()
    e = Executor(lower(one_f_one_b(2, 2), DDP), world.rank, {world.rank: stage}, Link(axis, world.device), OwnWeights())
    e.step(model.microbatches(2))


def test_the_note_crosses_processes(pool: Pool) -> None:
    with pytest.raises(ArithmeticError, match="boom") as caught:
        pool.run(2, _mismatched)
    assert "in 1F0: F of microbatch 0 in stage 1, on pipeline rank 1" in str(caught.value.__cause__)


def _disagree(world: World, model: Model, boundary: TensorMeta) -> None:
    stage = model.stage(world.rank)
    if world.rank == 1:
        stage.boundary = boundary
    link = Link(pt.pp_axis(world), world.device)
    Executor(lower(one_f_one_b(2, 2)), world.rank, {world.rank: stage}, link, OwnWeights()).step(model.microbatches(2))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 3), torch.float64), ((3, 5), torch.float64), ((4, 3), torch.float64), ((6, 4), torch.float32)],
)
def test_stages_that_disagree_on_a_boundary(pool: Pool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also where as many bytes would arrive, or fewer than the buffer holds."""
    expects = TensorMeta(shape, dtype)
    with pytest.raises(ValueError, match=re.escape(f"sends [3, 4] of float64 to rank 1, which expects {expects}")):
        pool.run(2, _disagree, Model(((3, 4), (4, 2))), expects)


@given(shape=st.lists(st.integers(0, 2**40), max_size=MAX_DIM), dtype=st.sampled_from(DTYPES))
def test_an_announcement_says_all(shape: list[int], dtype: torch.dtype) -> None:
    meta = TensorMeta(tuple(shape), dtype)
    assert TensorMeta.decode(meta.encode()) == meta
    assert len(meta.encode()) == MAX_DIM + 1


def test_link_rejects_another_set_of_ranks() -> None:
    with pytest.raises(ValueError, match=r"up\[0, 2\] must join the ranks 1 and 0 of pp\[0, 1\]"):
        Link(Axis("pp", 0, (0, 1)), torch.device("cpu"), {(1, 0): Axis("up", 0, (0, 2))})


class Drained(Link):
    """Counts how often it was told to wait for its sends."""

    times = 0

    def drain(self) -> None:
        self.times += 1
        super().drain()


def test_a_step_ends_with_all_sends_done() -> None:
    link = Drained(Axis.single("pp"), torch.device("cpu"))
    stages = {s: MODEL.stage(s) for s in range(4)}
    e = Executor(lower(on_one_rank(1)), 0, stages, link, OwnWeights())
    e.step(MODEL.microbatches(1))
    e.step(MODEL.microbatches(1))
    assert link.times == 2


def test_a_stage_leaves_its_input_alone() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    MODEL.stage(2).forward(0, x, MODEL.microbatches(1)[0])
    assert not x.requires_grad
    assert x.grad is None
