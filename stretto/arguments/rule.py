"""What a rule is made of. It says settings by their names, `tp` for `parallel.tp`, as the command line does.

A rule looks at complete arguments (types and ranges already right, derived values filled in) and returns None, or
`RuleViolation`: the equation with its numbers, and candidates for each setting that could fix it. It is a function
(`rule`), or a sentence and what must hold for it (`require`): settings that do not go together (`clash`, `clashes`),
one that is no more than another (`ordered`), or its multiple (`divisible`); each where a condition holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Final

from stretto.arguments.errors import as_text
from stretto.arguments.nearby import divisors, multiples, sizes
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, paths, settings

Nearby = Mapping[str, Sequence[Value]]
"""Candidate values for the settings at these paths, nearest first."""

Key = tuple[str, tuple[str, ...]]
"""A rule and the fields that break it."""

HAS_EFFECT: Final = "has_effect"
"""The rule that a setting, the first field, is not set in vain."""


@dataclass(frozen=True)
class RuleViolation:
    """How a rule is broken, and candidates that may fix it, not yet known which do; `validate` adds whose it is."""

    problem: str
    nearby: Nearby
    rule: str = ""
    fields: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """Equal for two of the same mistake: a setting without effect stays one, with fewer reasons too."""
        return self.rule, self.fields[:1] if self.rule == HAS_EFFECT else self.fields


Check = Callable[[Arguments], RuleViolation | None]


@dataclass(frozen=True)
class Rule:
    """One rule: its name, the fields that it reads, its meaning and its check; a part of one has the two in between."""

    fields: tuple[str, ...]
    check: Check
    meaning: str = ""
    name: str = ""


def rules_in(*modules: ModuleType) -> tuple[Rule, ...]:
    """Every rule of these modules, in the order of the text: a new one is a function or a value, and nothing else."""
    found = (each for module in modules for each in vars(module).items())
    return tuple(replace(each, name=name) for name, each in found if isinstance(each, Rule) and each.meaning)


def violation(problem: str, **nearby: Sequence[Value]) -> RuleViolation:
    """A violation with candidates for settings by name."""
    return RuleViolation(problem, {paths()[name]: values for name, values in nearby.items()})


def rule(reads: str) -> Callable[[Check], Rule]:
    """Make a rule of the function below, which reads these settings; its docstring is the meaning."""
    return lambda check: Rule(fields_of(*reads.split()), check, (check.__doc__ or "").strip())


def require(meaning: str, *parts: Rule) -> Rule:
    """The rule that all parts hold; the first that does not is told."""

    def check(a: Arguments) -> RuleViolation | None:
        return next((found for part in parts if (found := part.check(a)) is not None), None)

    return Rule(_together(*(part.fields for part in parts)), check, meaning)


class Expression:
    """An expression over settings by name, `tp > 1 and sequence_parallel`: code of ours, and nobody else's.

    `fields` are the settings that it reads.
    """

    def __init__(self, text: str) -> None:
        self._code = compile(text, text, "eval")
        self.fields = fields_of(*self._code.co_names)

    def __call__(self, a: Arguments) -> Any:
        return eval(self._code, {"__builtins__": {}}, _Values(a))


class _Values(dict[str, Value]):
    """The value of each setting by its name, looked up when it is asked for."""

    def __init__(self, args: Arguments) -> None:
        self._args = args

    def __missing__(self, name: str) -> Value:
        return get(self._args, paths()[name])


def clash(problem: str, when: str = "True", **to: Sequence[Value]) -> Rule:
    """Broken where `when` holds and no setting of `to` has one of its values there, which are what to set."""
    fixes, holds = violation("", **to).nearby, Expression(when)

    def check(a: Arguments) -> RuleViolation | None:
        wrong = holds(a) and not any(get(a, path) in values for path, values in fixes.items())
        return RuleViolation(told(problem, a), fixes) if wrong else None

    return Rule(_together(named_in(problem), fields_of(*to), holds.fields), check)


def clashes(problem: str, *parts: Rule, **to: Sequence[Value]) -> Rule:
    """The same of a setting that goes with none of several, all of which are told, in the place of `...`."""
    whole = clash(problem, "True", **to)

    def check(a: Arguments) -> RuleViolation | None:
        found = whole.check(a)
        wrong = [one for part in parts if found is not None and (one := part.check(a)) is not None]
        if found is None or not wrong:
            return None
        nearby = {path: values for each in (*wrong, found) for path, values in each.nearby.items()}
        return RuleViolation(found.problem.replace("...", "; ".join(each.problem for each in wrong)), nearby)

    return Rule(_together(whole.fields, *(part.fields for part in parts)), check)


def ordered(equation: str, when: str = "True", **to: str) -> Rule:
    """`min_lr <= lr` where `when` holds and all have a value; what could fix it are the values of the expressions `to`.

    The left side may be a sum, whose value is told.
    """
    left, sign, right = re.split(" ([<>]=?) ", equation)
    holds, asked, total = Expression(equation), Expression(when), Expression(left)
    ways = {name: Expression(text) for name, text in to.items()}

    def check(a: Arguments) -> RuleViolation | None:
        if None in (get(a, path) for path in holds.fields) or holds(a) or not asked(a):
            return None
        value = f" = {total(a)}" if len(total.fields) > 1 else ""
        near = {name: _short(way(a)) for name, way in ways.items()}
        return violation(
            told(f"{{{left}}}{value}, must be {sign} {{{right}}}", a),
            **{name: (x,) for name, x in near.items() if x in settings()[paths()[name]].bounds},
        )

    return Rule(_together(holds.fields, asked.fields), check)


def _short(number: Any) -> Any:
    return float(f"{number:g}") if isinstance(number, float) else number


def divisible(value: str, by: str, when: str = "True", **to: Sequence[Value]) -> Rule:
    """One setting is a multiple of another where `when` holds and both have a value; `to` are further ways out."""
    holds = Expression(when)

    def check(a: Arguments) -> RuleViolation | None:
        n, of = get(a, paths()[value]), get(a, paths()[by])
        if not isinstance(n, int) or not isinstance(of, int) or n % of == 0 or not holds(a):
            return None
        around = multiples if value in ("heads", "kv_heads", "experts") else sizes
        near: dict[str, Sequence[Value]] = {value: around(n, of), by: divisors(n, of)}
        return violation(f"{told(f'{{{value} % {by}}}', a)} = {n % of}, must be 0", **near, **to)

    return Rule(_together(fields_of(value, by, *to), holds.fields), check)


def told(text: str, a: Arguments) -> str:
    """A text with numbers: `{tp}` becomes `tp = 2`, `{hidden / heads}` becomes `hidden / heads = 256 / 8`."""
    return _BRACES.sub(lambda said: f"{said[1]} = {_NAME.sub(lambda name: _number(a, name[0]), said[1])}", text)


def _number(a: Arguments, name: str) -> str:
    value = get(a, paths()[name])
    if value is None or value == ():
        return "unset" if value is None else "none"
    return f"{value:g}" if isinstance(value, float) else as_text(value)


_BRACES, _NAME = re.compile(r"\{([^{}]+)\}"), re.compile(r"[a-z]\w*")


def named_in(text: str) -> tuple[str, ...]:
    """The paths of the settings whose numbers `told` puts into a text."""
    return fields_of(*(name for said in _BRACES.findall(text) for name in _NAME.findall(said)))


def fields_of(*names: str) -> tuple[str, ...]:
    """The paths of these settings, each once."""
    return tuple(dict.fromkeys(paths()[name] for name in names))


def _together(*fields: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for each in fields for path in each))
