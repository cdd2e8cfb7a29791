"""The training loop: feed, step, report, evaluate, save, and stop when all agree to."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import torch

from stretto.checkpoint import Saved
from stretto.initialize.stop import warning_kept_from_children
from stretto.initialize.timeline import StartTimeline
from stretto.parallel_state import ParallelState
from stretto.train.assemble import Assembly
from stretto.train.batches import Evaluation
from stretto.train.checkpointing import TrainState
from stretto.train.meter import Meter
from stretto.train.not_finite import not_finite
from stretto.train.readback import LateReadback, Readback
from stretto.train.record import EvalRecord, Listener, SaveRecord, StepRecord
from stretto.train.routing import RoutingReadback
from stretto.train.saves import Saves
from stretto.train.slow_ranks import SlowRanks
from stretto.train.sound import require_equal_replicas, require_finite
from stretto.train.step import StepResult, evaluate

SKIPPED_IN_A_ROW: Final = 10
"""Updates that are skipped one after another; one more ends the run."""


class DivergedError(RuntimeError):
    """The loss or the gradient norm is no number any more; raised on all ranks, since both are sums over them."""

    def __init__(self, step: int, loss: float, grad_norm: float, lr: float, where: str = "") -> None:
        said = f"diverged at step {step}: loss {loss:g}, gradient norm {grad_norm:g}, learning rate {lr:g}"
        super().__init__(f"{said}; {where}" if where else said)
        self.step, self.loss, self.grad_norm, self.lr, self.where = step, loss, grad_norm, lr, where

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int, float, float, float, str]]:
        return DivergedError, (self.step, self.loss, self.grad_norm, self.lr, self.where)


@dataclass(frozen=True)
class Pace:
    """How long a run is, and what is due when: every so many steps, and after the last. 0: after the last alone."""

    steps: int
    rate: Callable[[int], float]
    """The learning rate of an update, counted from 1."""
    save_every: int = 0
    eval_every: int = 0
    log_every: int = 1


@dataclass(frozen=True)
class Pending:
    """A step whose numbers are not read yet."""

    step: int
    lr: float
    tokens: int
    """Seen with this step, over all ranks."""
    epoch: float | None
    result: StepResult
    figures: Readback
    """Loss, gradient norm, votes to stop; what the ranks measured."""
    launched: float
    """When, by the clock of the meter: on a device that works at once, or that is never behind, the step was done."""
    data: float = 0.0
    """Seconds that its rows were waited for."""
    routing: RoutingReadback | None = None


@dataclass
class Loop:
    """A run under way on this rank. `stop` is asked before each step; one rank's yes ends the run on all.

    A checkpoint is the point after its save: what comes next of the same step, evaluation, is done by whoever goes on
    from it. So a run that was stopped, or killed, and resumed does and reports exactly what an uninterrupted one does.
    """

    assembly: Assembly[Any]
    train_state: TrainState
    pace: Pace
    meter: Meter
    listener: Listener
    saves: Saves | None = None
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    """By the name of the validation set."""
    stop: Callable[[], bool] = bool
    before_step: Callable[[int], object] = bool
    """Told of each step before it is launched."""
    timeline: StartTimeline = field(default_factory=StartTimeline)
    """Gets the phase "first step", which ends when the device is done with it."""
    check_replicas: int = 0
    """Compare replicas after every so many steps; 0: never."""
    slow_ranks: SlowRanks | None = None
    """Names a rank that the others wait for."""
    _pending: Pending | None = None
    _first: bool = True
    _stopped: bool = False
    _skipped: int = 0
    _in_a_row: int = 0

    @property
    def state(self) -> ParallelState:
        """The ranks."""
        return self.assembly.stepper.state

    def run(self) -> bool:
        """Train to the last step; False if it was stopped before. A checkpoint is there either way, if any is saved."""
        if self.train_state.step and self._due(self.pace.eval_every):
            with self.timeline.phase("evaluation"), warning_kept_from_children():
                self.evaluate()
        self.meter.resume()
        while self.train_state.step < self.pace.steps and not self._stopped:
            self.advance()
        if self.saves is not None:
            with self.meter.spent("checkpoint"):
                self._tell(self.saves.finish())
        return not self._stopped

    def advance(self) -> StepResult:
        """One update, the report of the one before, and what is due after it."""
        with self.slow_ranks.step() if self.slow_ranks else nullcontext():
            pending = self._first_step() if self._first else self._step()
        # The step before is read only now: its figures arrived long ago, and the device has this step to work on.
        # Votes are therefore heard one step late, on every rank at the same step.
        if self._pending is not None:
            self._stopped = self._report(self._pending)
        self._pending = pending
        if self.saves is not None:
            self._tell(self.saves.poll())
        saving = self._due(self.pace.save_every)
        checking = self.check_replicas > 0 and pending.step % self.check_replicas == 0
        if self._first or saving or checking or self._stopped or self._due(self.pace.eval_every):
            first, self._first, self._pending = self._first, False, None
            self.assembly.stepper.settle()
            self._stopped = self._report(replace(pending, launched=self.meter.now())) or self._stopped
            if first:  # what compiles and allocates is in no mean with others
                self.meter.new_line()
            if checking:
                require_equal_replicas(self.assembly, self.state, pending.step)
            if saving or self._stopped:
                self._save(pending.step)
            if not self._stopped and self._due(self.pace.eval_every):
                self.evaluate()
            self.meter.resume()
        return pending.result

    def evaluate(self) -> None:
        """Mean loss over the batches of each validation set by their weights. Nothing where there are none."""
        for name, evaluation in self.evaluations.items():
            self._evaluate(name, evaluation)

    def _evaluate(self, name: str, evaluation: Evaluation) -> None:
        total = count = torch.zeros((), dtype=torch.float64, device=self.state.world.device)
        with self.meter.spent("evaluation"):
            for microbatches, weight in evaluation.batches():
                total = total + evaluate(self.assembly.evaluator, microbatches, self.state) * weight
                count = count + weight
            summed, weights = Readback(total, count).read()
        if weights:
            loss, seconds = summed / weights, self.meter.last("evaluation")
            bits = evaluation.bits_per_byte(loss)
            self.listener.evaluated(EvalRecord(self.train_state.step, loss, bits, seconds, name))

    def _save(self, step: int) -> None:
        if self.saves is None:
            return
        require_finite(self.assembly, self.state, step)
        self.listener.saving(step)
        with self.meter.spent("checkpoint"):
            self.saves.begin()
        self._tell(self.saves.poll())

    def _tell(self, saved: Iterable[Saved]) -> None:
        for each in saved:
            figures = (each.stall, each.waited, each.copied, each.written, each.nbytes)
            self.listener.saved(SaveRecord(each.step, each.path, each.seconds, *figures))

    def _first_step(self) -> Pending:
        """The step that ends the start. It alone is waited for: how long it took is then known, and told at once.

        What is compiled is compiled here, by processes that this one starts.
        """
        with self.timeline.phase("first step"), warning_kept_from_children():
            pending = self._step()
            self.assembly.stepper.settle()
            pending.figures.read()
        return pending

    def _step(self) -> Pending:
        """Launch one update; its figures are on their way."""
        step, batches = self.train_state.step + 1, self.train_state.batches
        self.timeline.current = f"in step {step}"
        self.before_step(step)
        if self.assembly.tuner is not None:
            self.assembly.tuner.begin(step)
        lr = self.pace.rate(step)
        with self.meter.spent("data"):
            rows = batches.next()
        result = self.assembly.stepper.step(batches.ready(rows), lr, stop=self._stopping())
        measured = self.meter.exchange() if self._ends_line(step) else ()
        read = Readback if self.assembly.stepper.proven else LateReadback
        figures = read(result.loss, result.grad_norm, result.votes, result.further, *measured)
        balance = self.assembly.balance
        routing = balance.routing if balance is not None and self._ends_line(step) else None
        routed = None if routing is None else RoutingReadback.of(routing)
        self.train_state.step = step
        seen, waited = (batches.tokens, batches.epoch), self.meter.last("data")
        return Pending(step, lr, *seen, result, figures, self.meter.now(), waited, routed)

    def _stopping(self) -> bool:
        """This rank's vote to end the run: also for a save that has failed, of which the others may not know."""
        return self.stop() or (self.saves is not None and self.saves.failed)

    def _due(self, every: int) -> bool:
        """Whether something that is done `every` so many steps, and after the last, is to be done now."""
        step = self.train_state.step
        return step == self.pace.steps or (every > 0 and step % every == 0)

    def _ends_line(self, step: int) -> bool:
        return step % self.pace.log_every == 0 or step == self.pace.steps

    def _report(self, pending: Pending) -> bool:
        """Tell of a step; whether some rank asked to stop. Raises DivergedError, on all ranks alike."""
        loss, norm, votes, *others = pending.figures.read()
        depth = pending.result.further.shape[1]
        sums, shares, measured = others[:depth], others[depth : 2 * depth], others[2 * depth :]
        # A step that is skipped has taken its time, too.
        self.meter.stepped(pending.launched, ago=pending.figures.ago, data=pending.data)
        self.meter.heard(measured)
        if not math.isfinite(loss) or not math.isfinite(norm):
            where = not_finite(pending.result, self.state.axis("tp", "cp", "dp", "pp"))
            diverged = DivergedError(pending.step, loss, norm, pending.lr, where)
            self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
            if not pending.result.skipped or self._in_a_row > SKIPPED_IN_A_ROW:
                raise diverged
            if self.state.world.rank == 0:
                logging.getLogger(__name__).warning("%s: the update is skipped, %d so far", diverged, self._skipped)
            return bool(votes > 0)
        self._in_a_row = 0
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        told: dict[str, Any] = {"epoch": pending.epoch, "time": now, **self.meter.figures()}
        # Of a global batch without such a token nothing is known.
        told["mtp_losses"] = tuple(x / of for x, of in zip(sums, shares, strict=True)) if sums and all(shares) else None
        told["skipped_steps"] = self._skipped or None
        if pending.routing is not None:
            routed = pending.routing.record(pending.step)
            told |= routed.figures()
            self.listener.routed(routed)
        self.listener.stepped(StepRecord(pending.step, loss, norm, pending.lr, pending.tokens, **told))
        if self._ends_line(pending.step):
            self.meter.new_line()
        return bool(votes > 0)
