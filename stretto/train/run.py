"""A whole training run on this rank: data, groups, model, resume, loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from stretto.arguments import Arguments, ConfigError, Resolved, Violation
from stretto.checkpoint import load
from stretto.collective_trace import CHECK_SECONDS, Checker, LastCalls
from stretto.data.feed import Feed
from stretto.data.text import Text
from stretto.data.tokenizer import Tokenizer
from stretto.initialize.failures import is_consequence
from stretto.initialize.timeline import StartTimeline
from stretto.layout import Layout
from stretto.parallel_state import GroupCost, ParallelState
from stretto.train.build import Built, build
from stretto.train.checkpointing import TrainState
from stretto.train.consensus import on_all_ranks, require_same_text
from stretto.train.directory import Paths
from stretto.train.groups import group_options
from stretto.train.loop import Loop
from stretto.train.record import Listener
from stretto.world import World


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    finished: bool
    step: int
    seconds: float
    """Of the loop, evaluation and saving included."""


def with_vocabulary(resolved: Resolved, tokenizer: Tokenizer) -> Resolved:
    """The configuration with `model.vocab` known. Raises ConfigError when it is smaller than the tokenizer's."""
    args, need = resolved.args, tokenizer.vocab_size
    if args.model.vocab is not None and args.model.vocab < need:
        problem = f"model.vocab={args.model.vocab}, but the tokenizer {args.data.tokenizer!r} has {need} entries"
        raise ConfigError(
            [Violation("vocab_holds_tokenizer", ("model.vocab",), problem, fixes=({"model.vocab": need},))]
        )
    if args.model.vocab is not None:
        return resolved
    return replace(resolved, args=replace(args, model=replace(args.model, vocab=need)))


def train(
    resolved: Resolved,
    world: World,
    text: Text,
    begin: Callable[[int, Sequence[GroupCost]], Listener],
    *,
    resume: Path | None,
    stop: Callable[[], bool],
    timeline: StartTimeline,
) -> Outcome:
    """Run `resolved` on this rank of `world`.

    Args:
        begin: called when nothing is left that could reject the run, and before anything is written, with the step
            from which it goes on and what each of this rank's groups took; makes what is told of the run.
        resume: the checkpoint to go on from.
        stop: whether this rank wants the run to end; all ranks then save and leave after the same step.
        timeline: gets the phases "groups", "data", "model", "checkpoint", "output", "evaluation" and
            "first step".

    Raises:
        RunRejectedError, CheckpointError, DataError: on all ranks alike; nothing has been written.
        DivergedError: on all ranks alike.
    """
    args = resolved.args
    options = group_options(args, resolved.layout)
    with timeline.phase("groups"):
        check = args.run.check_collectives
        tracer = Checker(min(args.run.timeout, CHECK_SECONDS)) if check else LastCalls(is_consequence)
        state = ParallelState.build(resolved.layout, world, timeout=args.run.timeout, options=options, tracer=tracer)
    with state:
        with timeline.phase("data"):
            require_same_text(state, text)
            feed = on_all_ranks(state, lambda: Feed(text.mix, seq_len=args.batch.seq_len, seed=args.run.seed))
        with timeline.phase("model"):
            built = build(args, state)
        train_state = TrainState(built.optimizer, feed)
        if resume is not None:
            with timeline.phase("checkpoint"):
                train_state.load(resume, state)
        about = {"record": resolved.record().as_dict(), "tokenizer": args.data.tokenizer}
        save = partial(train_state.save, Paths.of(args).checkpoints, about, state, keep=args.checkpoint.keep)

        def begun() -> Listener:
            with timeline.phase("output"):  # not the wait for the others, which their slow phases make
                return begin(train_state.step, state.costs)

        told = on_all_ranks(state, begun)
        try:
            loop = Loop(args, state, built, train_state, text.eval_sets, told, save, stop, timeline)
            since = time.perf_counter()
            finished = loop.run()
            return Outcome(finished, train_state.step, time.perf_counter() - since)
        finally:
            told.close()
            built.weights.close()


def load_whole(args: Arguments, checkpoint: Path, world: World) -> Built:
    """The whole model of a checkpoint in this process alone, whatever layout wrote it.

    Raises CheckpointError when it does not fit.
    """
    parallel = replace(args.parallel, tp=1, cp=1, pp=1, dp=1, ep=1, etp=1, sequence_parallel=False, stage_layers=None)
    alone = replace(args, parallel=parallel)
    built = build(alone, ParallelState.build(Layout.of(), world))
    weights = [s for s in built.optimizer.slices() if s.name.startswith("model/")]
    load(checkpoint, weights, world, prefixes=("model/",))
    built.optimizer.loaded(0)
    return built
