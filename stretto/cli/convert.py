"""`stretto convert args`: the settings of a Megatron-LM launch script, as a settings file.

What changes nothing here, and what is left to say by hand, goes to standard error. Flags for what is not available,
and what cannot be filled in without running the script, are errors.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Final, Literal

from stretto.arguments.errors import ConfigError, Violation
from stretto.arguments.form import Form
from stretto.arguments.layers import Layer
from stretto.arguments.resolve import resolve
from stretto.arguments.setting import REQUIRED, setting
from stretto.arguments.show import entry
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.tree import sections, settings
from stretto.cli.command import USAGE_ERROR, options
from stretto.cli.megatron import as_layer, print_notes
from stretto.compat.megatron import Script, Translation, script_of, translate
from stretto.compat.others import of_another
from stretto.terminal import hand_on, say

_LARGEST = 2**20


class _WordError(Exception):
    """Something wrong with the command itself."""


@dataclass(frozen=True)
class Command:
    """Turn the flags of a Megatron-LM script into a settings file.

    The script is read as bash would read it, and nothing in it is run: of its environment only what --set says is
    known.
    """

    what: Literal["args"] = setting(
        REQUIRED, "what to convert: args, the flags of a Megatron-LM script", positional=True
    )
    script: str | None = setting(None, "the script; left out: standard input", positional=True, path=True)
    arguments: tuple[str, ...] = setting(
        (), "what the script would be started with; flags after --", positional=True, repeats=True, path=True
    )
    out: str | None = setting(None, "the file to write; unset: standard output", path=True, named="FILE")
    set: tuple[str, ...] = setting(
        (), "a variable of the script's environment; may be repeated", named="NAME=VALUE", repeats=True, path=True
    )
    partial: bool = setting(False, "convert the rest where a flag is rejected")


FORMS: Final = (Form("stretto convert", Command),)


def main(argv: Sequence[str]) -> int:
    """Run `stretto convert ...`; 0, or 2 when something cannot be converted."""
    own, rest = _cut(argv)
    said: Command = options(FORMS[0], own)
    path = None if said.script is None else Path(said.script)
    try:
        text = _text(path)
        script = script_of(
            text,
            name=said.script,
            arguments=[*said.arguments, *rest],
            given=_given(said.set),
        )
        if not script.flags and (words := of_another(text)):
            say(f"stretto convert: {words}")
            return USAGE_ERROR
        return convert(script, None if said.out is None else Path(said.out), partial=said.partial)
    except _WordError as error:
        say(f"stretto convert: {error}")
        return USAGE_ERROR


def convert(script: Script, out: Path | None, *, partial: bool) -> int:
    """Write the settings that a script's flags stand for; 0, or 2 when some are rejected."""
    for note in script.notes:
        say(f"note: {note}")
    t = translate(script.flags, processes=script.processes)
    if script.flags:
        print_notes(t)
    problems = _violations(t, script)
    if problems:
        say(f"stretto convert: {ConfigError(problems)}")
    if problems and not (partial and script.flags):
        return USAGE_ERROR
    _write(as_file(t), out)
    return USAGE_ERROR if problems else 0


def as_file(t: Translation) -> str:
    """The settings as TOML, each with the flag that it comes from."""
    lines = ["# From the flags of a Megatron-LM script.", *(f"# {note}" for note in t.notes)]
    for section in sections():
        said = [(s, *t.values[path]) for path, s in settings().items() if s.section == section and path in t.values]
        if said:
            lines += ["", f"[{section}]", *(f"{entry(s, value)}  # {why}" for s, value, why in said)]
    return "\n".join(lines) + "\n"


def _cut(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def _text(path: Path | None) -> str:
    """The script, which need not be valid UTF-8: what is not cannot be a flag."""
    try:
        if path is not None and path.exists() and not path.is_file():
            raise _WordError(f"{path} is not a file")
        text = sys.stdin.read(_LARGEST + 1) if path is None else _limited(path)
    except (OSError, ValueError) as error:
        raise _WordError(
            f"cannot read {path or 'standard input'}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if len(text) > _LARGEST:
        raise _WordError(f"{path or 'standard input'} is larger than {_LARGEST} letters: no launch script")
    return text


def _limited(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_LARGEST + 1)


def _given(words: Sequence[str]) -> Mapping[str, str]:
    for word in words:
        if not re.match(r"[A-Za-z_]\w*=", word):
            raise _WordError(f"--set {word}: say NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def _write(text: str, out: Path | None) -> None:
    if out is None:
        hand_on(text)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _WordError(f"cannot write {out}: {error.strerror}") from error


def _violations(t: Translation, script: Script) -> tuple[Violation, ...]:
    """What the script leaves open, the rejected flags, and what the rules have against the rest.

    As many processes as needed, experts spread over all of them; no file looked for.
    """
    if not script.flags:
        return script.problems
    try:
        resolve([_least(t), as_layer(t, script.problems)])
    except ConfigError as error:
        return error.violations
    return ()


def _least(t: Translation) -> Layer:
    """As few data-parallel ranks as experts fill: how many there are, the run's command says."""

    def size(axis: str) -> int:
        value = t.values.get(f"parallel.{axis}", (1, ""))[0]
        return value if isinstance(value, int) and value > 0 else 1

    spread = size("ep") * size("etp")
    values = {"parallel.dp": spread // gcd(spread, size("tp") * size("cp"))}
    return Layer(Source(SourceKind.DERIVED, "as few as experts fill"), values if spread > 1 else {})
