"""What is wrong with a configuration, said all at once."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stretto.arguments.setting import Value


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong.

    `rule` names it, `fields` are the dotted paths it is about, `problem` is the equation with its numbers,
    `given` says each field's value and where it came from, `fixes` are changes that each fix it without
    breaking another rule, and `hint` is a way out in words.
    """

    rule: str
    fields: tuple[str, ...]
    problem: str
    given: tuple[str, ...] = ()
    fixes: tuple[Mapping[str, Value], ...] = ()
    hint: str = ""

    def __str__(self) -> str:
        lines = [f"{self.rule}: {self.problem}"]
        if self.given:
            lines.append("    " + ", ".join(self.given))
        ways = [" ".join(as_flag(path, value) for path, value in fix.items()) for fix in self.fixes]
        if ways:
            lines.append("    try " + ", or ".join(ways))
        if self.hint:
            lines.append("    " + self.hint)
        return "\n".join(lines)


class ConfigError(ValueError):
    """A configuration that cannot run; `violations` has everything that is wrong with it."""

    def __init__(self, violations: Sequence[Violation]):
        self.violations = tuple(violations)
        n = len(self.violations)
        head = f"{n} problem{'s' if n > 1 else ''} in the configuration"
        super().__init__("\n\n".join([head, *map(str, self.violations)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Violation, ...]]]:
        """Made again from the violations, not from the text: workers send it to whoever waits for them."""
        return type(self), (self.violations,)


def as_text(value: Value) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        words = ["=".join(map(str, entry)) if isinstance(entry, tuple) else _entry(entry) for entry in value]
        return ",".join(words) or '""'
    return str(value)


def _entry(value: object) -> str:
    """Of a list: whole numbers without a point, as they were said."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def as_flag(path: str, value: Value) -> str:
    """A setting as the command line says it: `--tp 2`, `--no-resume`."""
    name = path.rpartition(".")[2].replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(value) if isinstance(value, str) else as_text(value)}"
