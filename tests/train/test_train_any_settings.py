"""Any settings of `stretto train` that the rules accept: what is trained with them is what one process trains.

The draw is over features that no list of layouts holds together (docs/verified.md has those that are listed). On a
commit one rank of each run takes a step on groups that pretend: shapes and paths are real, numbers are not. At night
real ranks train, stop after two steps and go on in another layout; losses, gradient norms and evaluations of all four
steps equal those of one process, and with the last evaluation the weights.

Red where a rule is left out (say, that latents take no biases); where replicas are not summed over cp; where a
checkpoint forgets moments.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import torch
from any_settings import BASE, TOGETHER, Settings, any_run, mended, run_of
from hypothesis import HealthCheck, Phase, given, note
from hypothesis import settings as effort
from hypothesis import strategies as st

from stretto.arguments import ConfigError, Resolved
from stretto.batch import Batch
from stretto.checkpoint import latest_complete
from stretto.data.feed import rows_of
from stretto.data.text import Text
from stretto.initialize.timeline import StartTimeline
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Link
from stretto.testing import Pool
from stretto.train.build import build
from stretto.train.groups import axes_of
from stretto.train.record import EvalRecord, Listener, StepRecord
from stretto.train.run import train
from stretto.train.stages import sequence_cut
from stretto.train.step import evaluate
from stretto.train.text import counted
from stretto.world import AsyncTensor, Axis, Done, World

pytestmark = pytest.mark.gloo

SEEDS: Final = st.integers(0, 2**32)
LATE: Final = {"budget_holds_activations", "freeze_names_parameters", "groups_hold_parameters"}
"""What only the model itself can say, which is said before the first step."""

TOLERANCE: Final = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.05}
NORMS: Final = 30.0
"""Times as far may gradient norms be apart: they are sums of squares, of gradients that may nearly cancel."""

Told = dict[tuple[int, str], float]


@pytest.fixture
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that pretends announces nothing, sends no rows, and passes on what it was passed."""

    def no_rows(out: torch.Tensor, *_: object, **__: object) -> Done:
        out.zero_()
        return Done()

    def only_own(x: torch.Tensor, axis: Axis) -> AsyncTensor:
        told = x.new_zeros(axis.size, *x.shape)
        told[axis.rank] = x
        return AsyncTensor(told)

    def same(x: torch.Tensor, _: object) -> AsyncTensor:
        return AsyncTensor(x.detach().clone())

    monkeypatch.setattr(Link, "expect", lambda *_: None)
    monkeypatch.setattr("torch.distributed.all_to_all_single", no_rows)
    monkeypatch.setattr("stretto.experts.plan.all_gather_async", only_own)
    monkeypatch.setattr("stretto.context_parallel.exchange.shift_async", same)


