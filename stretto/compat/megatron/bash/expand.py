"""Expansion of words: quotes, parameters, arithmetic, substitution, splitting, as bash does it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal as Choice

from stretto.compat.megatron.bash import arithmetic, pattern
from stretto.compat.megatron.bash.braces import alternatives
from stretto.compat.megatron.bash.state import State
from stretto.compat.megatron.bash.syntax import Arithmetic, BashError, Literal, Parameter, Part, Substitution, Word
from stretto.compat.megatron.bash.unknown import marks

Kind = Choice["quoted", "literal", "split"]
Chunk = tuple[str, Kind] | None
"""A piece of a word: what is quoted stays whole, what came of an expansion is split; None: here a word ends."""

_GLOB = re.compile(r"[*?]|\[[^\]]+\]")


class Expansion:
    """Expands words for one shell. `lenient`: a name that is not set is empty, as a test of that asks for."""

    state: State
    lenient = False

    def substituted(self, s: Substitution) -> str:
        """The output of a command, where it is known without running anything."""
        raise NotImplementedError

    def fields(self, words: Iterable[Word]) -> list[str]:
        """The words that a command gets."""
        return [field for word in words for one in alternatives(word) for field in self._fields(one)]

    def value(self, word: Word) -> str:
        """One text, not split: what an assignment takes."""
        chunks = self._chunks(word.parts)
        return "".join(" " if c is None else c[0] for c in self._tilde(chunks, word.line))

    def pattern(self, word: Word) -> str:
        """A pattern: what is quoted in it matches itself."""
        chunks = (c or (" ", "quoted") for c in self._chunks(word.parts))
        return "".join(pattern.quoted(text) if kind == "quoted" else text for text, kind in chunks)

    def computed(self, text: str, line: int) -> str:
        """The value of an arithmetic expression, or the marks of what is not known of it."""
        if found := marks(text):
            return found[0]
        try:
            return str(arithmetic.Arithmetic(text, lambda name: self._operand(name, line), self._computed_name).value())
        except arithmetic.ArithmeticUnknownError as unknown:
            return str(unknown.args[0])
        except (ValueError, ZeroDivisionError) as error:
            raise BashError(line, f"$(({text})): {error}") from error

    def _computed_name(self, name: str, value: str) -> None:
        """Set a variable, or an entry of an array, from arithmetic."""
        name, entry, index = name.partition("[")
        old = self.state.variables.get(name)
        if entry and old is not None and isinstance(old.value, dict):
            self.state.set(name, {**old.value, index[:-1] if old.keyed else self.computed(index[:-1], 0): value})
        else:
            self.state.set(name, value)

    def _operand(self, name: str, line: int) -> str:
        name, entry, index = name.partition("[")
        variable = self.state.variables.get(name)
        keyed = variable is not None and variable.keyed
        index = index[:-1] if keyed else self.computed(index[:-1], line) if entry else "0"
        value = self.state.get(name, index)
        if value is None:
            value = "0" if variable is not None else self._unset(name, f"${name}", line)
        if found := marks(value):
            raise arithmetic.ArithmeticUnknownError(found[0])
        return value

    def _fields(self, word: Word) -> Iterator[str]:
        current: list[tuple[str, Kind]] | None = None
        for chunk in self._tilde(self._chunks(word.parts), word.line):
            if chunk is None:
                if current is not None:
                    yield self._globbed(current, word.line)
                current = []
                continue
            if chunk[1] != "split":
                current = [*(current or []), chunk]
                continue
            for piece, ended in split(chunk[0], self._separators()):
                if piece:
                    current = [*(current or []), (piece, "split")]
                if ended and current is not None:
                    yield self._globbed(current, word.line)
                    current = None
        if current:
            yield self._globbed(current, word.line)

    def _separators(self) -> str:
        known = self.state.get("IFS")
        return " \t\n" if known is None or marks(known) else known

    def _globbed(self, field: Sequence[tuple[str, Kind]], line: int) -> str:
        text = "".join(t for t, _ in field)
        if _GLOB.search("".join(t for t, kind in field if kind != "quoted")) and not marks(text):
            wild = "".join(pattern.quoted(t) if kind == "quoted" else t for t, kind in field)
            if "/" in wild or "*" in wild:
                return self.state.shared.mark(
                    text, line, "stands for names of files, which are not looked for: quote it"
                )
        return text

    def _tilde(self, chunks: list[Chunk], line: int) -> list[Chunk]:
        first = chunks[0] if chunks else None
        if first and first[1] == "literal" and re.match(r"~(/|$)", first[0]):
            home = self.state.get("HOME")
            if home is None:
                home = self.state.shared.mark("~", line, "is the home of whoever runs the script", "HOME")
            return [(home, "quoted"), (first[0][1:], "literal"), *chunks[1:]]
        return chunks

    def _chunks(self, parts: Sequence[Part]) -> list[Chunk]:
        return [chunk for part in parts for chunk in self._part(part)]

    def _part(self, part: Part) -> list[Chunk]:
        if isinstance(part, Literal):
            return [(part.text, "quoted" if part.quoted else "literal")]
        kind: Kind = "quoted" if part.quoted else "split"
        if isinstance(part, Arithmetic):
            return [(self.computed(self.value(part.word), part.line), kind)]
        if isinstance(part, Substitution):
            return [(self.substituted(part), kind)]
        return self._parameter(part, kind)

    def _parameter(self, p: Parameter, kind: Kind) -> list[Chunk]:
        """What a parameter stands for."""
        raise NotImplementedError

    def _unset(self, name: str, text: str, line: int) -> str:
        """What a name stands for that has no value."""
        raise NotImplementedError


def split(text: str, separators: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a text, each with whether a separator ends it."""
    if not separators:
        yield text, False
        return
    blank = re.escape("".join(c for c in separators if c in " \t\n"))
    hard = re.escape("".join(c for c in separators if c not in " \t\n"))
    one = f"[{blank}]*[{hard}][{blank}]*|[{blank}]+" if blank and hard else f"[{hard}]" if hard else f"[{blank}]+"
    at = 0
    for found in re.finditer(one, text):
        yield text[at : found.start()], True
        at = found.end()
    yield text[at:], False
