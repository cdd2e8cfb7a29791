"""The words of the command line: flags of the schema, and those that say where else to read.

Own code rather than a parser library, for three things that a configuration needs: every mistake reported at
once, the exact set of values that were said (a flag equal to its default is still said), and `--help` in the
time that Python takes to start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stretto.arguments.errors import Violation
from stretto.arguments.layers import Layer, not_a_value, unknown
from stretto.arguments.peers import flag_of
from stretto.arguments.setting import Setting, Value
from stretto.arguments.sources import COMMAND_LINE
from stretto.arguments.tree import settings
from stretto.arguments.values import from_text, nearest, repaired

MEGATRON = "--megatron"
"""What follows are flags of another program."""

SOURCE_FLAGS: Mapping[str, tuple[str, str]] = {
    "--preset": ("NAME", "start from a preset; may be repeated, later ones win"),
    "--config": ("FILE", "read settings from a .toml or .yaml file; may be repeated, later ones win"),
    "--set": ("SECTION.NAME=VALUE", "set one value by its path, as in --set parallel.tp=2"),
    MEGATRON: ("FLAGS...", "all that follows are Megatron-LM's flags, as strong as a file of what they stand for"),
}
"""Flags that are no settings: what stands after each, and its meaning."""


@dataclass(frozen=True)
class CommandLine:
    """What the command line says: its settings, the presets and files to read, and the words after `--megatron`."""

    layer: Layer
    presets: tuple[str, ...]
    configs: tuple[str, ...]
    foreign: tuple[str, ...] | None


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Read all words; what cannot be read becomes a violation."""
    values: dict[str, Value] = {}
    wrong: dict[str, Value] = {}
    violations: list[Violation] = []
    where: dict[str, list[str]] = {"--preset": [], "--config": []}
    at = argv.index(MEGATRON) if MEGATRON in argv else len(argv)
    for flag, text in _pairs(argv[:at]):
        if flag in where and text is not None:
            where[flag].append(text)
            continue
        found = _setting(flag, text)
        if isinstance(found, Violation):
            violations.append(found)
            continue
        s, word = found
        try:
            values[s.path] = from_text(s, word)
        except ValueError as error:
            violations.append(not_a_value(s, str(error), COMMAND_LINE))
            wrong[s.path] = repaired(s, word)
    layer = Layer(COMMAND_LINE, values, tuple(violations), wrong)
    foreign = tuple(argv[at + 1 :]) if at < len(argv) else None
    return CommandLine(layer, tuple(where["--preset"]), tuple(where["--config"]), foreign)


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each flag with the word that belongs to it, if any; a stray word comes as if it were a flag.

    There are no words that stand alone, so the word after a flag is its value, whatever the flag.
    """
    words = iter(range(len(argv)))
    for i in words:
        flag, equals, text = argv[i].partition("=")
        if equals and _is_flag(flag):
            yield flag, text
        elif _is_flag(flag) and i + 1 < len(argv) and not _is_flag(argv[i + 1]):
            yield flag, argv[next(words)]
        else:
            yield argv[i], None


def _is_flag(word: str) -> bool:
    """Whether a word is a flag, and not a negative number or a lone dash."""
    return word.startswith("--") or (word.startswith("-") and word[1:2].isalpha())


def flags() -> dict[str, Setting]:
    """The setting of each flag."""
    return {s.flag: s for s in settings().values()}


def _setting(flag: str, text: str | None) -> tuple[Setting, str] | Violation:
    """The setting that a flag names, and the text of its value."""
    if flag == "--set" and text is not None:
        path, equals, text = text.partition("=")
        if not equals:
            return Violation("command_line", (), f"--set {path} lacks a value; write --set {path}=VALUE")
        s = settings().get(path)
        return unknown(path, COMMAND_LINE) if s is None else (s, text)
    s = flags().get(flag) or _switched_off(flag)
    if s is None and flag not in SOURCE_FLAGS:
        return _no_flag(flag)
    if s is None or (s.kind is not bool and text is None):
        takes = SOURCE_FLAGS[flag][0] if s is None else s.takes
        return Violation("command_line", () if s is None else (s.path,), f"{flag} lacks its value: {flag} {takes}")
    if flag != s.flag:
        if text is not None:
            return Violation("command_line", (s.path,), f"{flag} {text}: {flag} takes no value")
        return s, "false"
    return s, "true" if text is None else text


def _switched_off(flag: str) -> Setting | None:
    """The switch that `--no-NAME` turns off."""
    s = flags().get(flag.replace("--no-", "--", 1))
    return s if s is not None and s.kind is bool else None


def _no_flag(flag: str) -> Violation:
    if not flag.startswith("-"):
        return Violation("command_line", (), f"{flag!r} stands alone: settings are given as --name value")
    also = {f"--{s.also.replace('_', '-')}": s.flag for s in settings().values() if s.also}
    if (elsewhere := flag_of(flag.lstrip("-"), flags())) is not None:
        return Violation("unknown_flag", (), f"{flag} is no flag{elsewhere}")
    known = {flag: flag for flag in (*flags(), *SOURCE_FLAGS, "--help")} | also
    near = nearest(flag, tuple(known))
    guess = f"; did you mean {known[near]}?" if near else "; --help lists all flags"
    return Violation("unknown_flag", (), f"{flag} is no flag{guess}")
