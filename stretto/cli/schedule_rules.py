"""What `stretto schedule` rejects before it makes a schedule."""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from stretto.arguments.context_rules import MOST_PLANNED

if TYPE_CHECKING:
    from stretto.cli.schedule import Command

_READ_BY: Final = MappingProxyType(
    {"out": ("draw", "search"), "measured": ("draw",)}
    | dict.fromkeys(("layers", "head", "embedding", "attention", "exact"), ("search",))
)
"""Options that not every command reads."""


def require_bounded(said: Command) -> None:
    """Raise ValueError for more actions than a run would plan: they would take all memory."""
    if (size := said.pp * (said.vpp or 1) * said.microbatches) > MOST_PLANNED:
        raise ValueError(
            f"--pp * --vpp * --microbatches = {said.pp} * {said.vpp or 1} * {said.microbatches} = {size:,} forwards, "
            f"must be <= {MOST_PLANNED:,}"
        )


def require_read(said: Command) -> None:
    """Raise ValueError for an option that would be without effect."""
    defaults = {each.name: each.default for each in fields(said)}
    for name, commands in _READ_BY.items():
        if getattr(said, name) != defaults[name] and said.what not in commands:
            raise ValueError(f"{said.what} does not read --{name}, which is for {' and '.join(commands)}")
    if said.memory is not None and said.what not in ("search", "list") and "auto" not in said.schedule:
        raise ValueError("--memory is for search and for the schedule auto: what any other holds is fixed")
