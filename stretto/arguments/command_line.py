"""The words of a command line, read against a table of settings: those of a run, the options of a command, or both.

Own code, for two things that no parser library gives: every mistake at once, and the exact set of values that were
said (a flag equal to its default is still said). `help.py` makes an argparse parser of the same table, for help and
completion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stretto.arguments.errors import Violation
from stretto.arguments.layers import Layer, not_a_value, unknown
from stretto.arguments.peers import flag_of
from stretto.arguments.setting import Setting, Value, setting, settings_in
from stretto.arguments.sources import COMMAND_LINE
from stretto.arguments.tree import settings
from stretto.arguments.values import did_you_mean, from_data, from_text, repaired

MEGATRON = "--megatron"
"""What follows are flags of another program."""


@dataclass(frozen=True)
class Sources:
    """Where settings come from."""

    preset: tuple[str, ...] = setting((), "start from a preset; may be repeated, later ones win", named="NAME")
    config: tuple[str, ...] = setting(
        (),
        "read settings from a .toml or .yaml file, which may also stand alone; may be repeated, later ones win",
        named="FILE",
        path=True,
    )
    set: tuple[str, ...] = setting(
        (), "set one value by its path, as in --set parallel.tp=2", named="SECTION.NAME=VALUE"
    )


@dataclass(frozen=True)
class NoOptions:
    """A command without options of its own."""


@dataclass(frozen=True)
class CommandLine:
    """What the command line says: settings of the run, options of the command, and the words after `--megatron`."""

    layer: Layer
    own: Mapping[str, Value]
    foreign: tuple[str, ...] | None

    def all_of(self, name: str) -> tuple[str, ...]:
        """Every word that a source was given: presets, or files."""
        said = self.own.get(name, ())
        return tuple(str(word) for word in said) if isinstance(said, tuple) else ()


def read_command_line(argv: Sequence[str], own: type = NoOptions) -> CommandLine:
    """Read the words of a command that takes the settings of a run, beside options of its own."""
    at = argv.index(MEGATRON) if MEGATRON in argv else len(argv)
    read = read_words(argv[:at], [*settings_in(own), *settings_in(Sources), *settings().values()])
    values = {path: value for path, value in read.values.items() if path in settings()}
    wrong = {path: value for path, value in read.wrong.items() if path in settings()}
    layer = Layer(COMMAND_LINE, values, read.violations, wrong)
    options = {path: value for path, value in read.values.items() if path not in settings()}
    return CommandLine(layer, options, tuple(argv[at + 1 :]) if at < len(argv) else None)


def read_words(argv: Sequence[str], table: Sequence[Setting]) -> Layer:
    """The values that the words say; what cannot be read becomes a violation."""
    reader = _Reader(table)
    words = deque(argv)
    while words:
        reader.take(words.popleft(), words)
    return reader.layer()


@dataclass
class _Reader:
    table: Sequence[Setting]
    values: dict[str, Value] = field(default_factory=dict)
    wrong: dict[str, Value] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)
    last: Setting | None = None

    def __post_init__(self) -> None:
        self.flags = {s.flag: s for s in self.table if not s.positional}
        self.places = [s for s in self.table if s.positional]
        self.of_run = "--config" in self.flags

    def take(self, word: str, rest: deque[str]) -> None:
        """One word, and the value that belongs to it: of `rest` the first, unless that is a flag."""
        flag, equals, text = word.partition("=")
        if not is_flag(flag):
            self._alone(word)
            return
        s = self.flags.get(flag)
        said = text if equals else None
        if said is None and rest and not is_flag(rest[0]):
            switch = s is not None and s.kind is bool and self.places and rest[0] not in ("true", "false")
            said = None if switch else rest.popleft()
        if flag == "--set" and self.of_run and said is not None:
            self._set(said)
        else:
            self._flag(flag, s, said)

    def layer(self) -> Layer:
        """All that was read, and what is missing."""
        by_path = {s.path: s for s in self.table}
        for path, words in self.lists.items():
            self._read(by_path[path], None, words)
        for s in self.table:
            if s.required and s.path not in self.values and s.path not in self.wrong:
                way = f": {s.takes}" if s.choices else f": {s.flag} {s.takes}" if not s.positional else ""
                self._wrong(f"{s.flag} is missing{way}")
        return Layer(COMMAND_LINE, self.values, tuple(self.violations), self.wrong)

    def _alone(self, word: str) -> None:
        """A word without a flag: it goes to the next place that has room, or to the list before it."""
        into = next((s for s in self.places if s.words or s.path not in self.values), None)
        if into is None and self.of_run and word.endswith((".toml", ".yaml", ".yml")):
            into = self.flags["--config"]
        if into is None and not self.of_run and self.last is not None and self.last.words:
            into = self.last
        if into is None:
            self._wrong(f"{word!r} stands alone: {'settings' if self.of_run else 'options'} are given as --name value")
        elif into.words:
            self.lists.setdefault(into.path, []).append(word)
        else:
            self._read(into, word)

    def _flag(self, flag: str, s: Setting | None, text: str | None) -> None:
        switched = self.flags.get(flag.replace("--no-", "--", 1)) if s is None else None
        self.last = s
        if switched is not None and switched.kind is bool:
            if text is None:
                self._read(switched, "false")
            else:
                self._wrong(f"{flag} {text}: {flag} takes no value", switched)
        elif s is None:
            self.violations.append(self._no_flag(flag))
        elif text is None and s.kind is not bool:
            self._wrong(f"{flag} lacks its value: {flag} {s.takes}", s)
        elif s.words:
            self.lists.setdefault(s.path, []).append(text or "")
        else:
            self._read(s, "true" if text is None else text)

    def _set(self, said: str) -> None:
        path, equals, text = said.partition("=")
        if not equals:
            self._wrong(f"--set {path} lacks a value; write --set {path}=VALUE")
        elif (s := settings().get(path)) is None:
            self.violations.append(unknown(path, COMMAND_LINE))
        else:
            self._read(s, text)

    def _read(self, s: Setting, text: str | None, words: Sequence[str] = ()) -> None:
        try:
            self.values[s.path] = from_data(s, words) if text is None else from_text(s, text)
        except ValueError as error:
            self.violations.append(not_a_value(s, str(error), COMMAND_LINE))
            self.wrong[s.path] = repaired(s, text)

    def _wrong(self, problem: str, s: Setting | None = None) -> None:
        self.violations.append(Violation("command_line", (s.path,) if s is not None and s.section else (), problem))

    def _no_flag(self, flag: str) -> Violation:
        last = flag.lstrip("-").rpartition(".")[2]  # others have sections in the names of their flags
        if (elsewhere := flag_of(last, self.flags)) is not None:
            return Violation("unknown_flag", (), f"{flag} is no flag{elsewhere}")
        guess = did_you_mean(last, (*self.flags, "--help", *[MEGATRON] * self.of_run)) or "; --help lists all flags"
        return Violation("unknown_flag", (), f"{flag} is no flag{guess}")


def is_flag(word: str) -> bool:
    """Whether a word is a flag, and not a negative number or a lone dash."""
    return word.startswith("--") or (word.startswith("-") and word[1:2].isalpha())


def flags() -> dict[str, Setting]:
    """The setting of each flag."""
    return {s.flag: s for s in settings().values()}
