"""What the arguments say of process groups."""

from __future__ import annotations

from stretto.arguments.schema import Arguments
from stretto.estimate.workspace import message_over_cp, message_over_ep, message_over_pp, message_over_tp
from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, ParallelState, default_axes
from stretto.parallel_state.plan import Axes, downwards
from stretto.parallel_state.tracer import Tracer
from stretto.world import Timer, World


def state_of(
    args: Arguments, layout: Layout, world: World, *, tracer: Tracer | None = None, timer: Timer | None = None
) -> ParallelState:
    """The groups of a run: what the arguments say of them, for `ParallelState.build`."""
    return ParallelState.build(
        layout,
        world,
        timeout=args.run.timeout,
        axes=axes_of(args, layout),
        options=group_options(args, layout),
        tracer=tracer,
        timer=timer,
        ordered=args.parallel.exact is not None,
    )


def axes_of(args: Arguments, layout: Layout) -> tuple[Axes, ...]:
    """The axes that a run asks for. Sharded weights are gathered over a communicator of their own: on that of the
    gradients a gather would wait behind a reduction."""
    inner = "dp.0" if "dp.0" in layout.axes else "dp"
    gather: tuple[Axes, ...] = ((f"{inner}:gather", "cp"),) if args.parallel.mode != "none" else ()
    experts = args.model.experts > 0
    if experts and gather:
        gather = (*gather, (f"e{inner}:gather",))
    return (*default_axes(layout, experts=experts), *gather)


def group_options(args: Arguments, layout: Layout) -> dict[str, GroupOptions]:
    """Options by axes. What is said of an axis goes for every combination that lies along the same ranks.

    So `dp` without context parallelism is also `dp-cp`, along which gradients are reduced.
    """
    timeouts, fewest, most = (
        {_wide(layout, axis): value for axis, value in said}
        for said in (args.groups.timeouts, args.nccl.min_ctas, args.nccl.max_ctas)
    )
    over_gloo = {_wide(layout, axis) for axis in args.groups.gloo}
    urgent = {_wide(layout, axis) for axis in args.nccl.high_priority}
    over_pp = message_over_pp(args)
    peer_buffer, buffers = message_over_tp(args), {"cp": message_over_cp(args), "etp-ep": message_over_ep(args)}
    options = {}
    reached = args.parallel.dp_copy_engines and args.parallel.mode != "none" and args.run.device != "cpu"
    for names in axes_of(args, layout):
        axis = "-".join(names)
        wide = _wide(layout, axis)
        shares = "dp" in axis.split(":")[0].split("-")  # also where dp is one rank, and cp the others
        gloo = wide in over_gloo
        found = GroupOptions(
            timeout=timeouts.get(wide),
            backend="gloo" if gloo else None,
            high_priority=wide in urgent,
            min_ctas=fewest.get(wide),
            max_ctas=most.get(wide),
            peer_buffer=None if gloo else peer_buffer if wide == {"tp"} else buffers.get(axis),
            peer_memory=reached and shares and not gloo and wide <= {"dp", "cp"},
            peer_messages=None if gloo or not downwards(names) else over_pp,
        )
        if wide and found != GroupOptions():
            options[axis] = found
    return options


def _wide(layout: Layout, axis: str) -> frozenset[str]:
    """The axes of more than one rank in a combination such as dp-cp; a channel, as in pp:0>1, is one of its axis."""
    names = [name.partition(":")[0] for name in axis.split("-")]
    return frozenset(name for name in names if layout.size(name) > 1)
