"""What a run that goes on from a checkpoint may change, and what it may not: the tensors and the order of the data.

Pure. Layout, sharding, schedule and how a batch is split may change freely: they never change the model. What the user
has changed is told in one line; what would make the checkpoint another model's is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from stretto.arguments.errors import Violation, as_flag, as_text
from stretto.arguments.record import Record
from stretto.arguments.resolve import Resolved
from stretto.arguments.tree import settings

FREE_OF_MODEL: Final = frozenset({"model.init_std", "model.dropout"})
"""Settings of the model that leave its tensors and what they mean alone."""

FIXED: Final = MappingProxyType(
    {
        "optimizer.optimizer": "its state is that of another update rule",
        "optimizer.moments": "its moments are in another dtype",
        "batch.seq_len": "the place in the data counts samples of that length",
        "run.seed": "the order of the data follows from it",
    }
)

SAID_ELSEWHERE: Final = frozenset({"run.nproc", "run.device", "run.peak_tflops", "run.threads", "checkpoint.init_from"})

Values = tuple[Any, Any]


def changes(record: Record, run: Resolved) -> dict[str, Values]:
    """The settings by path that differ between a record and the run that goes on, with what was and what is.

    What was derived from other settings, and is, follows them. A record of another version may lack settings, too.
    """
    now, before = run.record(), record.arguments
    found = {}
    for path, s in settings().items():
        section, _, name = path.partition(".")
        body, value = before.get(section, {}), now.arguments[section][name]
        follows = path in record.derived and path in now.derived
        compared = (s.carried or section == "parallel") and not follows
        if compared and name in body and body[name] != value:
            found[path] = (body[name], value)
    return found


def forbidden(changed: Mapping[str, Values], name: str) -> list[Violation]:
    """A violation for each change that the checkpoint called `name` does not allow, with both values."""
    found = []
    for path, (then, now) in changed.items():
        model = path.startswith("model.") and path not in FREE_OF_MODEL and None not in (then, now)
        why = "its tensors are those of another model" if model else FIXED.get(path)
        if path == "run.dtype" and "fp64" in (then, now):
            why = "masters in fp64 are not masters in fp32"
        if why is not None:
            kept = tuple(then) if isinstance(then, list) else then
            problem = f"{path} was {_text(then)} in {name}, is {_text(now)}: {why}"
            hint = f"leave {as_flag(path, now).split()[0]} out to go on, or --resume out to begin anew"
            found.append(Violation("resume", (path,), problem, fixes=({path: kept},), hint=hint))
    return found


def told(changed: Mapping[str, Values]) -> str | None:
    """All changes that are allowed, in one line; None where there are none."""
    said = [f"{p} {_text(a)} is now {_text(b)}" for p, (a, b) in changed.items() if p not in SAID_ELSEWHERE]
    return "; ".join(said) or None


def _text(value: Any) -> str:
    return as_text(tuple(value) if isinstance(value, list) else value) if not isinstance(value, dict) else f"{value}"
