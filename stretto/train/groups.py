"""What the arguments say of process groups."""

from __future__ import annotations

from stretto.arguments.schema import Arguments
from stretto.estimate.context import comm_of
from stretto.estimate.sizes import exchanged_bytes, local_tokens
from stretto.estimate.workspace import exchanges_by_copy_engines
from stretto.layout import Layout
from stretto.parallel_state import GroupOptions, ParallelState, default_axes
from stretto.parallel_state.plan import Axes
from stretto.parallel_state.state import Tracer
from stretto.train.dtypes import DTYPES
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
    gather: tuple[Axes, ...] = ((f"{inner}:gather", "cp"),) if args.parallel.sharding != "none" else ()
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
    peer_buffer, buffers = (
        _peer_buffer_size(args),
        {
            "cp": _keys_and_values(args),
            "etp-ep": _rows_of_experts(args),
        },
    )
    options = {}
    reached = args.parallel.dp_copy_engines and args.parallel.sharding != "none" and args.run.device != "cpu"
    for names in axes_of(args, layout):
        axis = "-".join(names)
        wide = _wide(layout, axis)
        found = GroupOptions(
            timeout=timeouts.get(wide),
            backend="gloo" if wide in over_gloo else None,
            high_priority=wide in urgent,
            min_ctas=fewest.get(wide),
            max_ctas=most.get(wide),
            peer_buffer=None if wide in over_gloo else peer_buffer if wide == {"tp"} else buffers.get(axis),
            peer_memory=reached and "dp" in wide and not wide & over_gloo and set(wide) <= {"dp", "cp"},
        )
        if wide and found != GroupOptions():
            options[axis] = found
    return options


def _peer_buffer_size(args: Arguments) -> int | None:
    """Bytes of what a tensor-parallel rank reads of another in one message: its part of [s, b, h]."""
    if not args.parallel.tp_comm_overlap:
        return None
    size = args.batch.seq_len * args.batch.micro_batch * args.model.hidden
    return size * DTYPES[args.run.dtype].itemsize // args.parallel.tp


def _keys_and_values(args: Arguments) -> int | None:
    """Bytes of what a context-parallel rank reads of another in one message, where copy engines bring all keys."""
    m, p = args.model, args.parallel
    gathers = p.cp > 1 and any(comm_of(args, layer) == "all-gather" for layer in range(m.layers))
    if args.run.device == "cpu" or not gathers:
        return None
    heads = 2 * max(1, m.num_kv_heads // p.tp) * m.dim_per_head
    return local_tokens(args) * heads * DTYPES[args.run.dtype].itemsize


def _rows_of_experts(args: Arguments) -> int | None:
    """Bytes of the rows that a rank sends to experts, for each of the others; of theirs it may read more or less."""
    if not exchanges_by_copy_engines(args):
        return None
    return -(-exchanged_bytes(args) // (args.parallel.ep * args.parallel.etp - 1))


def _wide(layout: Layout, axis: str) -> frozenset[str]:
    """The axes of more than one rank in a combination such as dp-cp; a channel, as in pp:0>1, is one of its axis."""
    names = [name.partition(":")[0] for name in axis.split("-")]
    return frozenset(name for name in names if layout.size(name) > 1)
