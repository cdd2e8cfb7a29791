"""`Trainer`: any model over any layout, from its modules to the last checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from stretto.checkpoint import Found, latest_complete
from stretto.checkpoint.directory import Retention
from stretto.checkpoint.peers import Peers
from stretto.distributed import DataParallel, MainGradients
from stretto.initialize.stop import StopFlag
from stretto.initialize.timeline import StartTimeline
from stretto.parallel_state import ParallelState
from stretto.schedule import DDP, Sharding, schedule_for
from stretto.schedule.sharding import MODES
from stretto.tensor_parallel import Build
from stretto.train.assemble import Assembly, StageSpec, assemble
from stretto.train.batches import Batches, Cut, Evaluation, RowBatches, RowEvaluation, Source
from stretto.train.buffers import Buffers
from stretto.train.checkpointing import TrainState
from stretto.train.loop import DivergedError, Loop, Pace
from stretto.train.meter import Meter, Work
from stretto.train.metrics_file import JsonLines
from stretto.train.optimizers import AdamW
from stretto.train.own_model import Loss, StageCall, boundary_of, require_meant, require_trainable, stage_of
from stretto.train.record import HELD_OUT, Everyone, Listener, RunRecord
from stretto.train.saves import SavePolicy, Saves
from stretto.train.slow_ranks import SlowRanks
from stretto.train.sound import UnsoundError
from stretto.train.step import OnNonfinite, Optimizer


@dataclass(frozen=True)
class Outcome:
    """How a run ended that went on from step `after`."""

    finished: bool
    step: int
    seconds: float
    """Of the loop, evaluation and saving included."""
    checkpoint_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    after: int = 0


class Trainer:
    """Trains a model over the ranks of a parallel state; every rank makes one, with the same arguments.

        trainer = Trainer(model, state, data=batches, loss=F.mse_loss, global_batch=64, lr=1e-3)
        outcome = trainer.fit(1000)

    What it gives: gradient accumulation over microbatches, a pipeline schedule, gradients reduced and clipped in fp32,
    checkpoints that any layout can go on from, evaluation, an agreed end on signals, metrics.

    Args:
        model: a module, for one stage; or a function from a `StageSpec` to the module of that stage, whose layers may
            be parallel; or an `Assembly` that was made already. Parameters that nobody declared are replicated, where
            there is no tensor parallelism; with it they must be declared (`declare`, `replicate`).
        state: the layout and its process groups.
        data: global batches: an iterable, or a function from the number of batches before to the next one. A batch is a
            tree of tensors (tuples, lists, dictionaries), each with `global_batch` rows; a pair is inputs and
            targets. Every rank reads the same; each takes its rows. Or `Batches` of your own.
        loss: `loss(output, targets)`, a mean over the rows of a microbatch. None: the last stage's module returns a
            loss itself, and every stage is called as `module(x, share)` with a `Share`, by whose `share` it multiplies
            a mean.
        weight: of a microbatch, where not all weigh the same: from its rows to a number [] such as its valid tokens.
        global_batch: rows of an optimizer step, over all ranks.
        micro_batch: rows that a rank computes at a time; None: all of its rows at once.
        boundary: the shape of what stages pass on, for one microbatch; with a pipeline only.
        dtype: what the module is cast to, but for `inv_freq` of rotary embeddings; inputs are not cast.
        optimizer: from weights to their optimizer; None: `AdamW()`.
        lr: the learning rate, or a function from the number of an update, counted from 1, such as `LearningRate`.
        out: the directory of the run: `checkpoints/` and `metrics.jsonl`. None: nothing is written.
        keep: so many newest checkpoints stay, and each whose step is a multiple of `keep_every`, if that is not 0.
        save: whether checkpoints are written, where there is a directory for them.
        async_save: go on training while a process of its own writes; else wait for the disk.
        checkpoint_dir: where checkpoints lie, if not in `out`; also a URL, such as `s3://bucket/run`.
        resume: go on from the newest whole checkpoint in `out`, if there is one.
        evaluation: what to evaluate on: an iterable of global batches, read anew each time, or an `Evaluation`; or
            several by the names of their validation sets.
        work: tokens (or rows) and operations of a step, for the metrics.
        sharding: what each data-parallel rank keeps a part of: none, zero1, zero2, fsdp; or a `Sharding`.
        allow_unused: a parameter that no backward of a step reaches has gradient 0; else an error names it.
        on_nonfinite: what follows a loss or gradient that is no number: `stop`; `trace`, which names its microbatch
            too; `skip`, which goes on without the update.
        check_replicas: compare replicas by checksum after every so many steps; 0: never.
        waited: seconds that this rank has waited for others so far; with it, a slow rank is named.

    Raises:
        ValueError: sizes do not divide, or a model does not go with the layout.
        CheckpointError: on all ranks alike, what there is to resume from does not fit.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[StageSpec], nn.Module] | Assembly[Any],
        state: ParallelState,
        *,
        data: Source | Batches,
        global_batch: int,
        micro_batch: int | None = None,
        loss: Loss | None = None,
        weight: Callable[[Any], Tensor] | None = None,
        optimizer: Callable[[DataParallel], Optimizer] | None = None,
        lr: float | Callable[[int], float] = 1e-3,
        clip_grad: float = 1.0,
        schedule: str = "1f1b",
        boundary: tuple[int, ...] | None = None,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        bucket_mb: float = 25.0,
        seed: int = 0,
        out: str | Path | None = None,
        save_every: int = 0,
        keep: int = 2,
        keep_every: int = 0,
        async_save: bool = True,
        save: bool = True,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        evaluation: Iterable[Any] | Evaluation | Mapping[str, Iterable[Any] | Evaluation] | None = None,
        eval_every: int = 0,
        log_every: int = 1,
        about: Mapping[str, Any] | None = None,
        work: Work | None = None,
        timeline: StartTimeline | None = None,
        sharding: Sharding | str = DDP,
        check_replicas: int = 0,
        on_nonfinite: OnNonfinite = "stop",
        allow_unused: bool = False,
        waited: Callable[[], float] | None = None,
    ) -> None:
        self.state = state
        require_meant(lr, optimizer, sharding, on_nonfinite)
        dp, layout = state.axis("dp").size, state.layout
        cut = Cut(state, global_batch, max(1, global_batch // dp) if micro_batch is None else micro_batch, weight)
        buffers = Buffers()
        if not isinstance(model, Assembly):
            direct, axis = MainGradients(), state.axis("pp")
            stages = axis.size * layout.vpp
            order = partial(schedule_for, schedule, axis.size, cut.microbatches, layout.vpp, shape=layout.shape)
            build = Build(state.axis("tp"), sequence_parallel, dtype, state.world.device, seed, accumulators=direct)
            model = assemble(
                state,
                partial(
                    stage_of, model, stages, build, state.coords["tp"] == state.coords["cp"] == state.coords["dp"] == 0
                ),
                optimizer=optimizer or AdamW(),
                schedule=order(),
                boundary=boundary_of(model, boundary, dtype, stages),
                seed=seed,
                clip_grad=clip_grad,
                bucket_mb=bucket_mb,
                direct=direct,
                sharding=MODES[sharding] if isinstance(sharding, str) else sharding,
                on_nonfinite=on_nonfinite,
                call=partial(StageCall, stages, loss),
                search=(lambda cost: order(cost=cost)) if schedule == "auto" else None,
            )
            require_trainable(model.weights, axis)
            model.weights.allow_unused = allow_unused
            buffers = Buffers.of(model.stages, state)
        self.assembly: Assembly[Any] = model
        batches = data if isinstance(data, Batches) else RowBatches(data, cut)
        self.train_state = TrainState(model.optimizer, batches, buffers=buffers)
        sets = evaluation if isinstance(evaluation, Mapping) else {} if evaluation is None else {HELD_OUT: evaluation}
        self.evaluations: dict[str, Evaluation] = {
            name: each if isinstance(each, Evaluation) else RowEvaluation(each, cut) for name, each in sets.items()
        }
        self.out = None if out is None else Path(out).expanduser()
        self.about = dict(about or {})
        where = checkpoint_dir or (None if self.out is None else self.out / "checkpoints")
        self._saves: Saves | None = None
        if where is not None and save:
            policy = SavePolicy(where, Retention(keep, keep_every), self.about, async_save)
            self._saves = Saves(self.train_state, state, policy)
            self.assembly.stepper.before_update = self._saves.before_update
        self._rate: Callable[[int], float] = lr if callable(lr) else lambda _: lr
        self._every = {"save_every": save_every, "eval_every": eval_every, "log_every": log_every}
        self._unit, self._check_replicas = "rows" if work is None else "tokens", check_replicas
        self.timeline = timeline or StartTimeline()
        self._slow_ranks = None if waited is None else SlowRanks(state, waited)
        world, device = state.axis("tp", "cp", "dp", "pp"), state.world.device
        self.meter = Meter(work or Work(global_batch), world, device, model.busy, apart=lambda: state.peer_bytes)
        if resume and (newest := self._newest()):
            self.load(newest)

    @property
    def step(self) -> int:
        """Updates made."""
        return self.train_state.step

    def fit(
        self,
        steps: int,
        listeners: Sequence[Listener] = (),
        *,
        stop: Callable[[], bool] | None = None,
        before_step: Callable[[int], object] = bool,
        metrics: bool = True,
    ) -> Outcome:
        """Train until `steps` updates are made, in all; all ranks together.

        Listeners hear of it on rank 0, and are closed at the end; with `metrics`, one writes `metrics.jsonl` in `out`.
        `stop` is asked before each step whether this rank wants the run to end; all then save and leave after the same
        step. By default SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for that. Raises DivergedError, on all ranks alike.
        """
        if stop is None:
            main = threading.current_thread() is threading.main_thread()
            with StopFlag() if main else nullcontext(bool) as flag:
                return self.fit(steps, listeners, stop=flag, before_step=before_step, metrics=metrics)
        first = self.state.world.rank == 0
        heard = [each for each in listeners if first or each.everywhere]
        if first and metrics and self.out is not None:
            heard.insert(0, JsonLines(self.out / "metrics.jsonl", after=self.step))
        told, after = Everyone(heard), self.step
        try:
            told.started(RunRecord(steps, after, self._every["log_every"], self.about, self._unit))
            loop = self.loop(steps, told, stop=stop, before_step=before_step)
            began, before = time.perf_counter(), self.meter.totals.copy()
            if self._saves is not None:
                self._saves.reserve()
            finished = loop.run()
            self.assembly.weights.settle()
            seconds, totals = time.perf_counter() - began, self.meter.totals.copy()
            totals.subtract(before)
            return Outcome(finished, self.step, seconds, totals["checkpoint"], totals["evaluation"], after)
        except (DivergedError, UnsoundError):
            if self._saves is not None:
                self._saves.drain()
            raise
        finally:
            told.close()

    def loop(
        self,
        steps: int,
        listener: Listener,
        *,
        stop: Callable[[], bool] = bool,
        before_step: Callable[[int], object] = bool,
    ) -> Loop:
        """What `fit` runs, for who advances it a step at a time."""
        return Loop(
            self.assembly,
            self.train_state,
            Pace(steps, self._rate, **self._every),
            self.meter,
            listener,
            self._saves,
            self.evaluations,
            stop,
            before_step,
            self.timeline,
            self._check_replicas,
            self._slow_ranks,
        )

    def save(self) -> Path:
        """Write a checkpoint of this very step to `out`, and return its directory; all ranks together."""
        if self._saves is None:
            raise ValueError("there is no directory to save in: Trainer(..., out=...)")
        return self._saves.save_now()

    def load(self, path: str | Path | Found) -> None:
        """Go on from a checkpoint that any layout wrote; all ranks together."""
        self.train_state.load(path.checkpoint if isinstance(path, Found) else path, self.state)

    def _newest(self) -> str:
        """The newest whole checkpoint, as rank 0 sees it; empty where there is none."""
        if self._saves is None:
            raise ValueError("resume=True, but there is no directory to look in: Trainer(..., out=...)")
        world = self.state.world
        found = latest_complete(self._saves.policy.directory).path if world.rank == 0 else None
        told = Peers.of(world, self.state.axis("tp", "cp", "dp", "pp").group).gather(str(found or ""))
        return told[0] or ""

    def close(self) -> None:
        """Take the hooks off the parameters; a save that is under way is still finished, by its writer."""
        if self._saves is not None:
            self._saves.close()
        self.assembly.weights.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
