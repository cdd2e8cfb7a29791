"""Patterns of bash: `*`, `?`, `[...]`."""

from __future__ import annotations

import re


def quoted(text: str) -> str:
    """A text that matches itself as a pattern."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", text)


def compiled(pattern: str, *, shortest: bool = False) -> re.Pattern[str]:
    """The regular expression of a pattern."""
    out, at = "", 0
    lazy = "?" if shortest else ""
    while at < len(pattern):
        c, at = pattern[at], at + 1
        if c == "*":
            out += f".*{lazy}"
        elif c == "?":
            out += "."
        elif c == "\\" and at < len(pattern):
            out, at = out + re.escape(pattern[at]), at + 1
        elif c == "[" and (found := re.compile(r"\[([!^]?)(\]?(?:\[:\w+:\]|[^\]])*)\]").match(pattern, at - 1)):
            out, at = f"{out}{_set(found[2], others=bool(found[1]))}", found.end()
        else:
            out += re.escape(c)
    return re.compile(out, re.DOTALL)


def _set(body: str, *, others: bool) -> str:
    """What stands in brackets: letters, ranges and classes, each on its own."""
    found: list[str] = []
    for m in re.finditer(r"\[:(\w+):\]|\\?(.)(?:-\\?(.))?", body, re.DOTALL):
        name, first, last = m.groups()
        if name is not None:
            found.append(CLASSES.get(name, ""))
        elif last is None:
            found.append(re.escape(first))
        elif first <= last:  # a range that runs backwards has no letters
            found.append(f"{re.escape(first)}-{re.escape(last)}")
    inner = "".join(found)
    if not inner:
        return "." if others else "(?!)"
    return f"[{'^' if others else ''}{inner}]"


CLASSES = {"digit": "0-9", "alpha": "a-zA-Z", "alnum": "a-zA-Z0-9", "space": r"\s", "upper": "A-Z", "lower": "a-z"}


def matches(text: str, pattern: str) -> bool:
    """Whether all of a text matches."""
    return compiled(pattern).fullmatch(text) is not None


def without_prefix(text: str, pattern: str, *, longest: bool) -> str:
    """`${text#pattern}`, `##`."""
    ends = range(len(text), -1, -1) if longest else range(len(text) + 1)
    p = compiled(pattern)
    return next((text[n:] for n in ends if p.fullmatch(text, 0, n)), text)


def without_suffix(text: str, pattern: str, *, longest: bool) -> str:
    """`${text%pattern}`, `%%`."""
    starts = range(len(text) + 1) if longest else range(len(text), -1, -1)
    p = compiled(pattern)
    return next((text[:n] for n in starts if p.fullmatch(text, n)), text)


def replaced(text: str, pattern: str, by: str, how: str) -> str:
    """`${text/pattern/by}`: `how` is `/`, `//` (all), `/#` (at the beginning) or `/%` (at the end)."""
    p = compiled(pattern)
    if how == "/#":
        found = p.match(text)
        return by + text[found.end() :] if found else text
    if how == "/%":
        start = next((n for n in range(len(text) + 1) if p.fullmatch(text, n)), None)
        return text if start is None else text[:start] + by
    if not text:
        return by if pattern and p.fullmatch(text) else text
    return p.sub(lambda m: by if m[0] else "", text, count=0 if how == "//" else 1) if pattern else text
