"""A whole training run on this rank: data, groups, model, resume, loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stretto.arguments import Arguments, Resolved
from stretto.arguments.elsewhere import in_layout
from stretto.arguments.sections import is_adapter
from stretto.checkpoint import load
from stretto.collective_trace import CHECK_SECONDS, Checker, Waits
from stretto.data.feed import Feed
from stretto.data.mixture import Mix
from stretto.data.text import EvalSet, Text
from stretto.estimate import flops_per_token
from stretto.initialize.timeline import StartTimeline
from stretto.interop.adapter_in import begun_with, load_adapter, require_adapter
from stretto.interop.config import read_config
from stretto.interop.export import SHARD, copy_beside, export, ordered, require_empty, tensors
from stretto.interop.live import Live
from stretto.interop.load import load_weights, require_weights
from stretto.interop.outgoing import Outgoing
from stretto.interop.shapes import adapter_shapes, logical_shapes
from stretto.notation.profile import ProfileWindow
from stretto.parallel_state import GroupCost, ParallelState
from stretto.train.build import Built, build
from stretto.train.checkpointing import require_fits
from stretto.train.consensus import on_all_ranks, require_same_text
from stretto.train.directory import Paths
from stretto.train.groups import state_of
from stretto.train.learning_rate import learning_rate
from stretto.train.measured import StepTimeline
from stretto.train.meter import Work
from stretto.train.peak import peak_tflops
from stretto.train.profile import Profile
from stretto.train.record import Listener
from stretto.train.sample import Spread
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


def require_init(args: Arguments) -> None:
    """Raise InteropError where the Hugging Face model to begin with does not fit. No collective."""
    directory, adapter = begun_with(args.checkpoint.init_from or "")
    config = read_config(directory).predicting(args.model.mtp_layers)
    require_weights(directory, config, logical_shapes(args.model, args.batch.seq_len))
    if adapter is not None:
        require_adapter(adapter, adapter_shapes(args.model, args.batch.seq_len, args.tuning))


def init_from(args: Arguments, built: Built) -> None:
    """Begin with the weights of a Hugging Face model, each byte of which one rank reads, and with adapters on it.

    Raises InteropError.
    """
    directory, adapter = begun_with(args.checkpoint.init_from or "")
    config = read_config(directory).predicting(args.model.mtp_layers)
    shapes = logical_shapes(args.model, args.batch.seq_len)
    weights = [s for s in built.optimizer.slices() if s.name.startswith("model/")]
    named = [replace(s, name=s.name.removeprefix("model/")) for s in weights]
    base = [s for s in named if not is_adapter(s.name)]
    load_weights(directory, config, shapes, base, built.stepper.state.axis("tp", "cp", "dp", "pp"))
    if adapter is None:
        built.optimizer.initialize(args.run.seed, is_adapter)
    else:
        load_adapter(adapter, adapter_shapes(args.model, args.batch.seq_len, args.tuning), named)
    built.optimizer.loaded(0)


def outgoing_of(args: Arguments) -> Outgoing | None:
    """How the model goes out at the end, where it does; what could stand against that is said before the run."""
    if args.checkpoint.export_hf is None:
        return None
    require_empty(Path(args.checkpoint.export_hf).expanduser())
    return Outgoing.of(args)


def export_live(to: Path, outgoing: Outgoing, built: Built) -> None:
    """Write the model of a run as a Hugging Face directory: all ranks hand their parts over, the first one writes."""
    axis = built.stepper.state.axis("tp", "cp", "dp", "pp")
    source = outgoing.merged(Live(built.optimizer.slices(), axis))
    if axis.rank == 0:
        export(to, outgoing.raw, outgoing.named, source, limit=SHARD)
        copy_beside(outgoing.beside, to)
    else:
        for _ in tensors(ordered(outgoing.named, SHARD), source):
            pass


def load_over(args: Arguments, checkpoint: Path, state: ParallelState) -> Built:
    """The model of a checkpoint over the tensor and pipeline parallel ranks of a layout, whatever layout wrote it.

    Raises CheckpointError when it does not fit.
    """
    args = in_layout(args, state.layout)
    parallel = replace(
        args.parallel, sequence_parallel=False, tp_comm_overlap=False, ep_comm_overlap=False, sharding="none"
    )
    batch = replace(args.batch, global_batch=args.batch.micro_batch)  # no step is planned that is not made
    args = replace(args, parallel=parallel, batch=batch)
    require_fits(args, checkpoint)
    built = build(args, state, draw=False)
    weights = [s for s in built.optimizer.slices() if s.name.startswith("model/")]
    load(checkpoint, weights, state.world, group=state.axis("tp", "cp", "dp", "pp").group, prefixes=("model/",))
    built.optimizer.loaded(0)
    return built


def sampled_over(args: Arguments, checkpoint: Path, state: ParallelState) -> Spread:
    """The model of a checkpoint, to be sampled from: see `load_over`."""
    (stage,) = load_over(args, checkpoint, state).stages.values()
    return Spread.over(stage, state)
