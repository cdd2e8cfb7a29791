"""Which variables a piece of a script may set."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass

from stretto.compat.megatron.bash.syntax import Assignment, Command, For, Literal, Parameter, Simple, Word

_COMPUTED = re.compile(r"([A-Za-z_]\w*)\s*(?:\+\+|--|(?:<<|>>|[-+*/%&|^])?=(?!=))|(?:\+\+|--)\s*([A-Za-z_]\w*)")
_SETTING = frozenset(
    {"read", "mapfile", "readarray", "getopts", "unset", "printf", "let", "local", "declare", "export"}
)


def assigned(body: object, functions: Mapping[str, Command]) -> set[str]:
    """Every name that is set somewhere in a body, or in a function that it calls."""
    found: set[str] = set()
    _walk(body, functions, found, set())
    return found


def _walk(node: object, functions: Mapping[str, Command], found: set[str], seen: set[str]) -> None:
    for one in _nodes(node):
        if isinstance(one, Assignment | For) or (isinstance(one, Parameter) and one.op in ("=", ":=")):
            found.add(one.name)
        elif isinstance(one, Literal):
            found.update(a or b for a, b in _COMPUTED.findall(one.text))
        elif isinstance(one, Simple) and one.words and isinstance(one.words[0], Word):
            called = one.words[0].plain
            if called in _SETTING:
                plain = (w.plain for w in one.words[1:] if isinstance(w, Word))
                found.update(p for p in plain if p and re.fullmatch(r"[A-Za-z_]\w*", p))
            elif called and called in functions and called not in seen:
                seen.add(called)
                _walk(functions[called], functions, found, seen)


def _nodes(node: object) -> Iterator[object]:
    stack = [node]
    while stack:
        one = stack.pop()
        if isinstance(one, Collection) and not isinstance(one, str):
            stack += one
        elif is_dataclass(one):
            yield one
            stack += [getattr(one, f.name) for f in fields(one)]
