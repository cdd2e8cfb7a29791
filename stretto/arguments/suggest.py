"""Ways out of a broken rule: changes near to what was said, each known to fix it and to break no other rule."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice

from stretto.arguments.errors import Violation, as_text
from stretto.arguments.nearby import granule
from stretto.arguments.rule import Key, Nearby, RuleViolation
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.sources import COMMAND_LINE
from stretto.arguments.tree import get, settings
from stretto.arguments.validate import Said, Validation, validate
from stretto.arguments.values import from_data

_SIZES = frozenset({"model.hidden", "model.ffn", "model.vocab", "model.head_dim", "batch.seq_len"})
_GPUS_PER_NODE = 8

Change = Mapping[str, Value]
Accept = Callable[[Change], bool]

_MOST = 3
"""Ways out to offer: more would not be read."""

_WIDTH, _DEPTH, _PATIENCE = 16, 4, 400
"""Candidates for a field, fields to change at once, and configurations to try before giving up."""


def explain(said: Mapping[str, Said], wrong: Mapping[str, Value], found: Validation) -> Iterator[Violation]:
    """The findings as violations, each with ways out."""
    for f in found.findings:
        given = tuple(
            f"{path} = {as_text(get(found.args, path))} ({found.sources[path]})"
            for path in f.fields
            if get(found.args, path) != ()
        )
        yield Violation(f.rule, f.fields, f.problem, given, suggested_fixes(said, wrong, found, f.key, f.nearby))


def suggested_fixes(
    said: Mapping[str, Said], wrong: Mapping[str, Value], found: Validation, key: Key, nearby: Nearby
) -> tuple[Change, ...]:
    """The nearest changes that fix `key`, of as few fields as possible; for each set of fields one.

    Among sensible values first, among all where those fix nothing.
    """
    node = said.get("parallel.gpus_per_node")
    sensible = partial(_is_sensible, args=found.args, node=_number(node.value if node else None) or _GPUS_PER_NODE)
    search = partial(_search, said, wrong, found, key, nearby)
    return search(sensible) or search(lambda _: True)


def _is_sensible(change: Change, args: Arguments, node: int) -> bool:
    """Whether a person would choose it: sizes that hardware is fast with, a layer on each stage, tp within a node.

    Only what changes is looked at: odd sizes that the user has chosen are the user's business.
    """
    sizes = [value for path, value in change.items() if path in _SIZES and isinstance(value, int)]
    if any(value % granule(value) for value in sizes) or _number(change.get("parallel.tp")) > node:
        return False
    pp, layers = (_number(change.get(path, get(args, path))) for path in ("parallel.pp", "model.layers"))
    return pp <= layers or not {"parallel.pp", "model.layers"} & change.keys()


def _number(value: Value) -> int:
    return value if isinstance(value, int) else 0


def _search(
    said: Mapping[str, Said], wrong: Mapping[str, Value], found: Validation, key: Key, nearby: Nearby, accept: Accept
) -> tuple[Change, ...]:
    """A candidate may break another rule; then that rule's own candidates are tried on top of it, breadth first."""
    before = {f.key for f in found.findings}
    good: dict[frozenset[str], Change] = {}
    queue = deque(_steps({}, nearby, said, accept))
    for change in islice(_drain(queue), _PATIENCE):
        enough = len(good) == _MOST or any(len(fields) < len(change) for fields in good)
        if enough or len(change) > _DEPTH:
            break
        if frozenset(change) in good:
            continue
        tried = {**said, **{path: Said(value, COMMAND_LINE) for path, value in change.items()}}
        after = validate(tried, wrong.keys() - change.keys()).findings
        trouble = [f for f in after if f.key == key or f.key not in before]
        if not trouble:
            good[frozenset(change)] = change
        else:
            queue.extend(_steps(change, _hardest(trouble).nearby, said, accept))
    return tuple(good.values())


def _hardest(findings: list[RuleViolation]) -> RuleViolation:
    """The finding with the fewest candidates: it leaves the least choice."""
    return min(findings, key=lambda f: sum(map(len, f.nearby.values())))


def _drain(queue: deque[Change]) -> Iterator[Change]:
    while queue:
        yield queue.popleft()


def _steps(change: Change, nearby: Nearby, said: Mapping[str, Said], accept: Accept) -> Iterator[Change]:
    """The change with one more field changed, where that is accepted; facts of the surroundings stay."""
    for path, candidates in nearby.items():
        if path in change or (path in said and said[path].source.pinned):
            continue
        steps = ({**change, path: value} for value in candidates if _is_legal(path, value))
        yield from islice(filter(accept, steps), _WIDTH if not change else 4)


def _is_legal(path: str, value: Value) -> bool:
    try:
        from_data(settings()[path], value)
    except ValueError:
        return False
    return True
