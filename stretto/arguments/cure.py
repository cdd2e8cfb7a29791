"""Ways out of a broken rule: changes near to what was said, each known to cure it and to break no other rule."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice

from stretto.arguments.errors import Violation, as_text
from stretto.arguments.judge import Finding, Judgement, Key, Said, judge
from stretto.arguments.rule import Nearby
from stretto.arguments.setting import Value
from stretto.arguments.sources import COMMAND_LINE
from stretto.arguments.tree import get, settings
from stretto.arguments.values import from_data

Change = Mapping[str, Value]

_MOST = 3
"""Ways out to offer: more would not be read."""

_WIDTH, _DEPTH, _PATIENCE = 16, 4, 400
"""Candidates for a field, fields to change at once, and configurations to try before giving up."""


def explain(said: Mapping[str, Said], wrong: Mapping[str, Value], found: Judgement) -> Iterator[Violation]:
    """The findings as violations, each with ways out."""
    for f in found.findings:
        given = tuple(
            f"{path} = {as_text(get(found.args, path))} ({found.sources[path]})"
            for path in f.fields
            if get(found.args, path) != ()
        )
        yield Violation(f.rule, f.fields, f.problem, given, cures(said, wrong, found, f.key, f.nearby))


def cures(
    said: Mapping[str, Said], wrong: Mapping[str, Value], found: Judgement, key: Key, nearby: Nearby
) -> tuple[Change, ...]:
    """The nearest changes that cure `key`, of as few fields as possible; for each set of fields one.

    A candidate may break another rule; then that rule's own candidates are tried on top of it, breadth first.
    """
    before = {f.key for f in found.findings}
    good: dict[frozenset[str], Change] = {}
    queue = deque(_steps({}, nearby, said))
    for change in islice(_drain(queue), _PATIENCE):
        enough = len(good) == _MOST or any(len(fields) < len(change) for fields in good)
        if enough or len(change) > _DEPTH:
            break
        if frozenset(change) in good:
            continue
        tried = {**said, **{path: Said(value, COMMAND_LINE) for path, value in change.items()}}
        after = judge(tried, wrong.keys() - change.keys()).findings
        trouble = [f for f in after if f.key == key or f.key not in before]
        if not trouble:
            good[frozenset(change)] = change
        else:
            queue.extend(_steps(change, _hardest(trouble).nearby, said))
    return tuple(good.values())


def _hardest(findings: list[Finding]) -> Finding:
    """The finding with the fewest candidates: it leaves the least choice."""
    return min(findings, key=lambda f: sum(map(len, f.nearby.values())))


def _drain(queue: deque[Change]) -> Iterator[Change]:
    while queue:
        yield queue.popleft()


def _steps(change: Change, nearby: Nearby, said: Mapping[str, Said]) -> Iterator[Change]:
    """The change with one more field changed; facts of the surroundings stay."""
    for path, candidates in nearby.items():
        if path in change or (path in said and said[path].source.pinned):
            continue
        for value in candidates[: _WIDTH if not change else 4]:
            if _is_legal(path, value):
                yield {**change, path: value}


def _is_legal(path: str, value: Value) -> bool:
    try:
        from_data(settings()[path], value)
    except ValueError:
        return False
    return True
