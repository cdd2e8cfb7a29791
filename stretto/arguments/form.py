"""What a command takes: options of its own, the settings of a run, or both; help and completion are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from stretto.arguments.command_line import NoOptions, Sources, read_words
from stretto.arguments.setting import Setting, settings_in
from stretto.arguments.tree import by_section


@dataclass(frozen=True)
class Form:
    """A command, `stretto data build`: a dataclass of its own options, and whether the settings of a run go with them.

    The docstring of the options says what the command does; `only` are the sections of settings that its help shows;
    `fallback` is the preset that it starts from where neither preset nor file is named; `tail` is what follows.
    """

    name: str
    own: type = NoOptions
    settings: bool = False
    only: tuple[str, ...] = ()
    fallback: str | None = None
    tail: str = ""

    @property
    def about(self) -> str:
        """What it does."""
        return " ".join((self.own.__doc__ or "").split())

    @property
    def brief(self) -> str:
        """The same as one of a list."""
        first = self.about.split(". ")[0].rstrip(".")
        return first[:1].lower() + first[1:]

    @property
    def usage(self) -> str:
        """The command and its words without flags."""
        places = [s for s in settings_in(self.own) if s.positional]
        words = [f"{s.takes if s.choices else s.flag}{' ...' * s.words}" for s in places]
        words = [word if s.required else f"[{word}]" for s, word in zip(places, words, strict=True)]
        return " ".join([self.name, *words, f"[{'settings' if self.settings else 'options'}]{self.tail}"])

    def groups(self) -> dict[str, tuple[str, list[Setting]]]:
        """The settings by title, each title with a sentence about it."""
        found = {"options": ("", [*settings_in(self.own)])}
        if self.settings:
            found["sources"] = ((Sources.__doc__ or "").strip(), [*settings_in(Sources)])
            found |= {name: (about, of_it) for name, about, of_it in by_section() if not self.only or name in self.only}
        return {title: group for title, group in found.items() if group[1]}


RUN: Final = Form("stretto train", settings=True)


def read_options(form: Form, argv: Sequence[str]) -> Any:
    """The options of a command without settings. Raises ValueError with everything that is wrong, a line each."""
    read = read_words(argv, [*settings_in(form.own)])
    if read.violations:
        raise ValueError("\n".join(v.problem for v in read.violations))
    return form.own(**read.values)
