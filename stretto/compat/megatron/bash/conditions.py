"""`[ ... ]` and `[[ ... ]]`: true, false, or not known without running the script."""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from stretto.compat.megatron.bash import pattern
from stretto.compat.megatron.bash.expand import Expansion
from stretto.compat.megatron.bash.syntax import BashError, Word
from stretto.compat.megatron.bash.unknown import marks

_NUMBERS: Mapping[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt, "-le": operator.le, "-gt": operator.gt,
    "-ge": operator.ge,
}  # fmt: skip
_TEXTS = ("=", "==", "!=", "<", ">", "=~", "-ef", "-nt", "-ot")
_UNARY = re.compile(r"-[a-zA-Z]")


class Conditions:
    """One test. After `holds`, `why` has the marks of what is not known of it, or says what is."""

    def __init__(self, expansion: Expansion, line: int):
        self.expansion, self.line, self.why = expansion, line, ""

    def simple(self, words: Sequence[Word]) -> bool | None:
        """`[ words ]`, which is an ordinary command: each word may become several, or none."""
        arguments: list[str] = []
        for n, word in enumerate(words):
            self.expansion.lenient = n > 0 and words[n - 1].plain in ("-z", "-n")
            arguments += self.expansion.fields([word])
        self.expansion.lenient = False
        return _Test(arguments, self).value()

    def double(self, words: Sequence[Word]) -> bool | None:
        """`[[ words ]]`: nothing is split, the right side is a pattern."""
        return _Double(words, self).value()

    def unary(self, op: str, value: str) -> bool | None:
        if op == "-v":
            name, _, index = value.rstrip("]").partition("[")
            found = self.expansion.state.get(name, index or "0")
            if found is None:
                self.expansion.state.shared.assumed.setdefault(f"${name}", self.line)
            return None if found and self._known(found) is None else found is not None
        if op not in ("-z", "-n"):
            self.why = self.why or f"[ {op} {value} ] asks for a file" if not marks(value) else marks(value)
            return None
        unknown = marks(value)
        if unknown and not value.strip(unknown):
            return self._known(value)
        return (not value) == (op == "-z")

    def _known(self, text: str) -> bool | None:
        if found := marks(text):
            self.why = self.why or found
            return None
        return True

    def binary(self, left: str, op: str, right: str, *, patterns: bool) -> bool | None:
        if self._known(left + right) is None or op in ("-ef", "-nt", "-ot"):
            self.why = self.why or f"{op} asks for files"
            return None
        if op in _NUMBERS:
            a, b = (self._number(t, computed=patterns) for t in (left, right))
            return None if a is None or b is None else _NUMBERS[op](a, b)
        if op == "=~":
            return self._regular(left, right)
        if op in "<>":
            return left < right if op == "<" else left > right
        equal = pattern.matches(left, right) if patterns else left == right
        return equal == (op != "!=")

    def _number(self, text: str, *, computed: bool) -> int | None:
        if computed:
            text = self.expansion.computed(text, self.line)
        try:
            return int(text)
        except ValueError:
            self.why = self.why or (marks(text) or f"{text!r} is not a number")
            return None

    def _regular(self, left: str, right: str) -> bool | None:
        try:
            return (
                re.search(re.sub(r"\[\[:(\w+):\]", lambda m: f"[{pattern.CLASSES.get(m[1], '')}", right), left)
                is not None
            )
        except re.error:
            self.why = self.why or f"{right!r} is not read here"
            return None


class _Grammar(ABC):
    """Or, and, not and parentheses, by recursive descent; `at` is the place of the next word."""

    def __init__(self, of: Conditions, operators: tuple[str, str], words: Sequence[str | None]):
        self.of, self.at, self.words = of, 0, words
        self.either, self.both = operators

    @abstractmethod
    def _primary(self) -> bool | None:
        """One test, or what stands after a `!` or in parentheses."""

    def _peek(self, ahead: int = 0) -> str:
        """A word as it is written; of one that is quoted or to be expanded, and after the last, nothing."""
        at = self.at + ahead
        return (self.words[at] or "") if at < len(self.words) else ""

    @property
    def _left(self) -> int:
        return len(self.words) - self.at

    def _or(self) -> bool | None:
        result = self._and()
        while self._peek() == self.either:
            self.at += 1
            result = either(result, self._and())
        return result

    def _and(self) -> bool | None:
        result = self._primary()
        while self._peek() == self.both:
            self.at += 1
            result = both(result, self._primary())
        return result

    def _nested(self) -> bool | None:
        """After a `!` or a parenthesis."""
        self.at += 1
        if self._peek(-1) == "!":
            return negated(self._primary())
        result = self._or()
        self.at += 1
        return result


class _Test(_Grammar):
    """The arguments of `[`, by their number, and with -a, -o, ! and parentheses."""

    def __init__(self, arguments: list[str], of: Conditions):
        super().__init__(of, ("-o", "-a"), arguments)

    def value(self) -> bool | None:
        if not self.words:
            return False
        result = self._or()
        if self._left > 0:
            self.of.why = self.of.why or "bash rejects it: more words than a test has"
            return None
        return result

    def _primary(self) -> bool | None:
        if self._left >= 3 and self._peek(1) in (*_TEXTS, *_NUMBERS):
            self.at += 3
            return self.of.binary(self._peek(-3), self._peek(-2), self._peek(-1), patterns=False)
        if (self._left >= 2 and self._peek() == "!") or (self._left >= 3 and self._peek() == "("):
            return self._nested()
        if self._left >= 2 and _UNARY.fullmatch(self._peek()) and self._peek(1) not in ("-a", "-o"):
            self.at += 2
            return self.of.unary(self._peek(-2), self._peek(-1))
        self.at += 1
        return self.of.unary("-n", self._peek(-1))


class _Double(_Grammar):
    """The words of `[[`."""

    def __init__(self, words: Sequence[Word], of: Conditions):
        super().__init__(of, ("||", "&&"), [word.plain for word in words])
        self.whole = words

    def value(self) -> bool | None:
        result = self._or()
        if self._left > 0:
            raise BashError(self.of.line, "a [[ that is not read here")
        return result

    def _primary(self) -> bool | None:
        if self._left <= 0:
            raise BashError(self.of.line, "a [[ that ends too early")
        if self._peek() in ("!", "("):
            return self._nested()
        expand, op = self.of.expansion, self._peek()
        if _UNARY.fullmatch(op) and self._left > 1 and self._peek(1) not in _TEXTS:
            expand.lenient = op in ("-z", "-n")
            value = expand.value(self.whole[self.at + 1])
            expand.lenient = False
            self.at += 2
            return self.of.unary(op, value)
        op = self._peek(1)
        if op in (*_TEXTS, *_NUMBERS) and self._left > 2:
            left, right = self.whole[self.at], self.whole[self.at + 2]
            self.at += 3
            textual = op in _NUMBERS or op in "<>"
            value = expand.value(right) if textual else expand.pattern(right)
            return self.of.binary(expand.value(left), op, value, patterns=True)
        self.at += 1
        return self.of.unary("-n", expand.value(self.whole[self.at - 1]))


def negated(value: bool | None) -> bool | None:
    """Not."""
    return None if value is None else not value


def both(a: bool | None, b: bool | None) -> bool | None:
    """And."""
    return False if a is False or b is False else None if a is None or b is None else True


def either(a: bool | None, b: bool | None) -> bool | None:
    """Or."""
    return True if a is True or b is True else None if a is None or b is None else False
