"""A size in bytes, `20GB`, as `run.activation_budget` has it."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Final

_UNITS: Final = MappingProxyType({"": 1, "K": 1, "M": 2, "G": 3, "T": 4})


def bytes_of(size: str) -> int:
    """Of `20GB` (10^9), `20GiB` (2^30). Raises ValueError for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{size!r} is no size: say 20GB, 512MiB")
    unit = found[2].upper()
    scale = 1 if not unit else (1024 if found[3] else 1000) ** _UNITS[unit]
    return int(float(found[1]) * scale)
