"""`rule` makes a rule of a function; `RuleViolation` is what it finds.

A rule looks at complete arguments (types and ranges already right, derived values filled in) and returns
None, or `RuleViolation`: the equation with its numbers, and candidates for each field that could fix it. Its name
is the function's name, its meaning the docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from stretto.arguments.nearby import divisors, multiples, sizes
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get

Nearby = dict[str, Sequence[Value]]
"""Candidate values for single fields, nearest first."""


@dataclass(frozen=True)
class RuleViolation:
    """How a rule is broken, and what could fix it."""

    problem: str
    nearby: Nearby


def rules_in(*modules: ModuleType) -> tuple[Rule, ...]:
    """Every rule of these modules, in the order of the text: a new one is a function, and nothing else."""
    found = (each for module in modules for each in vars(module).items())
    return tuple(replace(each, name=name) for name, each in found if isinstance(each, Rule))


def divisible(path: str, by: str, meaning: str) -> Rule:
    """The rule that one setting is a multiple of another, where both have a value."""

    def check(a: Arguments) -> RuleViolation | None:
        value, n = get(a, path), get(a, by)
        return divides(path, value, by, n) if isinstance(value, int) and isinstance(n, int) else None

    return Rule("", (path, by), meaning, check)


def divides(path: str, value: int, by_path: str, by: int) -> RuleViolation | None:
    """`value` must be a multiple of `by`."""
    if value % by == 0:
        return None
    name, by_name = path.rpartition(".")[2], by_path.rpartition(".")[2]
    around = multiples if name in ("heads", "kv_heads", "experts") else sizes
    return RuleViolation(
        f"{name} % {by_name} = {value} % {by} = {value % by}, must be 0",
        {path: around(value, by), by_path: divisors(value, by)},
    )


Check = Callable[[Arguments], RuleViolation | None]


@dataclass(frozen=True)
class Rule:
    """One rule: its name, the fields that it reads, its meaning and its check."""

    name: str
    fields: tuple[str, ...]
    meaning: str
    check: Check


def rule(*fields: str) -> Callable[[Check], Rule]:
    """Make a rule over `fields` of the function below."""

    def declare(check: Check) -> Rule:
        return Rule(check.__name__, fields, (check.__doc__ or "").strip(), check)

    return declare
