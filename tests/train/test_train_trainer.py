"""The public `Trainer`: any module, over any layout, equals one process; it resumes, evaluates, and says what is wrong.

Each test names the fault that it catches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stretto
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.train.batches import Cut, RowBatches
from stretto.train.record import EvalRecord, Listener, RunRecord, SaveRecord, StepRecord
from stretto.world import World

pytestmark = pytest.mark.gloo

ROWS, WIDTH = 12, 6
SAID: dict[str, Any] = {"global_batch": ROWS, "dtype": torch.float64, "lr": 1e-2}


class Heard(Listener):
    """What was told, in order."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.order: list[str] = []

    def started(self, run: RunRecord) -> None:
        self.order.append(f"started {run.after}/{run.steps}")

    def stepped(self, record: StepRecord) -> None:
        self.steps.append(record)

    def evaluated(self, record: EvalRecord) -> None:
        self.evaluations.append(record)

    def saving(self, step: int) -> None:
        self.order.append(f"saving {step}")

    def saved(self, record: SaveRecord) -> None:
        self.order.append(f"saved {record.step} {record.path.is_dir()} {record.seconds >= 0}")

    def close(self) -> None:
        self.order.append("close")


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))


def dropping() -> nn.Module:
    """Its second block is computed once more in the backward."""
    return stretto.replace_dropout(nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.3), Again()), seed=5)


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.out(self.drop(x).tanh()), x, use_reentrant=False)


def batch(n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return x, x.roll(1, 1).sin()


def masked(n: int) -> dict[str, Tensor]:
    """Rows of which ever fewer positions count."""
    x, y = batch(n)
    keep = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(n)) > torch.linspace(0, 1, ROWS)[:, None]
    return {"x": x, "y": y, "keep": keep}


class Masked(nn.Module):
    """Returns its own loss: the mean over what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor | None, share: Any) -> Tensor:
        assert x is None
        rows = share.rows
        errors = (self.net(rows["x"]) - rows["y"]).square() * rows["keep"]
        return errors.sum() / rows["keep"].sum().clamp(min=1) * share.share


def trained(world: World, layout: Layout, kind: str, micro: int, **more: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of six steps; the ranks start from different values, of which the first's count."""
    torch.manual_seed(world.rank)
    with ParallelState.build(layout, world) as state:
        heard = Heard()
        some: dict[str, Any] = {"data": batch, "loss": F.mse_loss}
        if kind == "masked":
            some = {"data": masked, "weight": lambda rows: rows["keep"].sum()}
        model = Masked() if kind == "masked" else dropping() if kind == "dropout" else plain()
        with stretto.Trainer(model, state, micro_batch=micro, **some, **SAID, **more) as trainer:
            trainer.fit(6, [heard], stop=bool)
        return [(record.loss, record.grad_norm) for record in heard.steps]


def trained_in_turns(world: World, kind: str) -> list[tuple[float, float]]:
    return trained(world, Layout.of(dp=2), kind, 2, schedule="gpipe")


@pytest.mark.parametrize("kind", ["mean", "masked", "dropout"])
def test_a_plain_module_over_replicas_equals_one_process(pool: Pool, kind: str) -> None:
    """Catches: means of means, microbatches that count alike, replicas that start from values of their own, masks that
    follow the place in a microbatch or that are one in each step."""
    whole = pool.run(1, trained, Layout.of(), kind, ROWS)[0]
    cut = pool.run(3, trained, Layout.of(dp=3), kind, 2)
    assert len({loss for loss, _ in whole}) == 6
    assert cut[0] == [pytest.approx(step, rel=1e-12) for step in whole]
    assert cut[1] == [], "rank 0 alone is told"
    if kind == "dropout":  # all forwards before the first backward, which computes the last block once more
        cut = pool.run(2, trained_in_turns, kind)
        assert cut[0] == [pytest.approx(step, rel=1e-12) for step in whole]
    same = pool.run(3, trained, Layout.of(cp=3), kind, 2)  # the ranks of cp are all given the same rows
    assert same[0] == [pytest.approx(step, rel=1e-12) for step in whole]


def test_the_loss_of_the_first_step_is_torchs_own() -> None:
    """Catches: a share that is wrong in every layout alike."""
    torch.manual_seed(0)
    model = plain().double()
    x, y = batch(0)
    expected = F.mse_loss(model(x), y)
    grads = torch.autograd.grad(expected, list(model.parameters()))
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    loss, measured = trained(World.single(), Layout.of(), "mean", 4)[0]
    assert (loss, measured) == (pytest.approx(expected.item(), rel=1e-12), pytest.approx(norm.item(), rel=1e-12))


