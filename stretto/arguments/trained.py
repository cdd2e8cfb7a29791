"""Which parameters of a run are trained, by their names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

from stretto.arguments.sections import TuningConfig

A, B = "lora_A", "lora_B"
_ADAPTER: Final = (f".{A}", f".{B}")


def is_adapter(name: str) -> bool:
    """Whether a logical name is that of an adapter's matrix."""
    return name.endswith(_ADAPTER)


def is_trained(name: str, tuning: TuningConfig) -> bool:
    """Whether the parameter of that logical name has a gradient."""
    return is_adapter(name) if tuning.lora_rank else not any(fnmatchcase(name, pattern) for pattern in tuning.freeze)


def has_adapter(matrix: str, tuning: TuningConfig) -> bool:
    """Whether matrices of that name, such as q_proj, have one."""
    return tuning.lora_rank > 0 and matrix.removesuffix("_proj") in tuning.lora_targets
