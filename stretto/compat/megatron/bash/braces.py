"""`{a,b}` and `{1..3}`: one word that stands for several."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

from stretto.compat.megatron.bash.syntax import BashError, Literal, Part, Word

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MOST = 10_000

Atom = str | Part
"""A letter without quotes, or a part that is whole."""


def alternatives(word: Word) -> list[Word]:
    """The words that one stands for; mostly itself."""
    if not any(isinstance(p, Literal) and not p.quoted and "{" in p.text for p in word.parts):
        return [word]
    atoms: list[Atom] = []
    for part in word.parts:
        atoms += part.text if isinstance(part, Literal) and not part.quoted else [part]
    return [replace(word, parts=_parts(one)) for one in _expanded(atoms, word.line)]


def _expanded(atoms: list[Atom], line: int) -> list[list[Atom]]:
    for start, atom in enumerate(atoms):
        if atom != "{":
            continue
        end, commas = _closing(atoms, start)
        if end is None:
            continue
        inner = atoms[start + 1 : end]
        choices = _range(inner) if not commas else None
        if commas:
            edges = [start, *commas, end]
            choices = [c for a, b in pairwise(edges) for c in _expanded(atoms[a + 1 : b], line)]
        if choices is None:
            continue
        rest = _expanded(atoms[end + 1 :], line)
        if len(choices) * len(rest) > _MOST:
            raise BashError(line, f"braces that stand for more than {_MOST} words")
        return [[*atoms[:start], *choice, *tail] for choice in choices for tail in rest]
    return [atoms]


def _closing(atoms: list[Atom], start: int) -> tuple[int | None, list[int]]:
    depth, commas = 0, list[int]()
    for n in range(start, len(atoms)):
        depth += (atoms[n] == "{") - (atoms[n] == "}")
        if depth == 0:
            return n, commas
        if depth == 1 and atoms[n] == ",":
            commas.append(n)
    return None, commas


def _range(inner: list[Atom]) -> list[list[Atom]] | None:
    text = "".join(a if isinstance(a, str) else "\0" for a in inner)
    found = _RANGE.fullmatch(text)
    if not found:
        return None
    first, last, step = int(found[1]), int(found[2]), abs(int(found[3] or 1)) or 1
    width = max(len(found[1]), len(found[2])) if any(re.match(r"-?0\d", t) for t in found.group(1, 2)) else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [list(f"{n:0{width}d}") for n in numbers[:_MOST]]


def _parts(atoms: list[Atom]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for atom in atoms:
        if not isinstance(atom, str):
            parts.append(atom)
        elif parts and isinstance(last := parts[-1], Literal) and not last.quoted:
            parts[-1] = Literal(last.text + atom, False)
        else:
            parts.append(Literal(atom, False))
    return tuple(parts)
