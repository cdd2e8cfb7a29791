"""The same run in another layout, or otherwise changed."""

from __future__ import annotations

from dataclasses import replace

from stretto.arguments.compute_rules import without_graphs
from stretto.arguments.layers import Layer
from stretto.arguments.layout_rules import with_peers
from stretto.arguments.resolve import Resolved, resolve
from stretto.arguments.schema import Arguments, ParallelConfig
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.tree import get, settings
from stretto.layout import Layout
from stretto.layout.schedules import FAMILIES

AXES = ("tp", "cp", "dp", "pp", "ep", "etp")


def in_layout(args: Arguments, layout: Layout) -> Arguments:
    """`args` with the sizes of the layout; what then has no meaning (a split into other stages) is left out."""
    size = {axis: layout.size(axis) for axis in AXES}
    given, cut = args.parallel.stage_layers, args.parallel.sequence_parallel and layout.size("tp") > 1
    parallel = replace(
        _with_stages_of(args.parallel, layout),
        tp=size["tp"],
        cp=size["cp"],
        cp_comm=args.parallel.cp_comm if size["cp"] > 1 else ("auto",),
        cp_a2a=layout.size("cp.0") if "cp.0" in layout.axes else None,
        dp=size["dp"],
        pp=size["pp"],
        ep=size["ep"],
        etp=size["etp"],
        ep_comm_overlap=args.parallel.ep_comm_overlap and size["ep"] * size["etp"] > 1,
        dp_shard=layout.size("dp.0") if "dp.0" in layout.axes else None,
        sequence_parallel=cut,
        tp_comm_overlap=args.parallel.tp_comm_overlap if cut else None,
        stage_layers=given if given is not None and len(given) == size["pp"] * layout.vpp else None,
    )
    return graphed(with_peers(replace(args, parallel=parallel, run=replace(args.run, nproc=layout.world))))


def _with_stages_of(p: ParallelConfig, layout: Layout) -> ParallelConfig:
    """The schedule where it has as many stages on a rank as the layout, in its shape; else 1F1B over single stages."""
    made = FAMILIES[p.schedule]
    fits = (layout.vpp == made.stages or made.any_stages) and layout.shape in made.shapes(layout.vpp)
    return replace(p, schedule=p.schedule if fits else "1f1b", vpp=layout.vpp, vpp_shape=layout.shape)


def graphed(args: Arguments) -> Arguments:
    """`args` after a change: what was recorded as CUDA graphs still is only where it can be."""
    return replace(args, run=replace(args.run, cuda_graphs=bool(args.run.cuda_graphs) and not without_graphs(args)))


def validated_in(args: Arguments, layout: Layout) -> Resolved:
    """`args` in the layout, held against all rules. Raises ConfigError with everything that is wrong."""
    moved = in_layout(args, layout)
    values = {path: get(moved, path) for path in settings()}
    return resolve([Layer(Source(SourceKind.COMMAND_LINE), {path: v for path, v in values.items() if v is not None})])
