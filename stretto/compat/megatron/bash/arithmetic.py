"""Arithmetic of bash: whole numbers of 64 bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_TOKEN = re.compile(
    r"\s*(?:(0[xX][0-9a-fA-F]+|\d+#\w+|\d+)|([A-Za-z_]\w*(?:\[[^\]]*\])?)|(<<=|>>=|\*\*|\+\+|--|&&|\|\||<<|>>|[-+*/%&|^<>=!]=|[-+*/%<>=!~&|^?:(),]))"
)
_LEVELS = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<=", ">=", "<", ">"), ("<<", ">>"), ("+", "-"),
    ("*", "/", "%"), ("**",),
)  # fmt: skip
_ASSIGNING = frozenset({"=", "+=", "-=", "*=", "/=", "%=", "<<=", ">>=", "&=", "|=", "^="})


class ArithmeticUnknownError(Exception):
    """A name whose value is not a number that is known; `args[0]` has the marks that say why."""


class Arithmetic:
    """One expression. `get` gives the text of a variable, `set_` takes a new one."""

    def __init__(self, text: str, get: Callable[[str], str], set_: Callable[[str, str], None], depth: int = 0):
        self.get, self.set_, self.depth = get, set_, depth
        self.tokens, self.at = _tokens(text), 0
        if depth > 30:
            raise ValueError("names in arithmetic that stand for each other")

    def value(self) -> int:
        """Its value; `ValueError` for what is no arithmetic."""
        if not self.tokens:
            return 0
        result = self._comma()
        if self.at < len(self.tokens):
            raise ValueError(f"{self.tokens[self.at]!r} is not expected in arithmetic")
        return result

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _comma(self) -> int:
        result = self._assigned()
        while self._peek() == ",":
            self.at += 1
            result = self._assigned()
        return result

    def _assigned(self) -> int:
        name, op = self._peek(), self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else ""
        if _is_name(name) and op in _ASSIGNING:
            self.at += 2
            right = self._assigned()
            result = right if op == "=" else _BINARY[op[:-1]](self._number(name), right)
            self.set_(name, str(_wrapped(result)))
            return _wrapped(result)
        condition = self._binary(0)
        if self._peek() != "?":
            return condition
        self.at += 1
        yes = self._skipping(not condition, self._comma)
        if self._peek() != ":":
            raise ValueError("a ? without its : in arithmetic")
        self.at += 1
        no = self._skipping(bool(condition), self._assigned)
        return yes if condition else no

    def _skipping(self, skipped: bool, read: Callable[[], int]) -> int:
        """What is not computed sets nothing, and may be unknown."""
        if not skipped:
            return read()
        get, set_ = self.get, self.set_
        self.get, self.set_ = lambda _name: "1", lambda _name, _value: None
        try:
            return read()
        except ZeroDivisionError:
            return 0
        finally:
            self.get, self.set_ = get, set_

    def _binary(self, level: int) -> int:
        if level == len(_LEVELS):
            return self._unary()
        left = self._binary(level + 1)
        while (op := self._peek()) in _LEVELS[level]:
            self.at += 1
            if op in ("&&", "||"):
                right = self._skipping(bool(left) == (op == "||"), lambda: self._binary(level + 1))
                left = int(bool(left) and bool(right)) if op == "&&" else int(bool(left) or bool(right))
            else:
                right = self._binary(level if op == "**" else level + 1)
                left = _wrapped(_BINARY[op](left, right))
        return left

    def _unary(self) -> int:
        op = self._peek()
        if not op:
            raise ValueError("arithmetic that ends too early")
        self.at += 1
        if op in ("-", "+", "!", "~"):
            value = self._unary()
            return {"-": -value, "+": value, "!": int(not value), "~": ~value}[op]
        if op in ("++", "--"):
            name, self.at = self._peek(), self.at + 1
            value = self._number(name) + (1 if op == "++" else -1)
            self.set_(name, str(value))
            return value
        if op == "(":
            value = self._comma()
            if self._peek() != ")":
                raise ValueError("a ( that is not closed in arithmetic")
            self.at += 1
            return value
        if _is_name(op):
            value = self._number(op)
            if self._peek() in ("++", "--"):
                self.set_(op, str(value + (1 if self._peek() == "++" else -1)))
                self.at += 1
            return value
        return _constant(op)

    def _number(self, name: str) -> int:
        return Arithmetic(self.get(name), self.get, self.set_, self.depth + 1).value()


def _tokens(text: str) -> list[str]:
    found, at, text = [], 0, text.rstrip()
    while at < len(text):
        token = _TOKEN.match(text, at)
        if not token:
            raise ValueError(f"{text[at : at + 12]!r} is not expected in arithmetic")
        found.append(token[0].strip())
        at = token.end()
    return found


def _is_name(token: str) -> bool:
    return bool(token) and (token[0].isalpha() or token[0] == "_")


def _constant(token: str) -> int:
    base, mark, digits = token.partition("#")
    if mark:
        return int(digits, int(base))
    if not token[0].isdigit():
        raise ValueError(f"{token!r} is not expected in arithmetic")
    return int(token, 16 if token[:2] in ("0x", "0X") else 8 if len(token) > 1 and token[0] == "0" else 10)


def _wrapped(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _divided(a: int, b: int) -> int:
    """Towards zero, as C does."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _power(a: int, b: int) -> int:
    if b < 0:
        raise ValueError("a negative exponent in arithmetic")
    return pow(a, b, 2**64) if abs(a) > 1 else a**b if b < 2 else a ** (2 - b % 2)


_BINARY: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divided,
    "%": lambda a, b: a - _divided(a, b) * b,
    "**": _power,
    "<<": lambda a, b: a << (b % 64),
    ">>": lambda a, b: a >> (b % 64),
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "==": lambda a, b: int(a == b),
    "!=": lambda a, b: int(a != b),
    "<=": lambda a, b: int(a <= b),
    ">=": lambda a, b: int(a >= b),
    "<": lambda a, b: int(a < b),
    ">": lambda a, b: int(a > b),
}
