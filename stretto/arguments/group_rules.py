"""Rules over the order of the axes, and over what is said of the process groups of single axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import cast

from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, put
from stretto.layout import DEFAULT_ORDER, Layout


@rule("parallel.order", "parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp")
def order_has_every_axis(a: Arguments) -> RuleViolation | None:
    """The order names each axis of more than one rank once, and no other word."""
    p = a.parallel
    try:
        Layout.of(tp=p.tp, cp=p.cp, pp=p.pp, dp=p.dp or 1, order=p.order)
    except ValueError as error:
        return RuleViolation("; ".join(str(error).splitlines()), {"parallel.order": (DEFAULT_ORDER,)})
    return None


_PER_AXIS = ("groups.timeouts", "groups.gloo", "nccl.high_priority", "nccl.min_ctas", "nccl.max_ctas")


@rule(*_PER_AXIS, "parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp")
def groups_have_peers(a: Arguments) -> RuleViolation | None:
    """What is said of the groups of an axis has no effect where the axis has one rank."""
    alone: set[str] = set()
    nearby: dict[str, Sequence[Value]] = {}
    for path in _PER_AXIS:
        said, kept = _said(a, path), _kept(a, path)
        if len(kept) < len(said):
            alone |= {_axis(entry) for entry in said if entry not in kept}
            nearby[path] = (cast(Value, kept),)
    if not alone:
        return None
    return RuleViolation(
        f"{', '.join(f'{axis} = {_size(a, axis)}' for axis in sorted(alone))}: there are no groups", nearby
    )


def with_peers(a: Arguments) -> Arguments:
    """The same run, where nothing is said of the groups of an axis of one rank."""
    for path in _PER_AXIS:
        a = put(a, path, cast(Value, _kept(a, path)))
    return a


_Entry = str | tuple[str, int]


def _said(a: Arguments, path: str) -> tuple[_Entry, ...]:
    return cast("tuple[_Entry, ...]", get(a, path))


def _kept(a: Arguments, path: str) -> tuple[_Entry, ...]:
    """What a setting says of axes of several ranks."""
    return tuple(entry for entry in _said(a, path) if _size(a, _axis(entry)) > 1)


def _axis(entry: _Entry) -> str:
    return entry if isinstance(entry, str) else entry[0]


def _size(a: Arguments, axis: str) -> int:
    """Ranks along an axis, as in dp or dp-cp; a middle stage has no peer on `embed`, the first and the last have."""
    if axis == "embed":
        return min(2, a.parallel.pp)
    return prod(getattr(a.parallel, name) or 1 for name in axis.split("-"))


@rule("groups.gloo", "nccl.high_priority", "nccl.min_ctas", "nccl.max_ctas")
def gloo_is_not_nccl(a: Arguments) -> RuleViolation | None:
    """What is said of NCCL has no effect on the groups of an axis that run over Gloo."""
    said = {*a.nccl.high_priority, *dict(a.nccl.min_ctas), *dict(a.nccl.max_ctas)}
    both = said & set(a.groups.gloo)
    if not both:
        return None
    kept = tuple(axis for axis in a.groups.gloo if axis not in both)
    return RuleViolation(f"{', '.join(sorted(both))}: options of NCCL have no effect on Gloo", {"groups.gloo": (kept,)})


@rule("nccl.min_ctas", "nccl.max_ctas")
def thread_blocks_have_a_range(a: Arguments) -> RuleViolation | None:
    """A group has at least as many thread blocks at most as at least."""
    most = dict(a.nccl.max_ctas)
    wrong = {axis: least for axis, least in a.nccl.min_ctas if least > most.get(axis, least)}
    if not wrong:
        return None
    raised = tuple((axis, wrong.get(axis, limit)) for axis, limit in a.nccl.max_ctas)
    said = ", ".join(f"{axis}: min_ctas = {least}, must be <= max_ctas = {most[axis]}" for axis, least in wrong.items())
    return RuleViolation(said, {"nccl.max_ctas": (raised,)})