@effort(
    max_examples=effort.default.max_examples // 2,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(seed=SEEDS)
@pytest.mark.usefixtures("_nobody_answers")
def test_any_rank_of_any_settings_takes_a_step(seed: int) -> None:
    said, run = any_run(seed, most_ranks=64)
    note(f"{_drawn(said)}")
    rank = random.Random(seed).randrange(run.layout.world)
    with ParallelState.inspect(run.layout, rank, axes=axes_of(run.args, run.layout)) as state:
        try:
            built = build(run.args, state)
        except ConfigError as error:
            if {v.rule for v in error.violations} <= LATE:
                return
            raise
        batches = counted(list(_rows(run, state)), state, sequence_cut(run.args, state))
        built.stepper.step(batches, run.args.optimizer.lr)
        built.stepper.settle()
        evaluate(built.evaluator, batches, state)
        built.weights.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Where a small corpus lies, and its tokens."""
    root, draw = tmp_path_factory.mktemp("any") / "songbook", random.Random(0)
    root.mkdir()
    words = ["over", "the", "hills", "and", "far", "away", "a", "piper's", "son", "né"]
    for n in range(60):
        (root / f"{n:02d}.txt").write_text(" ".join(draw.choices(words, k=draw.randint(3, 60))) + "\n")
    return {"data.data": str(root), "data.cache": str(tmp_path_factory.mktemp("cache"))}


@pytest.mark.nightly
@effort(
    max_examples=max(5, effort.default.max_examples // 8),
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(seed=SEEDS)
def test_any_settings_train_stop_and_go_on_as_one_process(
    pool: Pool, text: Settings, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    out = tmp_path_factory.mktemp(f"seed{seed}")
    said, run = any_run(seed, most_ranks=4)
    then = elsewhere(said, random.Random(seed))
    note(f"{_drawn(said)}\n  then {_drawn(then)}")
    alone, first, second = (
        run_of({**each, **text, "checkpoint.out": str(out / where)})
        for each, where in ((reference(said), "alone"), (said, "split"), (then, "split"))
    )
    try:
        expected = pool.run(1, told_of, alone)[0]
        before = pool.run(run.layout.world, told_of, first, 2)[0]
        found = before | pool.run(second.layout.world, told_of, second, None, True)[0]
    except ConfigError as error:
        if {v.rule for v in error.violations} <= LATE:
            return
        raise
    assert found.keys() == expected.keys()
    limit = max(TOLERANCE[run.args.run.dtype], 0.02 if run.args.optimizer.moments == "bf16" else 0.0)
    apart = {key: abs(found[key] / expected[key] - 1) for key in expected if found[key] != expected[key]}
    assert {key: x for key, x in apart.items() if not x <= limit * (NORMS if key[1] == "norm" else 1)} == {}


def told_of(world: World, run: Resolved, stop_after: int | None = None, resume: bool = False) -> Told:
    """What a run tells on rank 0, to its end or until it is stopped; on from the newest checkpoint in its directory."""
    text, told, asked = Text.open(run.args), _Told(), iter(range(1, 100))
    found = latest_complete(Path(run.args.checkpoint.out) / "checkpoints").path if resume else None
    train(
        run.with_vocabulary(text.tokenizer.vocab_size),
        world,
        text,
        lambda *_: told,
        resume=found,
        stop=lambda: next(asked) == stop_after,
        timeline=StartTimeline(),
    )
    return told.told


class _Told(Listener):
    def __init__(self) -> None:
        self.told: Told = {}

    def step(self, record: StepRecord) -> None:
        self.told |= {(record.step, "loss"): record.loss, (record.step, "norm"): record.grad_norm}

    def evaluated(self, record: EvalRecord) -> None:
        self.told[record.step, record.name] = record.loss


LAYOUT: Final = ("tensor", "context", "pipeline", "shards", "memory")
"""Groups of settings that change no model, but for the packing of rows."""


def reference(said: Settings) -> Settings:
    """The same model and data on one process, with nothing that only saves time or memory."""
    dropped = (
        "parallel.",
        "groups.",
        "run.recompute",
        "run.activation",
        "run.ffn",
        "run.check",
        "run.on_",
        "optimizer.masters",
    )
    dropped = (*dropped, "optimizer.post_validate", "optimizer.optimizer_cpu_offload")
    kept = {path: value for path, value in said.items() if not path.startswith(dropped)}
    return {**kept, "batch.micro_batch": 1, "run.nproc": 1}


def elsewhere(said: Settings, rng: random.Random) -> Settings:
    """The same run in another layout, or on one process where none of a few that are drawn is accepted as it is."""
    alone = reference(said)
    for _ in range(20):
        drawn = {
            path: rng.choice(values)
            for name in rng.sample(LAYOUT, 3)
            for path, values in TOGETHER[name].items()
            if path != "data.packing" and rng.random() < 0.5
        }
        other = mended({path: v for path, v in {**alone, **drawn}.items() if path != "run.nproc"}, rng)
        if other is None or run_of(other).layout.world > 4:
            continue
        free = ("parallel.", "batch.micro_batch", "run.", "optimizer.optimizer_cpu_offload")
        if all(other.get(p) == alone.get(p) for p in {*other, *alone} if not p.startswith(free)):
            return other
    return alone


def _drawn(said: Settings) -> Settings:
    return {path: value for path, value in said.items() if value != BASE.get(path)}


def _rows(run: Resolved, state: ParallelState) -> Iterator[Batch]:
    """This rank's share of a global batch of random tokens, in documents where rows are packed."""
    batch, dp = run.args.batch, state.axis("dp")
    shape = (batch.micro_batch, batch.seq_len)
    for _ in rows_of(batch.global_batch, dp.rank, dp.size, batch.micro_batch):
        tokens, labels = torch.randint(run.args.model.vocab_size, (2, *shape))
        begins = (torch.rand(shape) < 0.2) | (torch.arange(batch.seq_len) == 0)
        starts = torch.where(begins, torch.arange(batch.seq_len), 0).cummax(1).values if run.args.data.packing else None
        yield Batch(tokens, labels, torch.ones(shape, dtype=torch.bool), torch.arange(batch.micro_batch), starts)
