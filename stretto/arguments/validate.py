"""From what was said to complete arguments, and to every rule that they break. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stretto.arguments.derive import DERIVATIONS, OVERRIDES
from stretto.arguments.errors import as_text
from stretto.arguments.rule import Nearby
from stretto.arguments.rules import RULES
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.sources import DEFAULT, Source, SourceKind
from stretto.arguments.tree import build, get, put, settings


@dataclass(frozen=True)
class Said:
    """One value that somebody set."""

    value: Value
    source: Source


Key = tuple[str, tuple[str, ...]]
"""A rule and the fields that break it."""


@dataclass(frozen=True)
class Finding:
    """A broken rule, with candidates that may fix it; not yet known which of them do."""

    rule: str
    fields: tuple[str, ...]
    problem: str
    nearby: Nearby

    @property
    def key(self) -> Key:
        """Equal for two findings of the same mistake."""
        return self.rule, self.fields


@dataclass(frozen=True)
class Validation:
    """Arguments with every derivable value filled in, the source of each value, and what is wrong."""

    args: Arguments
    sources: Mapping[str, Source]
    findings: tuple[Finding, ...]


def validate(said: Mapping[str, Said], wrong: Iterable[str] = ()) -> Validation:
    """Complete the settings and hold them against the rules.

    Settings in `wrong` have no legal value: whatever depends on them is not judged, so that one mistake is
    reported once.
    """
    args = build({path: s.value for path, s in said.items()})
    sources = {path: said[path].source if path in said else DEFAULT for path in settings()}
    unknown = set(wrong)
    findings: list[Finding] = []

    for c in OVERRIDES:
        if unknown & {c.path, *c.to} or (conceded := c.equation(args)) is None:
            continue
        value, reason = conceded
        if sources[c.path].kind < max(sources[path].kind for path in c.to) and not sources[c.path].pinned:
            args, sources[c.path] = put(args, c.path, value), Source(SourceKind.DERIVED, reason)
        elif c.ineffective:
            problem = f"{c.path} = {as_text(get(args, c.path))} has no effect: {reason}"
            nearby: Nearby = {c.path: (settings()[c.path].default,)}
            findings.append(Finding("has_effect", (c.path, *c.to), problem, nearby))

    for d in DERIVATIONS:
        if get(args, d.path) is not None:
            continue
        if unknown & set(d.inputs):
            unknown.add(d.path)
        elif (derived := d.equation(args)) is not None:
            args, sources[d.path] = put(args, d.path, derived[0]), Source(SourceKind.DERIVED, derived[1])

    validated = ((rule, rule.check(args)) for rule in RULES if not unknown & set(rule.fields))
    findings.extend(Finding(r.name, r.fields, b.problem, b.nearby) for r, b in validated if b is not None)
    return Validation(args, sources, tuple(findings))
