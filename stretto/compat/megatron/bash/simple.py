"""Simple commands of bash from text: assignments, words, redirections, here-documents."""

from __future__ import annotations

import re

from stretto.compat.megatron.bash.syntax import Assignment, BashError, Literal, Redirect, Simple, Word
from stretto.compat.megatron.bash.words import Reader

_BLANKS = re.compile(r"(?:[ \t]|\\\r?\n)+")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[((?>[^\]\"'$]|\"[^\"]*\"|'[^']*'|\$\{?\w+\}?)*+)\])?(\+?)=")
_REDIRECT = re.compile(r"(?:\d+|\{\w+\})?(<<<|<<-?|<>|<&|>&|>>|>\||&>>|&>|<(?!\()|>(?!\())")
_DECLARING = frozenset({"declare", "typeset", "local", "readonly", "export"})


class SimpleCommands(Reader):
    """Reads what a command without a word of the grammar is made of."""

    def __init__(self, text: str, line: int = 1, depth: int = 0):
        super().__init__(text, line, depth)
        self.documents: list[tuple[str, bool, Redirect]] = []

    def blanks(self) -> None:
        """Go past blanks and a comment."""
        if found := _BLANKS.match(self.text, self.at):
            self.at = found.end()
        if self.peek() == "#" and (self.at == 0 or self.text[self.at - 1] in " \t\n;&|()"):
            end = self.text.find("\n", self.at)
            self.at = len(self.text) if end < 0 else end

    def lines(self) -> None:
        """Go past blanks, comments and ends of lines; here-documents begin at the first of those."""
        self.blanks()
        while self.peek() == "\n":
            self.at += 1
            self._documents()
            self.blanks()

    def reserved(self) -> str:
        """The next word, where it could be reserved."""
        found = re.compile(r"[a-z]+(?=[\s;&|()<>]|$)|[{}!](?=[\s;&|)]|$)|\[\[(?=\s)").match(self.text, self.at)
        return found[0] if found else ""

    def _take(self, word: str) -> None:
        self.lines()
        if self.reserved() != word:
            raise self.fail(f"{word!r} is missing before {self.peek(12)!r}")
        self.at += len(word)

    def _simple(self, line: int) -> Simple:
        assignments, words, redirects = list[Assignment](), list[Word | Assignment](), list[Redirect]()
        while True:
            self.blanks()
            if redirect := self._redirect():
                redirects.append(redirect)
            elif self.peek() in ("", "\n", ";", "&", "|", ")") or (self.peek() == "(" and (words or assignments)):
                break
            elif not words and (assigned := self._assignment()):
                assignments.append(assigned)
            elif words and isinstance(words[0], Word) and words[0].plain in _DECLARING:
                words.append(self._assignment() or self.word())
            else:
                words.append(self.word())
        if not (assignments or words or redirects):
            raise self.fail(f"{self.peek(12)!r} is not expected here")
        return Simple(line, tuple(assignments), tuple(words), tuple(redirects))

    def _assignment(self) -> Assignment | None:
        found = _ASSIGNMENT.match(self.text, self.at)
        if not found:
            return None
        line, self.at = self.line, found.end()
        index = None if found[2] is None else self.inner(found[2]).word(frozenset())
        value: Word | tuple[tuple[Word | None, Word], ...]
        value = self._array() if self.peek() == "(" else self.word()
        return Assignment(found[1], value, line, bool(found[3]), index)

    def _array(self) -> tuple[tuple[Word | None, Word], ...]:
        line, found = self.line, list[tuple[Word | None, Word]]()
        self.at += 1
        while True:
            self.lines()
            if self.peek() == ")":
                self.at += 1
                return tuple(found)
            if not self.peek() or self.peek() in ";&|<>(":
                raise BashError(line, "an array whose ( is not closed")
            indexed = re.compile(r"\[([^\]\s]+)\]=").match(self.text, self.at)
            if indexed:
                self.at = indexed.end()
            found.append((self.inner(indexed[1]).word(frozenset()) if indexed else None, self.word()))

    def _redirects(self) -> tuple[Redirect, ...]:
        found: list[Redirect] = []
        while True:
            self.blanks()
            if not (redirect := self._redirect()):
                return tuple(found)
            found.append(redirect)

    def _redirect(self) -> Redirect | None:
        found = _REDIRECT.match(self.text, self.at)
        if not found:
            return None
        self.at = found.end()
        self.blanks()
        if found[1] not in ("<<", "<<-"):
            return Redirect(found[1], self.word())
        ending, redirect = self.word(), Redirect(found[1], Word((), self.line))
        literal = any(isinstance(p, Literal) and p.quoted for p in ending.parts)
        text = "".join(p.text for p in ending.parts if isinstance(p, Literal))
        self.documents.append((text, literal, redirect))
        return redirect

    def _documents(self) -> None:
        for ending, literal, redirect in self.documents:
            line, lines = self.line, []
            while True:
                if self.at >= len(self.text):
                    raise BashError(line, f"a here-document without its end, {ending}")
                end = self.text.find("\n", self.at)
                end = len(self.text) if end < 0 else end
                one, self.at = self.text[self.at : end], min(end + 1, len(self.text))
                one = one.lstrip("\t") if redirect.op == "<<-" else one
                if one == ending:
                    break
                lines.append(one + "\n")
            body = "".join(lines)
            parts = (Literal(body, True),) if literal else tuple(type(self)(body, line).quoted(""))
            redirect.target = Word(parts, line)
        self.documents = []
