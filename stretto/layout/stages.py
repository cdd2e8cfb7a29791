"""Which pipeline rank holds which stage, when a rank holds one or several (virtual stages)."""

from __future__ import annotations

from typing import Literal, get_args

Shape = Literal["loop", "v"]
"""How the stages of a model pass along the pipeline more than once: from the start each time, or to and fro."""


def placement(pp: int, vpp: int = 1, shape: Shape = "loop") -> tuple[int, ...]:
    """The pipeline rank of each of the pp * vpp stages.

    A loop begins each pass at rank 0: 0 1 2 3 0 1 2 3 (interleaved 1F1B, Narayanan et al. 2021). A v turns at the
    ends: 0 1 2 3 3 2 1 0, so that the first and the last stage share a rank (ZB-V, Qi et al. 2024).
    """
    there = tuple(range(pp))
    return tuple(rank for turn in range(vpp) for rank in (there[::-1] if shape == "v" and turn % 2 else there))


def check_stages(vpp: int, shape: str) -> list[str]:
    """What is wrong with so many stages to a rank, or with their shape."""
    problems = []
    if type(vpp) is not int or vpp < 1:
        problems.append(f"vpp={vpp!r}: the number of stages on a rank is a whole number of at least 1")
    elif shape == "v" and vpp == 1:
        problems.append("shape='v' has no effect with one stage on a rank; take vpp=2, or leave it out")
    if shape not in get_args(Shape):
        problems.append(f"shape={shape!r}: stages go in a {' or a '.join(map(repr, get_args(Shape)))}")
    return problems
