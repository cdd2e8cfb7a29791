"""The training loop: feed, step, report, evaluate, save, and stop when all agree to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stretto.arguments.schema import Arguments
from stretto.batch import Batch
from stretto.collectives import all_reduce
from stretto.data.baselines import bits_per_byte
from stretto.data.evaluation import held_out_batches
from stretto.data.text import EvalSet
from stretto.initialize.timeline import StartTimeline
from stretto.models import Microbatch
from stretto.parallel_state import ParallelState
from stretto.train.build import Built
from stretto.train.checkpointing import TrainState
from stretto.train.learning_rate import learning_rate
from stretto.train.readback import Readback
from stretto.train.record import EvalRecord, Listener, StepRecord
from stretto.train.step import StepResult, evaluate


class DivergedError(RuntimeError):
    """The loss or the gradient norm is no number any more; raised on all ranks, since both are sums over them."""

    def __init__(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        super().__init__(f"diverged at step {step}: loss {loss:g}, gradient norm {grad_norm:g}, learning rate {lr:g}")
        self.step, self.loss, self.grad_norm, self.lr = step, loss, grad_norm, lr

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int, float, float, float]]:
        return DivergedError, (self.step, self.loss, self.grad_norm, self.lr)


@dataclass(frozen=True)
class Pending:
    """A step whose numbers are not read yet."""

    step: int
    lr: float
    tokens: int
    """Seen with this step, over all ranks."""
    result: StepResult
    figures: Readback
    """Loss, gradient norm, votes to stop."""
    done_at: float
    data_seconds: float


@dataclass
class Loop:
    """A run under way on this rank. `stop` is asked before each step; one rank's yes ends the run on all.

    A checkpoint is the point after its save: what comes next of the same step, evaluation, is done by whoever goes on
    from it. So a run that was stopped, or killed, and resumed does and reports exactly what an uninterrupted one does.
    """

    args: Arguments
    state: ParallelState
    built: Built
    train_state: TrainState
    eval_sets: Sequence[EvalSet]
    listener: Listener
    save: Callable[[], Path]
    stop: Callable[[], bool]
    timeline: StartTimeline = field(default_factory=StartTimeline)
    """Gets the phase "first step", which ends when the device is done with it."""
    _clock: float = field(default_factory=time.perf_counter)
    _pending: Pending | None = None
    _first: bool = True
    _stopped: bool = False

    def run(self) -> bool:
        """Train to `run.steps`; False if it was stopped before. A checkpoint of the last step is there either way."""
        if self.train_state.step and self._due(self.args.run.eval_every):
            with self.timeline.phase("evaluation"):
                self.evaluate()
        while self.train_state.step < self.args.run.steps and not self._stopped:
            self.advance()
        return not self._stopped

    def advance(self) -> StepResult:
        """One update, the report of the one before, and what is due after it."""
        pending = self._first_step() if self._first else self._step()
        # The step before is read only now: its figures arrived long ago, and the device has this step to work on.
        # Votes are therefore heard one step late, on every rank at the same step.
        if self._pending is not None:
            self._stopped = self._report(self._pending)
        self._pending = pending
        saving = self._due(self.args.checkpoint.save_every)
        if self._first or saving or self._stopped or self._due(self.args.run.eval_every):
            self._first, self._pending = False, None
            self._stopped = self._report(pending) or self._stopped
            if saving or self._stopped:
                self.listener.saved(pending.step, self.save())
            if not self._stopped:
                self._evaluate_when_due()
            self._clock = time.perf_counter()  # what was not training does not count as it
        return pending.result

    def _first_step(self) -> Pending:
        """The step that ends the start. It alone is waited for: how long it took is then known, and told at once."""
        with self.timeline.phase("first step"):
            pending = self._step()
            pending.figures.read()
        return pending

    def _step(self) -> Pending:
        """Launch one update; its figures are on their way."""
        step = self.train_state.step + 1
        self.timeline.current = f"in step {step}"
        lr = learning_rate(step, self.args.optimizer)
        since = time.perf_counter()
        batch = self._next_batch()
        data_seconds = time.perf_counter() - since
        result = self.built.trainer.step(batch, lr, stop=self.stop())
        figures = Readback(result.loss, result.grad_norm, result.votes)
        self.train_state.step = step
        tokens = self.train_state.feed.consumed * self.args.batch.seq_len
        return Pending(step, lr, tokens, result, figures, time.perf_counter(), data_seconds)

    def _due(self, every: int) -> bool:
        """Whether something that is done `every` so many steps, and after the last, is to be done now."""
        step = self.train_state.step
        return step == self.args.run.steps or (every > 0 and step % every == 0)

    def _evaluate_when_due(self) -> None:
        if self._due(self.args.run.eval_every):
            self.evaluate()

    def evaluate(self) -> None:
        """Mean loss over batches of each validation set, every token weighing the same."""
        for each in self.eval_sets:
            self._evaluate(each)

    def _evaluate(self, text: EvalSet) -> None:
        batch = self.args.batch
        total = count = torch.zeros((), dtype=torch.float64, device=self.state.world.device)
        for rows in held_out_batches(
            text.store,
            seq_len=batch.seq_len,
            global_batch=batch.global_batch,
            dp_rank=self.state.axis("dp").rank,
            dp_size=self.state.axis("dp").size,
            micro_batch=batch.micro_batch,
            limit=self.args.run.eval_batches or None,
        ):
            microbatches = self._microbatches(rows)
            tokens = microbatches[0].count
            total = total + evaluate(self.built.evaluator, microbatches, self.state) * tokens
            count = count + tokens
        summed, tokens_seen = Readback(total, count).read()
        if tokens_seen:
            loss = summed / tokens_seen
            bits = bits_per_byte(loss, text.store.bytes_per_token, text.lost)
            self.listener.evaluated(EvalRecord(self.train_state.step, loss, bits, text.name))

    def _report(self, pending: Pending) -> bool:
        """Tell of a step; whether some rank asked to stop. Raises DivergedError, on all ranks alike."""
        loss, norm, votes = pending.figures.read()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise DivergedError(pending.step, loss, norm, pending.lr)
        rate = self.args.batch.global_batch * self.args.batch.seq_len / (pending.done_at - self._clock)
        self._clock = pending.done_at
        record = StepRecord(pending.step, loss, norm, pending.lr, pending.tokens, rate, pending.data_seconds)
        self.listener.stepped(record)
        return bool(votes > 0)

    def _next_batch(self) -> list[Microbatch]:
        dp, batch = self.state.axis("dp"), self.args.batch
        return self._microbatches(self.train_state.feed.batch(batch.global_batch, dp.rank, dp.size, batch.micro_batch))

    def _microbatches(self, rows: Sequence[Batch]) -> list[Microbatch]:
        """The batches on the device, each with the number of valid tokens in the whole global batch."""
        batches = [batch.to(self.state.world.device) for batch in rows]
        count = valid_tokens(batches, self.state)
        return [Microbatch(batch, count) for batch in batches]


def valid_tokens(batches: Sequence[Batch], state: ParallelState) -> Tensor:
    """[]: tokens of the global batch that count, in fp64 (exact to 2^53); at least 1: nothing divides by 0."""
    own = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().double()
    return all_reduce(own, state.axis("dp", "cp")).clamp(min=1)
