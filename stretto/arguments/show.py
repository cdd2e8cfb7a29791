"""The resolved configuration as a file to run again, with the source of each value."""

from __future__ import annotations

import tomli_w

from stretto.arguments.errors import as_text
from stretto.arguments.record import follows, from_the_root
from stretto.arguments.resolve import Resolved
from stretto.arguments.setting import Setting, Value
from stretto.arguments.tree import by_section, get
from stretto.terminal import printable


def as_toml(resolved: Resolved) -> str:
    """A file that `--config` reads, with every value and where it came from.

    Values that follow from others, or from the launcher, stand there as comments: a run of this file on
    another number of processes derives them again.
    """
    lines = ["# The configuration of a run, and where each value came from."]
    for name, _, of_it in by_section():
        lines += ["", f"[{name}]", *(_line(resolved, s) for s in of_it)]
    return "\n".join(lines) + "\n"


def _line(resolved: Resolved, s: Setting) -> str:
    value, source = get(resolved.args, s.path), f"{resolved.sources[s.path]}"
    if value is None:
        return f"# {s.name} is unset  # {_comment(source)}"
    if s.is_path and s.carried and (absolute := from_the_root(s.path, value)) != value:
        value, source = absolute, f"{source}, given as {value}"
    return f"{'# ' if follows(s, resolved.sources[s.path]) else ''}{entry(s, value)}  # {_comment(source)}"


def _comment(text: str) -> str:
    """A source may be named after a file, and that may have a line break in it."""
    return printable(text).replace("\n", " ").replace("\t", " ")


def entry(s: Setting, value: Value) -> str:
    """One line of TOML."""
    if s.kind is dict:
        return f"{s.name} = {{{as_text(value).replace('=', ' = ').replace(',', ', ') if value else ''}}}"
    return f"{s.name} = {list(value)}" if isinstance(value, tuple) else tomli_w.dumps({s.name: value}).strip()
