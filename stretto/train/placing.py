"""Where stages lie and which layers they hold, where the user leaves that to a search: before groups are made.

The costs are those of `--schedule-costs`, where the file is there, else an estimate. Rank 0 searches and tells all, so
that the ranks cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from stretto.arguments import Resolved
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.tree import get, put
from stretto.checkpoint.peers import Peers
from stretto.estimate import stage_counts, stage_pieces
from stretto.layout import Shape
from stretto.schedule import Cost
from stretto.schedule.pieces import cost_for, pieces_in
from stretto.schedule.placements import PLACEMENTS, Placed, layers_under, quickest, search_layers, search_placements
from stretto.train.consensus import RunRejectedError
from stretto.train.costs_file import costs_text
from stretto.world import World

WORTH: Final = 0.02
"""More stages on a rank must make a step shorter by so much: each has overheads that no cost counts."""


def placed(resolved: Resolved, world: World) -> Resolved:
    """The run with its stages where a search finds them best; all ranks together. Raises RunRejectedError on all."""
    args = resolved.args
    places = placements(resolved)
    if args.parallel.pp == 1 or (len(places) == 1 and not _searches_layers(args)):
        return resolved
    said = Peers.of(world, None).gather(_said(args, places) if world.rank == 0 else None)
    found: dict[str, Any] = json.loads(said[0] or "{}")
    if "problem" in found:
        raise RunRejectedError(found["problem"])
    layers = tuple(found["layers"]) if found["layers"] else None
    return with_stages(resolved, found["vpp"], found["shape"], layers, found["why"])


def with_stages(r: Resolved, vpp: int, shape: Shape, layers: tuple[float, ...] | None, why: str) -> Resolved:
    """The run with so many stages on a rank, of these layers where they are not None.

    They are derived values, so that a run that goes on from this one finds its own.
    """
    found: dict[str, Value] = {"parallel.vpp": vpp, "parallel.vpp_shape": shape}
    found |= {"parallel.stage_layers": layers} if layers else {}
    args, sources = r.args, dict(r.sources)
    for path, value in found.items():
        if get(args, path) != value or path == "parallel.stage_layers":
            args, sources[path] = put(args, path, value), Source(SourceKind.DERIVED, why)
    return replace(r, args=args, sources=sources, layout=args.parallel.layout)


def placements(resolved: Resolved) -> list[tuple[int, Shape]]:
    """Those that the user leaves open: stages on a rank, and their shape."""
    p, sources = resolved.args.parallel, resolved.sources
    said_v, said_shape = (
        sources[path].kind is not SourceKind.DERIVED for path in ("parallel.vpp", "parallel.vpp_shape")
    )
    own = (p.stages_per_rank, p.shape)
    if p.schedule != "auto" or p.stage_layers is not None:
        return [own]
    return [each for each in PLACEMENTS if _fits(each, own, said_v, said_shape)] or [own]


def _fits(place: tuple[int, Shape], own: tuple[int, Shape], said_v: bool, said_shape: bool) -> bool:
    return not (said_v and place[0] != own[0]) and not (said_shape and place[1] != own[1])


def _searches_layers(args: Arguments) -> bool:
    return args.parallel.partition == "searched" and args.parallel.stage_layers is None


def _said(args: Arguments, places: Sequence[tuple[int, Shape]]) -> str:
    try:
        text = costs_text(args)
        best = place(args, places, text)
    except (ValueError, OSError) as error:
        return json.dumps({"problem": str(error)})
    why = f"searched by {'an estimate' if text is None else args.parallel.schedule_costs}: {best}"
    return json.dumps({"vpp": best.v, "shape": best.shape, "layers": best.layers, "why": why})


def place(args: Arguments, places: Sequence[tuple[int, Shape]], text: str | None) -> Placed:
    """The best of these placements, by the costs in the text of a file. Raises ValueError where there is none."""
    p, name = args.parallel, args.parallel.schedule_costs or ""
    m, estimated = args.batch.microbatches(p.dp), stage_pieces(args)
    if _searches_layers(args):
        pieces = estimated if text is None else pieces_in(text, name, estimated.shares)
        pieces = replace(pieces, barrier=estimated.barrier)
        if p.schedule != "auto":
            return layers_under(p.schedule, pieces, args.model.layers, p.pp, *places[0], m)
        return quickest(
            [search_layers(pieces, args.model.layers, p.pp, v, m, shape, p.schedule_memory) for v, shape in places],
            worth=WORTH,
        )

    def cost(v: int, shape: Shape) -> Cost | None:
        there = replace(args, parallel=replace(p, vpp=v, vpp_shape=shape))
        layers = stage_counts(there)
        if text is None:
            return estimated.cost(layers)
        try:
            return replace(cost_for(text, name, layers, estimated.shares), barrier=estimated.barrier)
        except ValueError:
            if len(places) == 1:
                raise
            return None

    return quickest(search_placements(p.pp, m, cost, memory=p.schedule_memory, placements=places), worth=WORTH)
