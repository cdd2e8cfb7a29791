"""The text of `--help`, from the schema."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping

from stretto.arguments.command_line import SOURCE_FLAGS
from stretto.arguments.derive import DERIVATIONS
from stretto.arguments.errors import as_text
from stretto.arguments.files import presets, read_preset
from stretto.arguments.setting import Setting, Value
from stretto.arguments.tree import sections, settings

_INDENT = 30


def help_text(
    command: str = "stretto train", width: int = 100, *, fallback: str | None = None, only: Collection[str] = ()
) -> str:
    """All flags by section, or of the sections `only`: what each takes and means, its unit, range and default.

    `fallback` is the preset that the command starts from where the user names neither preset nor file.
    """
    return "\n".join(_lines(command, max(width, 60), fallback, only or sections())) + "\n"


def default(s: Setting) -> str:
    """The default in words: a value, the equation that derives it, or none."""
    equations = {d.path: d.meaning for d in DERIVATIONS}
    return equations.get(s.path, "none") if s.default in (None, ()) else as_text(s.default)


def _lines(command: str, width: int, fallback: str | None, shown: Collection[str]) -> Iterator[str]:
    instead: Mapping[str, Value] = read_preset(fallback).values if fallback else {}
    yield f"{command} [settings]"
    yield ""
    yield "The stronger wins: command line > file > checkpoint > preset > default."
    yield "A switch is turned off with --no-NAME; `auto` asks for a derived value."
    if fallback:
        yield ""
        yield f"Where neither --preset nor --config is given, the run starts from the preset {fallback}, not from the"
        yield f"defaults: what it sets otherwise is shown as `{fallback}: VALUE` behind the default."
    yield ""
    yield "sources: where settings come from"
    for flag, (takes, text) in SOURCE_FLAGS.items():
        yield from _entry(f"{flag} {takes}", text, width)
    yield from _entry("", f"presets: {', '.join(presets())}", width)
    for name, section in sections().items():
        if name not in shown:
            continue
        yield ""
        yield f"{name}: {(section.__doc__ or '').strip()}"
        for s in settings().values():
            if s.section == name:
                notes = f"{s.unit}, default {default(s)}".removeprefix(", ")
                notes += f"; {fallback}: {as_text(instead[s.path])}" if s.path in instead else ""
                yield from _entry(f"{_switch(s)} {s.takes}".rstrip(), f"{s.help} [{notes}]", width)


def _switch(s: Setting) -> str:
    """The flag, as the one that changes something where it is a switch."""
    return s.flag.replace("--", "--no-", 1) if s.default is True else s.flag


def _entry(flag: str, text: str, width: int) -> Iterator[str]:
    """A flag and, from one column on, its meaning; on a line of its own where the flag is too long."""
    first, *rest = textwrap.wrap(text, width - _INDENT)
    head = f"  {flag}"
    if len(head) < _INDENT:
        yield head.ljust(_INDENT) + first
    else:
        yield from (head, " " * _INDENT + first)
    yield from (" " * _INDENT + line for line in rest)
