"""Commands of bash from text."""

from __future__ import annotations

import re

from stretto.compat.megatron.bash.simple import SimpleCommands
from stretto.compat.megatron.bash.syntax import (
    AndOr,
    Arith,
    BashError,
    Case,
    Command,
    Condition,
    For,
    Function,
    Group,
    If,
    Literal,
    Loop,
    Pipeline,
    Word,
)

_FUNCTION = re.compile(r"([^\s;&|<>()$'\"`=]+)[ \t]*\([ \t]*\)")
_CLOSING = frozenset({"then", "elif", "else", "fi", "do", "done", "esac", "}"})
_ENDINGS = (";;", ";&")
_CONDITION_ENDS = frozenset(" \t\n")


def parse(text: str, line: int = 1) -> tuple[Command, ...]:
    """The commands of a script; `BashError` for what is no bash, or none that is read here."""
    parser = Parser(text.removeprefix("\ufeff").replace("\r\n", "\n"), line)
    commands = parser.commands("")
    if parser.at < len(parser.text):
        raise parser.fail(f"{parser.peek(12)!r} is not expected here")
    return commands


class Parser(SimpleCommands):
    """Reads commands; which characters belong to a word is the reader's."""

    def commands(self, end: str) -> tuple[Command, ...]:
        """Commands up to a closing character, a word that closes what is around them, or the end of the text."""
        self.depth += 1
        if self.depth > 2 * 50:
            raise self.fail("commands nested more than 100 deep")
        found: list[Command] = []
        while True:
            self.lines()
            if not self.peek() or self.peek() == end or self.peek(2) in _ENDINGS or self.reserved() in _CLOSING:
                break
            if end != ")" and self.peek() == ")":
                raise self.fail("a ) that nothing opens")
            line, command = self.line, self.and_or()
            self.blanks()
            if self.peek() == "&" and self.peek(2) != "&&":
                self.at += 1
                command = Group(line, (command,), True)
            elif self.peek() == ";" and self.peek(2) not in _ENDINGS:
                self.at += 1
            elif self.peek() not in ("\n", "", end) and self.peek(2) not in _ENDINGS:
                raise self.fail(f"{self.peek(12)!r} is not expected here")
            found.append(command)
        self.depth -= 1
        return tuple(found)

    def and_or(self) -> Command:
        first = self.pipeline()
        while True:
            self.blanks()
            if (op := self.peek(2)) not in ("&&", "||"):
                return first
            self.at += 2
            self.lines()
            first = AndOr(first.line, first, op, self.pipeline())

    def pipeline(self) -> Command:
        line, negated = self.line, False
        while (word := self.reserved()) in ("!", "time"):
            negated ^= word == "!"
            self.at += len(word)
            self.blanks()
            if word == "time" and self.peek(3) == "-p ":
                self.at += 3
                self.blanks()
        commands = [self.command()]
        self.blanks()
        while self.peek() == "|" and self.peek(2) != "||":
            self.at += 2 if self.peek(2) == "|&" else 1
            self.lines()
            commands.append(self.command())
            self.blanks()
        return Pipeline(line, tuple(commands), negated) if negated or len(commands) > 1 else commands[0]

    def command(self) -> Command:
        self.blanks()
        line, word = self.line, self.reserved()
        if word in ("function",) or (_FUNCTION.match(self.text, self.at) and self.peek() != "("):
            return self._function(line)
        if self.peek(2) == "((" and (end := self._arithmetic_end(self.at + 2, "))")):
            command: Command = Arith(line, self._arithmetic(self.at + 2, end, 2))
        elif self.peek() == "(":
            self.at += 1
            body = self.commands(")")
            if self.peek() != ")":
                raise BashError(line, "a ( that is not closed")
            self.at += 1
            return Group(line, body, True, self._redirects())
        elif word in _COMPOUND:
            self.at += len(word)
            command = _COMPOUND[word](self, line)
        elif word in ("select", "coproc"):
            raise self.fail(f"{word!r} is not read here")
        else:
            return self._simple(line)
        if redirects := self._redirects():
            return Group(line, (command,), False, redirects)
        return command

    def _brace(self, line: int) -> Command:
        body = self.commands("")
        self._take("}")
        return Group(line, body, False)

    def _if(self, line: int) -> Command:
        branches, otherwise = [], tuple[Command, ...]()
        while True:
            condition = self.commands("")
            self._take("then")
            branches.append((condition, self.commands("")))
            self.lines()
            if self.reserved() != "elif":
                break
            self._take("elif")
        if self.reserved() == "else":
            self._take("else")
            otherwise = self.commands("")
        self._take("fi")
        return If(line, self.line, tuple(branches), otherwise)

    def _case(self, line: int) -> Command:
        self.blanks()
        subject, items = self.word(), []
        self._take("in")
        self.lines()
        while self.reserved() != "esac":
            if self.peek() == "(":
                self.at += 1
            patterns = []
            while True:
                self.blanks()
                patterns.append(self.word())
                self.blanks()
                if self.peek() != "|":
                    break
                self.at += 1
            if self.peek() != ")":
                raise self.fail("a ) is missing after a pattern")
            self.at += 1
            body = self.commands("")
            ending = re.compile(r";;&|;&|;;").match(self.text, self.at)
            self.at = ending.end() if ending else self.at
            items.append((tuple(patterns), body, ending[0] if ending else ";;"))
            self.lines()
            if not ending and self.reserved() != "esac":
                raise self.fail("'esac' is missing")
        self._take("esac")
        return Case(line, self.line, subject, tuple(items))

    def _for(self, line: int) -> Command:
        self.blanks()
        if self.peek(2) == "((":
            return self._for_arithmetic(line)
        name = self.word().plain
        words: list[Word] | None = None
        if name is None:
            raise self.fail("a loop without the name of a variable")
        self.lines()
        if self.reserved() == "in":
            self._take("in")
            words = []
            self.blanks()
            while self.peek() not in ("\n", ";", ""):
                words.append(self.word())
                if not words[-1].parts:
                    raise self.fail(f"{self.peek(12)!r} is not expected in the words of a loop")
                self.blanks()
        if self.peek() == ";":
            self.at += 1
        body = self._done()
        return For(line, self.line, name, None if words is None else tuple(words), body)

    def _for_arithmetic(self, line: int) -> Command:
        end = self._arithmetic_end(self.at + 2, "))")
        three = self.text[self.at + 2 : end].split(";")
        if not end or len(three) != 3:
            raise self.fail("a loop that is not read here")
        first, test, step = (
            (Arith(line, Word(tuple(self.inner(t).quoted("")), line)),) if t.strip() else () for t in three
        )
        self.at = end + 2
        self.blanks()
        if self.peek() == ";":
            self.at += 1
        body = self._done()
        return Loop(line, self.line, test, body, False, first, step)

    def _done(self) -> tuple[Command, ...]:
        self._take("do")
        body = self.commands("")
        self._take("done")
        return body

    def _while(self, line: int, *, until: bool = False) -> Command:
        condition = self.commands("")
        body = self._done()
        return Loop(line, self.line, condition, body, until)

    def _until(self, line: int) -> Command:
        return self._while(line, until=True)

    def _double_bracket(self, line: int) -> Command:
        words: list[Word] = []
        while True:
            self.lines()
            if not self.peek():
                raise BashError(line, "a [[ that is not closed")
            if self.peek(2) == "]]":
                self.at += 2
                return Condition(line, tuple(words))
            words.append(self._condition_word(words))

    def _condition_word(self, words: list[Word]) -> Word:
        line = self.line
        if words and words[-1].plain == "=~":  # a regular expression may have parentheses
            return self.word(_CONDITION_ENDS)
        for op in ("&&", "||", "(", ")", "<", ">"):
            if self.text.startswith(op, self.at):
                self.at += len(op)
                return Word((Literal(op, False),), line)
        word = self.word()
        if not word.parts:
            raise self.fail(f"{self.peek(12)!r} is not expected in [[ ]]")
        return word

    def _function(self, line: int) -> Command:
        if self.reserved() == "function":
            self.at += len("function")
            self.blanks()
        found = _FUNCTION.match(self.text, self.at) or re.compile(r"([^\s(){}]+)").match(self.text, self.at)
        if not found:
            raise self.fail("a function without a name")
        self.at = found.end()
        self.lines()
        return Function(line, found[1], self.command())


_COMPOUND = {
    "{": Parser._brace,
    "if": Parser._if,
    "case": Parser._case,
    "for": Parser._for,
    "while": Parser._while,
    "until": Parser._until,
    "[[": Parser._double_bracket,
}
