"""A whole training run on this rank: data, groups, model, resume, loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stretto.arguments import Arguments, ConfigError, Resolved, Violation
from stretto.arguments.profile import ProfileWindow
from stretto.checkpoint import load
from stretto.collective_trace import CHECK_SECONDS, Checker, LastCalls
from stretto.data.corpus import Corpus
from stretto.data.feed import Feed
from stretto.data.prepare import Splits, prepare
from stretto.data.store import TokenStore
from stretto.data.tokenizer import Tokenizer, load_tokenizer
from stretto.estimate import flops_per_token
from stretto.initialize.failures import is_consequence
from stretto.initialize.timeline import StartTimeline
from stretto.layout import Layout
from stretto.parallel_state import GroupCost, ParallelState
from stretto.train.build import Built, build
from stretto.train.consensus import on_all_ranks, require_same_text
from stretto.train.directory import Paths
from stretto.train.groups import group_options
from stretto.train.learning_rate import learning_rate
from stretto.train.meter import Work
from stretto.train.peak import peak_tflops
from stretto.train.profile import Profile
from stretto.train.record import Listener
from stretto.train.text import HeldOut, TextBatches
from stretto.train.trainer import Outcome, Trainer
from stretto.world import World


@dataclass(frozen=True)
class Text:
    """What a run reads: corpus, tokenizer, token stores."""

    corpus: Corpus
    tokenizer: Tokenizer
    splits: Splits

    @classmethod
    def open(cls, args: Arguments) -> Text:
        """From the cache, or built there. Raises DataError when the data cannot be used."""
        data = args.data
        corpus, tokenizer = Corpus.open(data.data), load_tokenizer(data.tokenizer)
        return cls(corpus, tokenizer, prepare(corpus, tokenizer, held_out=data.held_out, cache=data.cache))


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
            require_same_text(state, text.splits)
            feed = on_all_ranks(state, lambda: Feed(text.splits.train, seq_len=args.batch.seq_len, seed=args.run.seed))
        with timeline.phase("model"):
            built = build(args, state)
        trainer = trainer_of(
            args,
            built,
            feed,
            text.splits.held_out,
            about={"record": resolved.record().as_dict(), "tokenizer": args.data.tokenizer},
            timeline=timeline,
        )
        if resume is not None:
            with timeline.phase("checkpoint"):
                trainer.load(resume)

        def begun() -> Listener:
            with timeline.phase("output"):  # not the wait for the others, which their slow phases make
                return begin(trainer.step, state.costs)

        with trainer, profiled(args, state.world) as before_step:
            told = on_all_ranks(state, begun)
            return trainer.fit(args.run.steps, [told], stop=stop, before_step=before_step, metrics=False)


def trainer_of(
    args: Arguments,
    built: Built,
    feed: Feed,
    held_out: TokenStore,
    *,
    about: Mapping[str, Any] | None = None,
    timeline: StartTimeline | None = None,
) -> Trainer:
    """The trainer of `stretto train`: a model that was built from arguments, on text."""
    state, batch, run = built.stepper.state, args.batch, args.run
    return Trainer(
        built,
        state,
        data=TextBatches(feed, batch, state),
        global_batch=batch.global_batch,
        micro_batch=batch.micro_batch,
        lr=learning_rate(args.optimizer),
        out=Paths.of(args).root,
        save_every=args.checkpoint.save_every,
        keep=args.checkpoint.keep,
        evaluation=HeldOut(held_out, batch, state, run.eval_batches),
        eval_every=run.eval_every,
        log_every=run.log_every,
        about=about,
        work=Work(
            batch.global_batch * batch.seq_len,
            flops_per_token(args.model, batch.seq_len),
            run.peak_tflops or peak_tflops(state.world.device, args.run.dtype),
        ),
        timeline=timeline,
    )


@contextmanager
def profiled(args: Arguments, world: World) -> Iterator[Callable[[int], object]]:
    """What is told of each step before it is launched; at the end what was recorded is written."""
    if args.run.profile is None:
        yield bool
        return
    window = ProfileWindow.read(args.run.profile)
    profile = Profile(window, Paths.of(args).root / "profile", world.rank, world.device)
    try:
        yield profile.begin
    finally:
        profile.close()


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