def alone(out: Path, steps: int, data: Any, *, resume: bool = False, **more: Any) -> tuple[Heard, stretto.Outcome]:
    torch.manual_seed(0)
    with ParallelState.build(Layout.of(), World.single()) as state:
        heard = Heard()
        files = {"out": out, "save_every": 4, "resume": resume}
        with stretto.Trainer(plain(), state, data=data, loss=F.mse_loss, **files, **SAID, **more) as trainer:
            return heard, trainer.fit(steps, [heard], stop=bool)


def test_rows_have_their_numbers_in_the_run() -> None:
    """Catches: numbers that begin anew with each global batch, so that every step drops the same."""
    with ParallelState.inspect(Layout.of(dp=2), 1) as state:
        batches = RowBatches(batch, Cut(state, ROWS, 3))
        told = [[share.numbers for share in batches.ready(batches.next())] for _ in range(2)]
    assert told == [[range(3, 6), range(9, 12)], [range(15, 18), range(21, 24)]]


@pytest.mark.parametrize("said", ["Trainer", "shard"])
def test_dropout_of_each_process_is_told_in_a_line(said: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the way out. Catches: a line for what is layout-independent already, or that drops nothing."""
    unlike = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.MultiheadAttention(4, 2, dropout=0.1), nn.Dropout(0))
    alike = stretto.replace_dropout(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)))
    for model, lines in ((unlike, 1), (alike, 0)):
        caplog.clear()
        with ParallelState.build(Layout.of(), World.single()) as state:
            if said == "shard":
                stretto.shard(model, state).close()
            else:
                stretto.Trainer(model, state, data=batch, loss=F.mse_loss, **SAID).close()
        found = [each.message for each in caplog.records if "dropout of" in each.message]
        assert len(found) == lines
        assert all(
            "dropout of 1, 2 draws from each process's own" in line and "replace_dropout" in line for line in found
        )


class Rotary(nn.Module):
    """As of `transformers`: wavelengths in fp32, also beside parameters in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)
        self.register_buffer("inv_freq", 1 / 10_000 ** (torch.arange(8) / 8), persistent=False)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x.to(self.linear.weight.dtype) * self.scale))


def test_wavelengths_stay_exact_and_what_is_rounded_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Catches: angles of rotary embeddings that bf16 turns by whole turns; fp64 that is lost without a word."""
    said = {"data": batch, "loss": F.mse_loss, "global_batch": ROWS}
    with stretto.ParallelState.build(stretto.Layout.of(), World.single()) as state:
        model = Rotary()
        before = model.inv_freq.clone()
        stretto.Trainer(model, state, dtype=torch.bfloat16, **said)
        assert (model.inv_freq.dtype, model.scale.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(model.inv_freq, before)
        assert not caplog.records, "as it was asked for"
        stretto.Trainer(Rotary().double(), state, **said)
        assert caplog.records[-1].getMessage().startswith("parameters in float64 are rounded to float32")


def test_nothing_drops_in_an_evaluation() -> None:
    """Neither torch's dropout nor ours, and what was in training mode is so again; ours says who has to number rows."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))
    model[0].eval()
    heard, twice = Heard(), {"evaluation": [batch(0), batch(0)], "eval_every": 1}
    with (
        ParallelState.build(Layout.of(), World.single()) as state,
        stretto.Trainer(model, state, data=batch, loss=F.mse_loss, **twice, **SAID) as trainer,
    ):
        trainer.fit(1, [heard], stop=bool)
        assert (model.training, model[0].training, model[1].training) == (True, False, True)
        model.eval()
        assert heard.evaluations[0].loss == pytest.approx(F.mse_loss(model(batch(0)[0]), batch(0)[1]).item())
    with pytest.raises(ValueError, match=r"call sharded.number\(rows\) before each forward"):
        stretto.Dropout(0.5, "drop")(torch.ones(2, 3))


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an evaluation without end": ({"evaluation": batch}, TypeError, "which does not say where it ends"),
    "an evaluation that is read once": ({"evaluation": iter([batch(0)])}, ValueError, "which can be read once"),
    "a number in place of a loss": ({"loss": lambda *pair: F.mse_loss(*pair).item()}, TypeError, "the loss is a float"),
    "a rate in quotes": ({"lr": "1e-3"}, TypeError, "lr='1e-3': give a number"),
    "torch's optimizer": ({"optimizer": torch.optim.AdamW}, TypeError, r"such as stretto.AdamW\(\)"),
    "no loss": ({"loss": lambda *_: None}, TypeError, "the loss is a NoneType"),
    "a loss for each row": (
        {"loss": lambda y, _: y.mean(1)},
        ValueError,
        "a mean over its rows, not a tensor of shape",
    ),
    "a loss that is left out": ({"loss": None}, TypeError, "give Trainer a loss"),
    "a rate below 0": ({"lr": -1e-3}, ValueError, "lr=-0.001: a learning rate is 0 or more"),
    "no data": ({"data": []}, ValueError, "the data has no batch at all"),
    "a last batch that is smaller": ({"data": [batch(0)[0][:5]]}, ValueError, "drop_last=True"),
}


