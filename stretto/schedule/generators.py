"""Schedules by name. A generator decides order alone; messages and weights come later, by `lower`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from stretto.schedule.actions import Action, Op
from stretto.schedule.ir import Schedule


def gpipe(p: int, m: int) -> Schedule:
    """All forwards, then all backwards, over p stages and m microbatches (Huang et al. 2019).

    Every rank holds the activations of all m microbatches at the turn.
    """
    _check_sizes(p, m)

    def rank(stage: int) -> tuple[Action, ...]:
        return (*_microbatches(stage, Op.F, m), *_microbatches(stage, Op.B, m))

    return Schedule(tuple(range(p)), m, tuple(map(rank, range(p))))


def one_f_one_b(p: int, m: int) -> Schedule:
    """One forward, one backward in turn, after a warm-up (PipeDream-flush, Narayanan et al. 2021).

    The bubble of GPipe, but rank r holds the activations of at most p - r microbatches.
    """
    _check_sizes(p, m)

    def rank(stage: int) -> tuple[Action, ...]:
        # The first backward reaches this stage after p - stage - 1 further forwards have left it.
        warmup = min(p - stage - 1, m)
        forwards, backwards = _microbatches(stage, Op.F, m), _microbatches(stage, Op.B, m)
        steady = (a for pair in zip(forwards[warmup:], backwards, strict=False) for a in pair)
        return (*forwards[:warmup], *steady, *backwards[m - warmup :])

    return Schedule(tuple(range(p)), m, tuple(map(rank, range(p))))


def forward_only(p: int, m: int) -> Schedule:
    """Every microbatch forward through p stages, none back: evaluation. `lower` it; `check` would miss backwards."""
    _check_sizes(p, m)
    return Schedule(tuple(range(p)), m, tuple(_microbatches(stage, Op.F, m) for stage in range(p)))


GENERATORS: Final[Mapping[str, Callable[[int, int], Schedule]]] = MappingProxyType(
    {"1f1b": one_f_one_b, "gpipe": gpipe}
)


def schedule_for(name: str, p: int, m: int) -> Schedule:
    """The schedule of this name for p pipeline ranks and m microbatches."""
    if name not in GENERATORS:
        raise ValueError(f"no schedule is named {name!r}; there are: {', '.join(sorted(GENERATORS))}")
    return GENERATORS[name](p, m)


def _microbatches(stage: int, op: Op, m: int) -> tuple[Action, ...]:
    return tuple(Action(stage, op, mb) for mb in range(m))


def _check_sizes(p: int, m: int) -> None:
    if p < 1 or m < 1:
        raise ValueError(f"a pipeline of {p} ranks and {m} microbatches: both must be at least 1")
