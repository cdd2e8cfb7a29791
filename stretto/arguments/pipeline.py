"""How many stages a rank of the pipeline holds, and in which shape: what the schedule of this name wants."""

from __future__ import annotations

from dataclasses import replace

from stretto.arguments.schema import ParallelConfig
from stretto.layout import Layout, Shape
from stretto.layout.schedules import FAMILIES


def vpp_of(p: ParallelConfig) -> int:
    """Stages on each rank: as said, or as many as the schedule has by itself."""
    return FAMILIES[p.schedule].stages if p.vpp is None else p.vpp


def num_stages(p: ParallelConfig) -> int:
    """Stages of the whole pipeline."""
    return p.pp * vpp_of(p)


def shape_of(p: ParallelConfig) -> Shape:
    """How they lie on the ranks."""
    return p.vpp_shape or FAMILIES[p.schedule].shape_of(vpp_of(p))


def with_stages_of(p: ParallelConfig, layout: Layout) -> ParallelConfig:
    """The schedule where it has as many stages on a rank as the layout, in its shape; else 1F1B over single stages."""
    made = FAMILIES[p.schedule]
    fits = (layout.vpp == made.stages or made.any_stages) and layout.shape in made.shapes(layout.vpp)
    return replace(p, schedule=p.schedule if fits else "1f1b", vpp=layout.vpp, vpp_shape=layout.shape)