def _summed_twice(world: World) -> None:
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        wrapped = nn.parallel.DistributedDataParallel(plain())
        with pytest.raises(ValueError, match=r"is a DistributedDataParallel, .* hand over its \.module"):
            stretto.shard(wrapped, state)
        with pytest.raises(ValueError, match="is a DistributedDataParallel"):
            stretto.Trainer(wrapped, state, data=batch, loss=F.mse_loss, **SAID)


def test_a_module_that_sums_gradients_by_itself_is_rejected(pool: Pool) -> None:
    """Catches: gradients that cross the ranks twice, by two engines."""
    pool.run(2, _summed_twice)


def _shuffled(world: World) -> str:
    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        trainer = stretto.Trainer(plain(), state, data=lambda n: batch(n + world.rank), loss=F.mse_loss, **SAID)
        with pytest.raises(ValueError, match="the ranks read different global batches") as raised:
            trainer.fit(1, stop=bool)
    return str(raised.value)


def test_ranks_that_shuffle_each_for_themselves_are_told(pool: Pool) -> None:
    """Catches: rows that are of no one's global batch, and gradients that no one asked for."""
    assert all("the same seed on all of them" in said for said in pool.run(2, _shuffled))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    """Catches: an evaluation that is left out from the second on; errors that speak of what is inside the trainer."""
    said, error, words = MISTAKES[mistake]
    with ParallelState.build(Layout.of(), World.single()) as state, pytest.raises(error, match=words):
        stretto.Trainer(plain(), state, **{"data": batch, "loss": F.mse_loss, **SAID, **said}).fit(1, stop=bool)


@pytest.mark.parametrize("way", ["Trainer", "shard"])
def test_a_parameter_that_comes_late_is_an_error(way: str) -> None:
    """Catches: a layer that never learns, since it was added after the module was handed over."""
    model, (x, y) = nn.Sequential(nn.Linear(WIDTH, WIDTH)).double(), batch(0)
    with ParallelState.build(Layout.of(), World.single()) as state:
        if way == "Trainer":
            trainer = stretto.Trainer(model, state, data=batch, loss=F.mse_loss, **SAID)
            model.append(nn.Linear(WIDTH, WIDTH).double())
            with pytest.raises(RuntimeError, match=r"1\.weight, 1\.bias came into the module after"):
                trainer.fit(1, stop=bool)
        else:
            sharded = stretto.shard(model, state)
            model.append(nn.Linear(WIDTH, WIDTH).double())
            optimizer = sharded.optimizer(stretto.AdamW())
            F.mse_loss(model(x), y).backward()
            with pytest.raises(RuntimeError, match=r"1\.weight, 1\.bias came into the module after"):
                optimizer.step(1e-3)


