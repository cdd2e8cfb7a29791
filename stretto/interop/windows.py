"""The fields of a `config.json` for windows of attention, as settings of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stretto.interop.family import Family
from stretto.interop.rope import LOCAL, WHOLE

FULL, SLIDING = WHOLE, LOCAL


def window_settings(
    raw: Mapping[str, Any], family: Family, layers: int, wrong: list[str]
) -> tuple[int | None, tuple[int, ...]]:
    """The size of the windows, and the layers without one; what is not supported goes to `wrong`, by its name."""
    kinds, size = _kinds(raw, family, layers, wrong), raw.get("sliding_window", family.defaults.get("sliding_window"))
    if family.windows == "switched":
        used = raw.get("use_sliding_window", False)
        if not isinstance(used, bool):
            wrong.append(f"use_sliding_window = {used!r:.60}: must be true or false")
        size = size if used is True else None
    whole = tuple(n for n, kind in enumerate(kinds) if kind == FULL)
    if size is None or len(whole) == layers:
        if size is None and SLIDING in kinds and "layer_types" in raw:
            wrong.append("sliding_window is unset, but layer_types has layers with one")
        return None, ()
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < 1 << 31:
        wrong.append(f"sliding_window = {size!r:.60}: must be a whole number above 0")
        return None, ()
    return size, whole


def _kinds(raw: Mapping[str, Any], family: Family, layers: int, wrong: list[str]) -> Sequence[str]:
    """What each layer attends to."""
    said = raw.get("layer_types")
    if family.windows == "none":
        return [FULL] * layers
    if said is not None:
        if not isinstance(said, list) or len(said) != layers or not all(kind in (FULL, SLIDING) for kind in said):
            wrong.append(f"layer_types: must name {FULL} or {SLIDING} for each of {layers} layers")
            return [FULL] * layers
        return said
    if family.windows == "all":
        return [SLIDING] * layers
    if family.windows == "switched":
        first = raw.get("max_window_layers", family.defaults.get("max_window_layers"))
        return [SLIDING if n >= (28 if first is None else first) else FULL for n in range(layers)]
    every = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", family.every))
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        wrong.append(f"sliding_window_pattern = {every!r:.60}: must be a whole number above 0")
        every = family.every
    return [SLIDING if (n + 1) % every else FULL for n in range(layers)]
