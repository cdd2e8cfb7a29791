"""From what was said to complete arguments, and to every rule that they break. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from stretto.arguments import (
    compute_rules,
    context_rules,
    exact_rules,
    layout_rules,
    model_rules,
    tuning_rules,
    update_rules,
)
from stretto.arguments.derive import DERIVATIONS, OVERRIDES
from stretto.arguments.errors import as_text
from stretto.arguments.rule import HAS_EFFECT, Nearby, Rule, RuleViolation, rules_in
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.sources import DEFAULT, Source, SourceKind
from stretto.arguments.tree import build, get, put, settings

RULES: tuple[Rule, ...] = rules_in(
    layout_rules, model_rules, context_rules, update_rules, compute_rules, tuning_rules, exact_rules
)
"""All rules that settings must obey together."""


@dataclass(frozen=True)
class Said:
    """One value that somebody set."""

    value: Value
    source: Source


@dataclass(frozen=True)
class Validation:
    """Arguments with every derivable value filled in, the source of each value, and what is wrong."""

    args: Arguments
    sources: Mapping[str, Source]
    findings: tuple[RuleViolation, ...]


def validate(said: Mapping[str, Said], wrong: Iterable[str] = ()) -> Validation:
    """Complete the settings and hold them against the rules.

    Settings in `wrong` have no legal value: whatever depends on them is not judged, so that one mistake is
    reported once.
    """
    args = build({path: s.value for path, s in said.items()})
    sources = {path: said[path].source if path in said else DEFAULT for path in settings()}
    strength = {path: source.kind for path, source in sources.items()}
    unknown = set(wrong)
    vain: dict[str, RuleViolation] = {}

    for c in OVERRIDES:
        if unknown & {c.path, *c.inputs} or (conceded := c.equation(args)) is None:
            continue
        value, reason = conceded
        strongest = max(strength[path] for path in c.inputs)
        if strength[c.path] < strongest and not sources[c.path].pinned:
            args, sources[c.path] = put(args, c.path, value), Source(SourceKind.DERIVED, reason)
            strength[c.path] = strongest  # what gives way to that in turn, gives way to the same
        elif c.ineffective:
            problem = f"{c.path} = {as_text(get(args, c.path))} has no effect: {reason}"
            nearby: Nearby = {c.path: (settings()[c.path].default,), **c.ways}
            one = RuleViolation(problem, nearby, HAS_EFFECT, (c.path, *c.inputs))
            vain[c.path] = _with_another_reason(vain[c.path], one, reason) if c.path in vain else one

    for d in DERIVATIONS:
        if get(args, d.path) is not None:
            continue
        if unknown & set(d.inputs):
            unknown.add(d.path)
        elif (derived := d.equation(args)) is not None:
            args, sources[d.path] = put(args, d.path, derived[0]), Source(SourceKind.DERIVED, derived[1])

    validated = ((rule, rule.check(args)) for rule in RULES if not unknown & set(rule.fields))
    findings = [*vain.values()]
    findings += (replace(found, rule=r.name, fields=r.fields) for r, found in validated if found is not None)
    return Validation(args, sources, tuple(findings))


def _with_another_reason(told: RuleViolation, found: RuleViolation, reason: str) -> RuleViolation:
    """A setting that is in vain for two reasons is one mistake."""
    fields = tuple(dict.fromkeys((*told.fields, *found.fields)))
    return RuleViolation(f"{told.problem}; {reason}", {**told.nearby, **found.nearby}, told.rule, fields)
