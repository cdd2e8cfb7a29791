"""Words of bash from text: quotes and expansions, none of them filled in yet."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left

from stretto.compat.megatron.bash.syntax import (
    Arithmetic,
    BashError,
    Command,
    Literal,
    Parameter,
    Part,
    Substitution,
    Word,
)

_NAME = re.compile(r"[A-Za-z_]\w*")
_PARAMETER = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?$!-]")
_OPERATOR = re.compile(r":?[-=?+]|##?|%%?|//|/[#%]|/|\^\^?|,,?|@[A-Za-z]|:")
_ANSI = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{1,4})|U([0-9a-fA-F]{1,8})|(.))", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "v": "\v"}
_ENDS = frozenset(" \t\n;&|<>()")
_DEPTH = 50


class Reader(ABC):
    """A position in a text, and what words are made of from there on.

    `commands`, the grammar, is above: it reads those of a substitution.
    """

    def __init__(self, text: str, line: int = 1, depth: int = 0):
        self.text, self.at, self.first, self.depth = text, 0, line, depth
        self._newlines = [m.start() for m in re.finditer("\n", text)]
        if depth > _DEPTH:
            raise BashError(line, f"expansions nested more than {_DEPTH} deep")

    @abstractmethod
    def commands(self, end: str) -> tuple[Command, ...]:
        """Commands up to a closing character."""

    @property
    def line(self) -> int:
        """Line of the position."""
        return self.first + bisect_left(self._newlines, self.at)

    def peek(self, size: int = 1) -> str:
        """The next characters."""
        return self.text[self.at : self.at + size]

    def inner(self, text: str) -> Reader:
        """A reader of a part of the text that has lost some of its quotes."""
        return type(self)(text, self.line, self.depth + 1)

    def fail(self, problem: str) -> BashError:
        """The error of something that stands here."""
        return BashError(self.line, problem)

    def word(self, ends: frozenset[str] = _ENDS) -> Word:
        """One word, up to one of the characters that end it."""
        line, parts = self.line, list[Part]()
        while self.at < len(self.text) and (self.peek() not in ends or self._process()):
            self._part(parts, ends)
        return Word(tuple(parts), line)

    def _process(self) -> bool:
        return self.peek(2) in ("<(", ">(")

    def _part(self, parts: list[Part], ends: frozenset[str]) -> None:
        c = self.peek()
        if self._process():
            start, self.at = self.at, self.at + 2
            parts.append(self._commands(start, quoted=False, process=True))
        elif c == "\\":
            self._escaped(parts)
        elif c == "'":
            parts.append(Literal(self._until_quote(), True))
        elif c == '"':
            parts += self._double()
        elif c == "$" and self.peek(2) == "$'":
            parts.append(Literal(self._ansi(), True))
        elif c == "$" and self.peek(2) == '$"':
            self.at += 1
            parts += self._double()
        elif c in "$`":
            parts.append(self._expansion(quoted=False))
        else:
            start = self.at
            while self.at < len(self.text) and self.peek() not in ends and self.peek() not in "\\'\"$`<>":
                self.at += 1
            self.at = max(self.at, start + 1)
            parts.append(Literal(self.text[start : self.at], False))

    def _escaped(self, parts: list[Part]) -> None:
        after = self.text[self.at + 1 : self.at + 2]
        self.at += 2
        if after != "\n":
            parts.append(Literal(after or "\\", True))

    def _until_quote(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise self.fail("a ' that is not closed")
        text, self.at = self.text[self.at + 1 : end], end + 1
        return text

    def _ansi(self) -> str:
        found = re.compile(r"\$'((?:[^'\\]|\\.)*)'", re.DOTALL).match(self.text, self.at)
        if not found:
            raise self.fail("a $' that is not closed")
        self.at = found.end()

        def char(m: re.Match[str]) -> str:
            octal, *hexes, one = m.groups()
            digits = next((h for h in hexes if h), None)
            if octal or digits:
                return chr(int(octal, 8) % 256 if octal else min(int(digits or "0", 16), 0x10FFFF))
            return _ESCAPES.get(one, one if one in "\\'\"?" else f"\\{one}")

        return _ANSI.sub(char, found[1])

    def _double(self) -> list[Part]:
        self.at += 1
        parts = self.quoted('"')
        self.at += 1
        return parts or [Literal("", True)]

    def quoted(self, end: str) -> list[Part]:
        """What stands in double quotes, up to `end`, or in a here-document, up to the end of the text."""
        parts: list[Part] = []
        while self.at < len(self.text) or end:
            if self.at >= len(self.text):
                raise self.fail(f"a {end} that is not closed")
            c = self.peek()
            if c == end:
                break
            if c == "\\":
                after = self.text[self.at + 1 : self.at + 2]
                kept = "" if after == "\n" else after if after and after in '$`"\\' else f"\\{after}"
                if c == "\\" and not end and after == '"':
                    kept = '\\"'
                parts.append(Literal(kept, True))
                self.at += 2
            elif c in "$`":
                parts.append(self._expansion(quoted=True))
            else:
                start = self.at
                while self.at < len(self.text) and self.peek() not in "\\$`" and self.peek() != end:
                    self.at += 1
                parts.append(Literal(self.text[start : self.at], True))
        return parts

    def _expansion(self, *, quoted: bool) -> Part:
        start, line = self.at, self.line
        if self.peek() == "`":
            return self._backquoted(quoted)
        if self.peek(3) == "$((" and (end := self._arithmetic_end(self.at + 3, "))")):
            return Arithmetic(self._arithmetic(self.at + 3, end, 2), line, quoted)
        if self.peek(2) == "$[" and (end := self._arithmetic_end(self.at + 2, "]")):
            return Arithmetic(self._arithmetic(self.at + 2, end, 1), line, quoted)
        if self.peek(2) == "$(":
            self.at += 2
            return self._commands(start, quoted=quoted, process=False)
        if self.peek(2) == "${":
            return self._braced(quoted)
        self.at += 1
        found = _NAME.match(self.text, self.at) or re.compile(r"\d|[@*#?$!-]").match(self.text, self.at)
        if not found:
            return Literal("$", True)
        self.at = found.end()
        return Parameter(found[0], line, quoted, self.text[start : self.at])

    def _commands(self, start: int, *, quoted: bool, process: bool) -> Substitution:
        line = self.line
        self.depth += 1
        if self.depth > _DEPTH:
            raise self.fail(f"expansions nested more than {_DEPTH} deep")
        body = self.commands(")")
        self.depth -= 1
        if self.peek() != ")":
            raise BashError(line, "a ( that is not closed")
        self.at += 1
        return Substitution(body, line, quoted, self.text[start : self.at], process)

    def _backquoted(self, quoted: bool) -> Substitution:
        found = re.compile(r"`((?:[^`\\]|\\.)*)`", re.DOTALL).match(self.text, self.at)
        if not found:
            raise self.fail("a ` that is not closed")
        inner = self.inner(re.sub(r'\\([$`\\"])' if quoted else r"\\([$`\\])", r"\1", found[1]))
        line, self.at = self.line, found.end()
        return Substitution(inner.commands(""), line, quoted, found[0])

    def _arithmetic_end(self, at: int, end: str) -> int:
        depth = 0
        while at < len(self.text):
            c = self.text[at]
            if not depth and self.text.startswith(end, at):
                return at
            depth += (c in "([") - (c in ")]")
            if depth < 0:
                return 0
            at += 1
        return 0

    def _arithmetic(self, start: int, end: int, closing: int) -> Word:
        line = self.line
        word = Word(tuple(self.inner(self.text[start:end]).quoted("")), line)
        self.at = end + closing
        return word

    def _braced(self, quoted: bool) -> Parameter:
        start, line = self.at, self.line
        self.at += 2
        prefix = ""
        if self.peek() in ("#", "!") and re.compile(r"[#!](?:\w|[@*](?=\}))").match(self.text, self.at):
            prefix, self.at = self.peek(), self.at + 1
        name = _PARAMETER.match(self.text, self.at)
        if not name:
            raise self.fail(f"{self.text[start : start + 12]!r} is no expansion")
        self.at = name.end()
        index = None
        if self.peek() == "[":
            self.at += 1
            index = self.word(frozenset("]"))
            self.at += 1
        op, args = "", tuple[Word, ...]()
        if self.peek() != "}":
            found = _OPERATOR.match(self.text, self.at)
            if not found:
                raise self.fail(f"{self.text[start : self.at + 4]!r} is no expansion that is known here")
            op, self.at = found[0], found.end()
            args = self._arguments(op, quoted)
        if self.peek() != "}":
            raise BashError(line, "a ${ that is not closed")
        self.at += 1
        return Parameter(name[0], line, quoted, self.text[start : self.at], prefix + op, index, args)

    def _arguments(self, op: str, quoted: bool) -> tuple[Word, ...]:
        if op[0] == "@":
            return ()
        if op == ":":
            first = self.operand(quoted=True, ends=":}")
            if self.peek() != ":":
                return (first,)
            self.at += 1
            return first, self.operand(quoted=True, ends="}")
        if op[0] == "/":
            pattern = self.operand(quoted=False, ends="/}")
            if self.peek() == "/":
                self.at += 1
            return pattern, self.operand(quoted=False, ends="}")
        return (self.operand(quoted=quoted and op[-1] in "-=?+", ends="}"),)

    def operand(self, *, quoted: bool, ends: str) -> Word:
        """The word in an expansion. In double quotes a single quote is a letter, and nothing is split."""
        line, parts, stop = self.line, list[Part](), frozenset(ends)
        while self.peek() not in ends:
            if self.at >= len(self.text):
                break
            c = self.peek()
            if not quoted:
                self._part(parts, stop)
            elif c == "\\":
                after = self.text[self.at + 1 : self.at + 2]
                parts.append(Literal(after if after and after in '$`"\\}' else f"\\{after}", True))
                self.at += 2
            elif c == '"':
                parts += self._double()
            elif c in "$`":
                parts.append(self._expansion(quoted=True))
            else:
                parts.append(Literal(c, True))
                self.at += 1
        return Word(tuple(parts), line)
