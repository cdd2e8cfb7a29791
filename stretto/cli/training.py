"""What `stretto train` does once its arguments are valid: data, resume, workers, progress, the closing table."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from stretto.arguments import ConfigError, Resolved, Violation
from stretto.checkpoint import latest_complete
from stretto.cli.usage_error import reject
from stretto.cli.words import origin
from stretto.data.text import Text
from stretto.initialize import Launch, RendezvousError, initialize
from stretto.initialize.environment import detect
from stretto.initialize.group import largest
from stretto.initialize.logs import logging_as
from stretto.initialize.stop import StopFlag
from stretto.initialize.timeline import StartTimeline
from stretto.launch.local import run_local
from stretto.layout import Topology, warnings
from stretto.parallel_state import GroupCost, costs_line
from stretto.report.header import header
from stretto.report.progress import LiveProgress
from stretto.report.start_up import StartUp
from stretto.report.summary import sample_panel, summary
from stretto.report.tokenizing import Tokenizing
from stretto.train.consensus import USAGE_ERRORS
from stretto.train.directory import Paths, occupied
from stretto.train.loop import DivergedError
from stretto.train.record import Everyone, JsonLines, Listener, TensorBoard
from stretto.train.run import Outcome, load_whole, train, with_vocabulary
from stretto.train.sample import sample
from stretto.world import World


def run(resolved: Resolved, launch: Launch, resume: Path | None, stop: StopFlag, began: float) -> int:
    """Train in this process, or in workers that it starts, perhaps on from a checkpoint; the exit code.

    `stop` takes the signals of this process already; `began` is when the command did, by `time.monotonic`.
    """
    timeline = StartTimeline(began=began)
    timeline.until_now("imports")
    alone = launch.source == "python"
    stop.limit = resolved.args.run.exit_duration
    try:
        _require_devices(resolved)
        with timeline.phase("data"), Tokenizing.shown(sys.stderr) if launch.rank == 0 else nullcontext() as tell:
            text = Text.open(resolved.args, tell)
        resolved = with_vocabulary(resolved, text.tokenizer)
    except USAGE_ERRORS as error:
        return reject(error, launch)
    work = Task(resolved, text, resume, stop, timeline)
    nproc = resolved.args.run.nproc or 1
    if not alone or nproc == 1:
        return work()
    with timeline.phase("imports"):
        _import_for_workers(resolved)
    return run_local(nproc, work, within=stop)


@dataclass(frozen=True)
class Task:
    """What each worker does: train, and on rank 0 tell of it."""

    resolved: Resolved
    text: Text
    resume: Path | None
    stop: StopFlag
    timeline: StartTimeline
    """Of the process that started this worker, until then."""

    def __call__(self) -> int:
        """The exit code of this worker."""
        launch = detect(os.environ)
        with self._logging(launch) as log:
            log.info("%s", launch)
            try:
                with self._initialized() as world:
                    ended = self._train(world)
            except RendezvousError as error:
                return reject(error, launch, code=1)
            except Exception:
                log.debug("this rank failed", exc_info=True)  # whoever ends it shows it on the console
                raise
        if isinstance(ended, int):
            return ended
        outcome, code = ended
        if launch.rank == 0:
            self._conclude(outcome, code)  # the others have left: nobody waits
        return code

    def _logging(self, launch: Launch) -> AbstractContextManager[logging.Logger]:
        run = self.resolved.args.run
        return logging_as(
            launch.rank,
            style=run.log_style,
            level=logging.getLevelNamesMapping()[run.log_level.upper()],
            directory=Path(run.log_dir).expanduser() if run.log_dir else None,
        )

    def _initialized(self) -> AbstractContextManager[World]:
        run = self.resolved.args.run
        return initialize(
            device=run.device,
            timeout=run.timeout,
            start_timeout=run.start_timeout,
            threads=run.threads,
            seed=run.seed,
            deterministic=run.deterministic,
            tf32=run.tf32,
            timeline=self.timeline,
        )

    def _train(self, world: World) -> tuple[Outcome, int] | int:
        """How the run ended, and the exit code; of what is told here, without traceback, the exit code alone.

        All ranks agree on either.
        """
        console = Console()
        try:
            with ExitStack() as stack:
                self.stop.started()  # from here on the ranks can agree: the loop carries their votes
                begin = partial(self._begin, world, console, stack)
                stop = Told(self.stop, console if world.rank == 0 else None)
                outcome = train(
                    self.resolved, world, self.text, begin, resume=self.resume, stop=stop, timeline=self.timeline
                )
                return outcome, 0 if outcome.finished else _agreed(self.stop, world)
        except USAGE_ERRORS as error:
            problem, code = f"{error}", 2
        except DivergedError as error:
            problem, code = f"{error}{self._after_divergence()}", 1
        if world.rank == 0:
            print(f"stretto train: {problem}", file=sys.stderr, flush=True)
        return code

    def _begin(
        self, world: World, console: Console, stack: ExitStack, after: int, costs: Sequence[GroupCost]
    ) -> Listener:
        """On rank 0: take the directory of the run, say what runs, and listen. The others time their start alone."""
        logging.getLogger(__name__).info("before the first step: %s", self.timeline)
        if world.rank != 0:
            return StartUp(self.timeline, world, say=lambda _: None)
        args = self.resolved.args
        paths = Paths.of(args)
        aside = stack.enter_context(occupied(self.resolved, resume=self.resume is not None))
        about = header(args, self.text, resume=self.resume, after=after, aside=aside, preset=origin(self.resolved))
        here = f", {world.local_size} on this host" if world.local_size < world.size else ""
        about.add_row("ranks", f"{world.size}{here}, started by {escape(world.source)}")
        about.add_row(*escape(costs_line(costs)).split(" ", 1))
        layout = self.resolved.layout
        for warning in warnings(layout, Topology(args.parallel.gpus_per_node or layout.world)):
            about.add_row("warning", escape(warning))
        console.print(about)
        lines = JsonLines(paths.metrics, after=after)
        live = LiveProgress(console, steps=args.run.steps, after=after, log_every=args.run.log_every)
        board = [TensorBoard(paths.tensorboard, last=lines.last)] if args.run.tensorboard else []
        return Everyone([lines, StartUp(self.timeline, world, partial(live.say, by_words=True)), live, *board])

    def _conclude(self, outcome: Outcome, code: int) -> None:
        """How to go on; or, after the last step, how the model goes on from the prompt, and the table."""
        console = Console()
        if not outcome.finished:
            same = self.resume or self.resolved.args.checkpoint.auto_resume
            recompute = "the same command" if same else "the same command and --resume"
            steps = self.resolved.args.run.steps
            asks = f"; exit code {code} asks for that" if code else ""
            console.print(f"stopped at step {outcome.step} of {steps}; go on with {recompute}{asks}", highlight=False)
            return
        args = self.resolved.args
        checkpoint = latest_complete(Paths.of(args).checkpoints).path
        assert checkpoint is not None  # a run ends by saving one
        if args.run.sample_tokens:
            prompt, tokenizer = args.run.sample_prompt, self.text.tokenizer
            tokens = sample(
                load_whole(args, checkpoint, World.single(args.run.device)).stages[0],
                [*tokenizer.encode(prompt).tolist()] or [tokenizer.eod],
                args.run.sample_tokens,
                context=args.batch.seq_len,
                vocab=tokenizer.vocab_size,
                seed=args.run.seed,
            )
            console.print(sample_panel(prompt, tokenizer.decode(np.array(tokens, dtype=np.int64))))
        beaten = {each.name: each.baselines for each in self.text.eval_sets if each.baselines is not None}
        console.print(summary(args, checkpoint, beaten))

    def _after_divergence(self) -> str:
        """What there is to go on from."""
        found = latest_complete(Paths.of(self.resolved.args).checkpoints).path
        if found is None:
            return (
                "\n  no checkpoint was saved before it: begin anew with a lower --lr or --clip-grad, and save on the "
                "way with --save-every"
            )
        return (
            f"\n  {found} is from before it: go on from there with --resume and a lower --lr or --clip-grad; should it "
            "diverge again, remove that checkpoint and --resume takes the one before"
        )


def _import_for_workers(resolved: Resolved) -> None:
    """Import once, before the fork, what each worker would on its way to the end of the first step.

    NumPy and torch load parts of themselves when they are first used. None of these starts a thread. Those of
    `torch.compile` are loaded here for the CPU alone: a node with GPUs has cores for its ranks to do so side by side.
    """
    names = ["numpy.ma", "numpy.random", "encodings.idna"]
    if resolved.args.run.compile and resolved.args.run.device == "cpu":
        names += ["torch._dynamo", "torch._inductor.compile_fx"]
    for name in names:
        import_module(name)


def _require_devices(resolved: Resolved) -> None:
    """Raise ConfigError when there is no GPU at all; counting them leaves them untouched, so workers may still fork."""
    if resolved.args.run.device == "cuda" and not torch.cuda.device_count():
        problem = f"run.device=cuda, but torch {torch.__version__} sees no CUDA device on this machine"
        raise ConfigError([Violation("device_exists", ("run.device",), problem, fixes=({"run.device": "cpu"},))])


@dataclass
class Told:
    """A flag that says once why it is up, to whoever watches."""

    flag: StopFlag
    console: Console | None
    said: bool = False

    def __call__(self) -> bool:
        up = self.flag()
        if up and not self.said:
            text = f"{self.flag.reason}: stopping after this step, then saving"
            logging.getLogger(__name__).info(text)
            if self.console is not None:
                self.console.print(text, highlight=False)
        self.said |= up
        return up


def _agreed(stop: StopFlag, world: World) -> int:
    """The exit code of a run that was stopped, on all ranks: `REQUEUE`, unless some rank was ordered to leave."""
    ordered = largest(world, int(stop.ordered))
    asked = largest(world, stop.exit_code)
    return 0 if ordered else asked
