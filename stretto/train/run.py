"""A whole training run on this rank: data, groups, model, resume, loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stretto.arguments import Arguments, Resolved
from stretto.collective_trace import CHECK_SECONDS, Checker, Waits
from stretto.data.feed import Feed
from stretto.data.mixture import Mix
from stretto.data.text import EvalSet, Text
from stretto.estimate import flops_per_token
from stretto.initialize.timeline import StartTimeline
from stretto.notation.profile import ProfileWindow
from stretto.parallel_state import GroupCost
from stretto.train.build import Built, build
from stretto.train.checkpointing import require_fits
from stretto.train.consensus import on_all_ranks, require_same_text
from stretto.train.directory import Paths
from stretto.train.groups import state_of
from stretto.train.huggingface import export_live, init_from, outgoing_of, require_init
from stretto.train.learning_rate import learning_rate
from stretto.train.measured import StepTimeline
from stretto.train.meter import Work
from stretto.train.peak import peak_tflops
from stretto.train.profile import Profile
from stretto.train.record import Listener
from stretto.train.stages import sequence_cut
from stretto.train.text import HeldOut, TextBatches
from stretto.train.trainer import Outcome, Trainer
from stretto.world import World


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
        DivergedError, UnsoundError: on all ranks alike.
    """
    args = resolved.args
    layout = resolved.layout
    with timeline.phase("groups"):
        tracer = Checker(min(args.run.timeout, CHECK_SECONDS)) if args.run.check_collectives else None
        waits = Waits()
        state = state_of(args, layout, world, tracer=tracer, timer=waits)
    with state:
        with timeline.phase("data"):
            require_same_text(state, text)
            feed = on_all_ranks(state, lambda: feed_of(args, text.mix))
        if resume is not None:
            on_all_ranks(state, lambda: require_fits(args, resume) if world.rank == 0 else None)
        outgoing = on_all_ranks(state, lambda: outgoing_of(args))
        with timeline.phase("model"):
            built = build(args, state, draw=resume is None and args.checkpoint.init_from is None)
        trainer = trainer_of(
            args,
            built,
            feed,
            text.eval_sets,
            about={"record": resolved.record().as_dict(), "tokenizer": args.data.tokenizer},
            timeline=timeline,
            waited=lambda: waits.seconds,
        )
        if resume is not None:
            with timeline.phase("checkpoint"):
                trainer.load(resume)
        elif args.checkpoint.init_from is not None:
            with timeline.phase("weights"):
                on_all_ranks(state, lambda: require_init(args))
                init_from(args, built)

        def begun() -> Listener:
            with timeline.phase("output"):  # not the wait for the others, which their slow phases make
                return begin(trainer.step, state.costs)

        with trainer, profiled(args, built) as before_step:
            told = on_all_ranks(state, begun)
            outcome = trainer.fit(args.run.steps, [told], stop=stop, before_step=before_step, metrics=False)
        if outgoing is not None and outcome.finished:
            export_live(Path(args.checkpoint.export_hf or "").expanduser(), outgoing, built)
        return outcome


def feed_of(args: Arguments, text: Mix) -> Feed:
    """The rows of a run. Raises DataError when there are none."""
    return Feed(text, seq_len=args.batch.seq_len, seed=args.run.seed, packing=args.data.packing)


def trainer_of(
    args: Arguments,
    built: Built,
    feed: Feed,
    eval_sets: Sequence[EvalSet],
    *,
    about: Mapping[str, Any] | None = None,
    timeline: StartTimeline | None = None,
    waited: Callable[[], float] | None = None,
) -> Trainer:
    """The trainer of `stretto train`: a model that was built from arguments, on text."""
    state, batch, run = built.stepper.state, args.batch, args.run
    cut = sequence_cut(args, state)
    return Trainer(
        built,
        state,
        data=TextBatches(feed, batch, state, cut),
        global_batch=batch.global_batch,
        micro_batch=batch.micro_batch,
        lr=learning_rate(args.optimizer),
        out=Paths.of(args).root,
        save_every=args.checkpoint.save_every,
        keep=args.checkpoint.keep,
        keep_every=args.checkpoint.keep_every,
        async_save=args.checkpoint.async_save,
        save=args.checkpoint.save,
        checkpoint_dir=args.checkpoint.checkpoint_dir,
        evaluation={
            each.name: HeldOut(each, batch, state, run.eval_batches, cut, args.data.packing) for each in eval_sets
        },
        eval_every=run.eval_every,
        log_every=run.log_every,
        about=about,
        work=Work(
            batch.global_batch * batch.seq_len,
            flops_per_token(args.model, batch.seq_len, args.tuning),
            run.peak_tflops or peak_tflops(state.world.device, args.run.dtype),
            feed.waste,
        ),
        timeline=timeline,
        check_replicas=run.check_replicas,
        waited=waited,
    )


@contextmanager
def profiled(args: Arguments, built: Built) -> Iterator[Callable[[int], object]]:
    """What is told of each step before it is launched; at the end what was recorded is written."""
    if args.run.profile is None:
        yield bool
        return
    window, directory, state = (
        ProfileWindow.read(args.run.profile),
        Paths.of(args).root / "profile",
        built.stepper.state,
    )
    profile = Profile(window, directory, state.world.rank, state.world.device)
    timeline = StepTimeline(window, built.stepper, directory) if state.axis("pp").size > 1 else None

    def begin(step: int) -> None:
        profile.begin(step)
        if timeline is not None:
            timeline.begin(step)

    try:
        yield begin
        if timeline is not None:
            timeline.finish()
    finally:
        profile.close()
