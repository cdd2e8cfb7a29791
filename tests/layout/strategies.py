"""Layouts to draw from: every split of up to 64 ranks, in every order."""

from __future__ import annotations

from itertools import permutations
from math import prod

from hypothesis import strategies as st

from stretto.layout import Layout, Size

ORDERS = ["-".join(order) for order in permutations(("tp", "cp", "ep", "dp", "pp"))]


@st.composite
def layouts(draw: st.DrawFn, most: int = 64) -> Layout:
    """Any layout of up to `most` ranks that is not rejected, with levels, experts and virtual stages."""
    sizes: dict[str, Size] = {}
    left = most
    for axis in draw(st.permutations(("tp", "cp", "dp", "pp"))):
        size = draw(st.integers(1, left))
        left //= size
        sizes[axis] = size
    for axis in ("dp", "cp"):
        size = sizes[axis]
        assert isinstance(size, int)
        inner = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        if draw(st.booleans()):
            sizes[axis] = (inner, size // inner)
    order = draw(st.sampled_from(ORDERS))
    stage = prod(prod(s) if isinstance(s, tuple) else s for axis, s in sizes.items() if axis != "pp")
    etp = draw(st.sampled_from([d for d in range(1, stage + 1) if stage % d == 0]))
    ep = draw(st.sampled_from([d for d in range(1, stage // etp + 1) if stage // etp % d == 0]))
    sizes["vpp"] = draw(st.integers(1, 3))
    shape = "loop" if sizes["vpp"] == 1 else draw(st.sampled_from(["loop", "v"]))
    try:
        return Layout.of(**sizes, ep=ep, etp=etp, order=order, shape=shape)  # type: ignore[arg-type]
    except ValueError:
        # Not all experts fit all orders; without experts every order must do.
        return Layout.of(**sizes, order=order, shape=shape)  # type: ignore[arg-type]
