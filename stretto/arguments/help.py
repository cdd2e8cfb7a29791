"""The text of `--help` and the completion of a shell: an argparse parser of what a command takes."""

from __future__ import annotations

import shutil
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from functools import partial
from textwrap import fill
from typing import Any

from stretto.arguments.command_line import MEGATRON
from stretto.arguments.derive import DERIVATIONS
from stretto.arguments.errors import as_text
from stretto.arguments.files import presets, read_preset
from stretto.arguments.form import Form
from stretto.arguments.setting import Setting
from stretto.terminal import say

FOREIGN = "all that follows are Megatron-LM's flags, as strong as a file of what they stand for"

_STRENGTH = """

The stronger wins: command line > file > checkpoint > preset > default.
A switch is turned off with --no-NAME; `auto` asks for a derived value."""

_FALLBACK = """

Where neither --preset nor --config is given, the run starts from the preset {0}, not from the
defaults: what it sets otherwise is shown as `{0}: VALUE` behind the default."""


def say_help(form: Form) -> None:
    """Print what a command takes, and end the program."""
    say(help_text(form, shutil.get_terminal_size((100, 24)).columns), out=True, end="")
    raise SystemExit(0)


def help_text(form: Form, width: int = 100) -> str:
    """All flags by section: what each takes and means, its unit, range and default."""
    wide = partial(RawDescriptionHelpFormatter, max_help_position=30, width=max(width, 60))
    parser = ArgumentParser(form.name, formatter_class=wide, add_help=False)
    describe(parser, form, width)
    return parser.format_help()


def describe(parser: ArgumentParser, form: Form, width: int = 100, files: object = None) -> None:
    """Fill an argparse parser with all that a command takes; `files` is how shtab completes a path."""
    instead = dict(read_preset(form.fallback).values) if form.fallback else {}
    parser.usage = form.usage
    parser.description = fill(form.about, max(width, 60) - 2) + _STRENGTH * form.settings
    parser.description += _FALLBACK.format(form.fallback) if form.settings and form.fallback else ""
    for title, (about, group) in form.groups().items():
        into = parser.add_argument_group(title, about or None)
        for s in group:
            plain = not s.section and (s.required or s.default in (None, (), "", False))
            notes = ", ".join([s.unit] * bool(s.unit) + [f"default {default(s)}"] * (not plain))
            notes += f"; {form.fallback}: {as_text(instead[s.path])}" if s.path in instead else ""
            _add(into, s, f"{s.help} [{notes}]" if notes else s.help, files)
        if title == "sources":
            into.add_argument(MEGATRON, metavar="FLAGS...", help=FOREIGN)


def default(s: Setting) -> str:
    """The default in words: a value, the equation that derives it, or none."""
    equations = {d.path: d.meaning for d in DERIVATIONS}
    return equations.get(s.path, "none") if s.default in (None, ()) else as_text(s.default)


def _add(into: Any, s: Setting, text: str, files: object) -> None:
    said: dict[str, Any] = {"help": text.replace("%", "%%"), "default": SUPPRESS}
    if s.kind is bool:
        into.add_argument(s.flag, action=BooleanOptionalAction, **said)
        return
    if s.choices and s.kind is str:
        said["choices"] = s.choices
    if s.path == "preset":
        said["choices"] = presets()
    if s.positional:
        said["nargs"] = "*" if s.words else "?"
    name, takes = (s.name, s.flag) if s.positional else (s.flag, s.takes)
    made = into.add_argument(name, metavar=takes, **said)
    if s.is_path and files is not None:
        made.complete = files
