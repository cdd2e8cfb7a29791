"""What `stretto train` does once its arguments are valid: data, resume, workers, progress, the closing table."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from stretto.arguments import Resolved
from stretto.checkpoint import latest_complete
from stretto.cli.resume import Look
from stretto.cli.stopping import Told, after_damage, after_divergence, asks_again
from stretto.cli.this_machine import import_for_workers, require_devices, require_few, require_host_memory
from stretto.cli.usage_error import reject
from stretto.cli.words import origin
from stretto.collective_trace import CollectiveError
from stretto.data.text import Text
from stretto.initialize import Launch, RendezvousError, initialize
from stretto.initialize.environment import detect
from stretto.initialize.failure_watch import leave_process
from stretto.initialize.failures import PeerFailedError, PeersSilentError
from stretto.initialize.logs import logging_as
from stretto.initialize.rendezvous import RankZeroError
from stretto.initialize.stop import StopFlag, ask_again
from stretto.initialize.timeline import StartTimeline
from stretto.launch.local import run_local
from stretto.layout import Layout, Topology, warnings
from stretto.parallel_state import GroupCost, ParallelState, costs_line, default_axes
from stretto.report.console import Manner, console_for
from stretto.report.device_full import DeviceFullError, Held, device_full
from stretto.report.experts import ExpertPicture
from stretto.report.header import header
from stretto.report.progress import LiveProgress
from stretto.report.start_up import StartUp
from stretto.report.summary import sample_panel, summary
from stretto.report.tokenizing import Tokenizing
from stretto.terminal import say
from stretto.train.consensus import USAGE_ERRORS, require_same_settings
from stretto.train.directory import Paths, occupied, require_room, unwritable
from stretto.train.loop import DivergedError
from stretto.train.metrics_file import JsonLines
from stretto.train.placing import placed
from stretto.train.record import Everyone, Listener, TensorBoard
from stretto.train.run import train
from stretto.train.sample import sample, sampled_over
from stretto.train.shared_text import shared_text
from stretto.train.sound import UnsoundError
from stretto.train.trackers import MLflow, WandB
from stretto.train.trainer import Outcome
from stretto.world import World


def run(resolved: Resolved, launch: Launch, look: Look | None, stop: StopFlag, began: float) -> int:
    """Train in this process, or in workers that it starts, perhaps on from a checkpoint; the exit code.

    `stop` takes the signals of this process already; `began` is when the command did, by `time.monotonic`.
    """
    timeline = StartTimeline(began=began)
    timeline.until_now("imports")
    alone = launch.source == "python"
    stop.limit = resolved.args.run.exit_duration
    try:
        require_devices(resolved)
        require_few(resolved, alone=alone)
        require_room(resolved.args, alone=alone or launch.size == 1, first_here=launch.local_rank == 0)
        text = None
        if launch.size == 1:  # workers of its own know what it has seen
            with timeline.phase("data"), Tokenizing.shown(sys.stderr) as tell:
                text = Text.open(resolved.args, tell)
            if look:
                look.require_same_tokenizer(resolved.args.data.tokenizer, text.tokenizer.fingerprint)
            resolved = resolved.with_vocabulary(text.tokenizer.vocab_size)
    except USAGE_ERRORS as error:
        return reject(error, launch)
    resumed = look.found if look else None
    changed = resumed.all_changes(resolved) if resumed else ()
    work = Task(resolved, text, resumed.path if resumed else None, changed, stop, timeline, look)
    nproc = resolved.args.run.nproc or 1
    if not alone or nproc == 1:
        return leave_process(work())
    with timeline.phase("imports"):
        import_for_workers(resolved)
    return run_local(nproc, work, within=stop)


@dataclass(frozen=True)
class Task:
    """What each worker does: train, and on rank 0 tell of it."""

    resolved: Resolved
    text: Text | None
    """None where a launcher has started the ranks: they look at it together."""
    resume: Path | None
    changed: tuple[tuple[str, str | None], ...]
    """What differs from the run that is gone on with, by title: settings, and the learning rate that they make."""
    stop: StopFlag
    timeline: StartTimeline
    """Of the process that started this worker, until then."""
    look: Look | None = None
    """How the checkpoint was found."""

    def __call__(self) -> int:
        """The exit code of this worker."""
        launch = detect(os.environ)
        ours = launch.source == "stretto"  # a launcher that says itself what ended the run, once
        with ExitStack() as stack:
            try:
                log = stack.enter_context(self._logging(launch))
            except OSError as error:  # the first rank here was to find it out: see `require_room`
                return reject(unwritable("--log-dir", self.resolved.args.run.log_dir, error), launch, every=True)
            log.info("%s", launch)
            try:
                with self.look.meeting if self.look else nullcontext(), self._initialized() as world:
                    ended = self._with_text(world)
            except RendezvousError as error:
                return reject(error, launch, code=1, every=isinstance(error, RankZeroError) and not ours)
            except Exception as error:
                log.debug("this rank failed", exc_info=True)  # whoever ends it shows it on the console
                if ours or not isinstance(error, (PeersSilentError, PeerFailedError, CollectiveError)):
                    raise
                say(f"\n{error}".rstrip())  # where it was noticed explains nothing
                sys.stdout.flush()
                os._exit(1)  # threads of back ends may wait for that peer still, and abort the interpreter as it ends
        if isinstance(ended, int):
            return ended
        task, (outcome, code, asks) = ended
        if launch.rank == 0:
            task._conclude(outcome, asks, launch.source)  # the others have left: nobody waits
        return code

    @property
    def read(self) -> Text:
        """The text, once it is known."""
        assert self.text is not None
        return self.text

    def _with_text(self, world: World) -> tuple[Task, tuple[Outcome, int, str]] | int:
        """What `_train` gives, by a task that has a text."""
        task = self
        if self.text is None:
            show = Tokenizing.shown(sys.stderr) if world.rank == 0 else nullcontext()
            try:
                require_same_settings(self.resolved.args, world)
                with self.timeline.phase("data"), show as tell:
                    text = shared_text(self.resolved.args, world, tell)
                if self.look:
                    self.look.require_same_tokenizer(self.resolved.args.data.tokenizer, text.tokenizer.fingerprint)
                task = replace(self, text=text, resolved=self.resolved.with_vocabulary(text.tokenizer.vocab_size))
            except USAGE_ERRORS as error:
                return self._rejected(error, world)
        try:
            task = replace(task, resolved=placed(task.resolved, world))
            require_host_memory(task.resolved.args, world)
        except USAGE_ERRORS as error:
            return self._rejected(error, world)
        ended = task._train(world)
        return ended if isinstance(ended, int) else (task, ended)

    def _rejected(self, problem: object, world: World, code: int = 2) -> int:
        if world.rank == 0:
            say(f"stretto train: {problem}")
        return code

    def _logging(self, launch: Launch) -> AbstractContextManager[logging.Logger]:
        run = self.resolved.args.run
        directory = Path(run.log_dir).expanduser() if run.log_dir else None
        level = logging.getLevelNamesMapping()[run.log_level.upper()]
        return logging_as(launch.rank, style=run.log_style, level=level, directory=directory)

    def _initialized(self) -> AbstractContextManager[World]:
        run = self.resolved.args.run
        return initialize(
            device=run.device,
            timeout=run.timeout,
            start_timeout=run.start_timeout,
            threads=self.resolved.args.threads,
            seed=run.seed,
            deterministic=self.resolved.args.deterministic,
            tf32=run.tf32,
            timeline=self.timeline,
            met=self.look.met if self.look else None,
        )

    def _train(self, world: World) -> tuple[Outcome, int, str] | int:
        """How the run ended, the exit code, and what asks to be started again, if anything does.

        Of what is told here, without traceback, the exit code alone. All ranks agree on either.
        """
        screen, manner = console_for(self.resolved.args.run.progress, world.source)
        try:
            with ExitStack() as stack:
                self.stop.started()  # from here on the ranks can agree: the loop carries their votes
                begin = partial(self._begin, world, screen, manner, stack)
                stop = Told(self.stop, screen if world.rank == 0 else None)
                outcome = train(
                    self.resolved, world, self.read, begin, resume=self.resume, stop=stop, timeline=self.timeline
                )
                if outcome.finished or not asks_again(self.stop, world):
                    return outcome, 0, ""
                return outcome, *ask_again(leave_mark=world.rank == 0)
        except USAGE_ERRORS as error:
            return self._rejected(error, world)
        except DivergedError as error:
            return self._rejected(f"{error}{after_divergence(self.resolved.args, error.step)}", world, 1)
        except UnsoundError as error:
            return self._rejected(f"{error}{after_damage(self.resolved.args)}", world, 1)
        except torch.OutOfMemoryError as error:  # of one rank, perhaps: the others hear of it as of any failure
            place, what = self.resolved.layout.coords(world.rank)["pp"], str(error).partition(". ")[0]
            held = Held.now(world.device)
            raise DeviceFullError(device_full(self.resolved.args, place, held, what)) from error

    def _begin(
        self, world: World, screen: Console, manner: Manner, stack: ExitStack, after: int, costs: Sequence[GroupCost]
    ) -> Listener:
        """On rank 0: take the directory of the run, say what runs, and listen. The others time their start alone."""
        logging.getLogger(__name__).info("before the first step: %s", self.timeline)
        if world.rank != 0:
            return StartUp(self.timeline, world, say=lambda _: None)
        args = self.resolved.args
        paths = Paths.of(args)
        aside = stack.enter_context(occupied(self.resolved, resume=self.resume is not None))
        about = header(args, self.read, resume=self.resume, after=after, aside=aside, preset=origin(self.resolved))
        here = f", {world.local_size} on this host" if world.local_size < world.size else ""
        for title, said in self.changed:
            if said is not None:
                about.add_row(title, said)
        about.add_row("ranks", f"{world.size}{here}, started by {world.source}")
        about.add_row(*costs_line(costs).split(" ", 1))
        layout = self.resolved.layout
        for warning in warnings(layout, Topology(args.parallel.gpus_per_node or layout.world)):
            about.add_row("warning", warning)
        screen.print(about)
        lines = JsonLines(paths.metrics, after=after)
        live = LiveProgress(screen, manner)
        curves = TensorBoard.installed() if args.run.tensorboard is None else args.run.tensorboard
        boards: list[Listener] = [TensorBoard(paths.tensorboard, last=lines.last)] if curves else []
        boards += [WandB(args.run.wandb, dir=str(paths.root))] if args.run.wandb else []
        boards += [MLflow(args.run.mlflow)] if args.run.mlflow else []
        boards += [ExpertPicture(paths.experts, after=after)] if args.model.experts else []
        return Everyone([lines, StartUp(self.timeline, world, partial(live.say, by_words=True)), live, *boards])

    def _conclude(self, outcome: Outcome, asks: str, launcher: str) -> None:
        """How to go on; or, after the last step, how the model goes on from the prompt, and the table."""
        screen = console_for(self.resolved.args.run.progress, launcher)[0]
        if not outcome.finished:
            resumes = self.resume or self.resolved.args.checkpoint.auto_resume
            command = "the same command" + ("" if resumes else " and --resume")
            asks = f"; {asks} asks for that" if asks else ""
            on = f"go on with {command}{asks}" if self.resolved.args.checkpoint.save else "nothing was saved"
            line = f"stopped at step {outcome.step} of {self.resolved.args.run.steps}; {on}"
            screen.print(line, soft_wrap=not screen.is_terminal)
            return
        args = self.resolved.args
        checkpoint = latest_complete(Paths.of(args).checkpoints).path
        if checkpoint is not None and args.run.sample_tokens:  # a run ends by saving one, if any
            prompt, tokenizer = args.run.sample_prompt, self.read.tokenizer
            axes, alone = default_axes(Layout.of(), experts=args.model.experts > 0), World.single(args.run.device)
            tokens = sample(
                sampled_over(args, checkpoint, ParallelState.build(Layout.of(), alone, axes=axes)),
                [*tokenizer.encode(prompt).tolist()] or [tokenizer.eod],
                args.run.sample_tokens,
                context=args.batch.seq_len,
                vocab=tokenizer.vocab_size,
                seed=args.run.seed,
            )
            screen.print(sample_panel(prompt, tokenizer.decode(np.array(tokens, dtype=np.int64))))
        beaten = {each.name: each.baselines for each in self.read.eval_sets if each.baselines is not None}
        screen.print(summary(args, checkpoint, beaten, outcome))