class Endless:
    """An iterator that can say where it is, as a stateful loader does."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.at += 1
            yield batch(self.at - 1)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


SOURCES = {
    "function": lambda: batch,
    "list": lambda: [batch(n) for n in range(3)],
    "iterator": lambda: (batch(n) for n in range(99)),
    "stateful": Endless,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    """Catches: data that begins anew, moments that do, metrics that are there twice, an evaluation that is left out."""
    source, held = SOURCES[kind], [batch(77), batch(78)]
    more: dict[str, Any] = {"evaluation": held, "eval_every": 4}
    whole, _ = alone(tmp_path / "whole", 10, source(), **more)
    alone(tmp_path / "cut", 6, source(), **more)
    for name in ("step-00000006",):  # as if it had been killed after the save of step 4
        for file in sorted((tmp_path / "cut" / "checkpoints" / name).iterdir()):
            file.unlink()
    again, outcome = alone(tmp_path / "cut", 10, source(), resume=True, **more)
    assert (outcome.finished, outcome.step) == (True, 10)
    assert [(r.step, r.loss, r.epoch) for r in again.steps] == [(r.step, r.loss, r.epoch) for r in whole.steps[4:]]
    assert again.order[:2] == ["started 4/10", "saving 8"]
    assert again.order[-2:] == ["saved 10 True True", "close"]
    kept = ("step", "loss", "tokens", "held_out_loss")
    rows = [
        [
            {k: row[k] for k in kept if k in row}
            for row in map(json.loads, path.read_text().splitlines())
            if "checkpoint_bytes" not in row
        ]
        for path in (tmp_path / "cut" / "metrics.jsonl", tmp_path / "whole" / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]


def test_an_evaluation_is_the_mean_over_all_rows(tmp_path: Path) -> None:
    """Catches: an evaluation of training rows, or of the last batch alone."""
    held = [batch(77), batch(78)]
    heard, outcome = alone(tmp_path, 1, batch, evaluation=held)
    torch.manual_seed(0)
    model = plain().double()
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in model.parameters()],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    F.mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    expected = sum(F.mse_loss(model(x), y).item() for x, y in held) / 2
    assert heard.evaluations[0].loss == pytest.approx(expected, rel=1e-9)
    assert outcome.evaluation_seconds > 0


def test_a_stop_saves_and_leaves(tmp_path: Path) -> None:
    """Catches: a run that is told to stop and saves nothing, or goes on."""
    torch.manual_seed(0)
    with ParallelState.build(Layout.of(), World.single()) as state:
        trainer = stretto.Trainer(plain(), state, data=batch, loss=F.mse_loss, out=tmp_path, **SAID)
        outcome = trainer.fit(50, stop=lambda: trainer.step >= 3)
    assert not outcome.finished
    assert 4 <= outcome.step <= 5
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{outcome.step:08d}"]


def slow_second_rank(world: World) -> list[tuple[Any, Any]]:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.03 * world.rank)
            y: Tensor = self.net(x)
            return y

    with ParallelState.build(Layout.of(dp=world.size), world) as state:
        heard = Heard()
        with stretto.Trainer(Slow(), state, data=batch, loss=F.mse_loss, log_every=5, **SAID) as trainer:
            trainer.fit(20, [heard], stop=bool)
    return [(record.slowest_rank, record.slowest_over_fastest) for record in heard.steps]


def test_the_slowest_rank_is_named_within_twenty_steps(pool: Pool) -> None:
    """Catches: times that hold the wait for others, which are the same on all ranks."""
    told = pool.run(2, slow_second_rank)[0]
    assert told[-1][0] == 1
    assert told[-1][1] > 3


WRONG = {
    "a module is one stage, but the layout has pp=2": {"layout": Layout.of(pp=2)},
    "say what they pass on for one microbatch": {"layout": Layout.of(pp=2), "model": lambda _: plain()},
    r"a tensor \[12, 6\] in a batch, but global_batch=8": {"global_batch": 8},
    r"global_batch=12 is not a multiple of micro_batch\*dp = 5\*1": {"micro_batch": 5},
    "0 is a BatchNorm1d": {"model": nn.Sequential(nn.BatchNorm1d(WIDTH))},
    "the data ended after 2 global batches": {"data": (batch(n) for n in range(2))},
    "there is no directory to look in": {"resume": True},
    "sharding='zero9': take one of none, zero1": {"sharding": "zero9"},
    "on_nonfinite='ignore': take one of stop": {"on_nonfinite": "ignore"},
    "micro_batch=-1: both must be at least 1": {"micro_batch": -1},
    "parameters without a declared place: 0.weight": {"layout": Layout.of(tp=2)},
    "no parameter of the model has requires_grad=True": {"model": plain().requires_grad_(False)},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_trained_is_an_error_with_the_numbers(message: str) -> None:
    said: dict[str, Any] = {"model": plain(), "data": batch, "loss": F.mse_loss, **SAID, **WRONG[message]}
    layout, model = said.pop("layout", Layout.of()), said.pop("model")
    with ParallelState.inspect(layout, 0) as state, pytest.raises(ValueError, match=message):
        stretto.Trainer(model, state, **said).fit(3, stop=bool)


def test_stages_whose_parameters_have_one_name_are_rejected_at_the_start(pool: Pool) -> None:
    """Not at the first save, which could not hold both."""
    for said in pool.run(2, alike):
        assert "several stages have a parameter weight, bias: name layers by their numbers" in said


def alike(world: World) -> str:
    said: dict[str, Any] = {"data": batch, "loss": F.mse_loss, "boundary": (2, WIDTH), "micro_batch": 2, **SAID}
    with ParallelState.build(Layout.of(pp=2), world) as state, pytest.raises(ValueError, match="several") as found:
        stretto.Trainer(lambda _: nn.Linear(WIDTH, WIDTH), state, **said)
    return str(found.value)
