"""`$name`, `${name[index]}`, and what bash makes of a value: defaults, lengths, slices, patterns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from stretto.compat.megatron.bash import pattern
from stretto.compat.megatron.bash.expand import Chunk, Expansion, Kind
from stretto.compat.megatron.bash.state import Variable
from stretto.compat.megatron.bash.syntax import Literal, Parameter, Word
from stretto.compat.megatron.bash.unknown import marks

_LENIENT = frozenset("-=?+")


class Parameters(Expansion):
    """Expands parameters."""

    def _parameter(self, p: Parameter, kind: Kind) -> list[Chunk]:
        op = p.op
        if op.startswith("!"):
            return self._indirect(p, kind)
        if op.startswith("#") and not p.args:
            return [(self._length(p), kind)]
        if op and op[-1] in _LENIENT and op[0] != "@":
            return self._with_default(p, kind)
        values = self._values(p)
        if values is None:
            values = [self._unset(p.name, p.text, p.line)]
        if op == ":":
            return self._joined(p, self._sliced(p, values), kind)
        return self._joined(p, [self._edited(p, v) for v in values] if op else values, kind)

    def _joined(self, p: Parameter, values: Sequence[str], kind: Kind) -> list[Chunk]:
        if kind == "quoted" and self._which(p) == "*":
            return [(self._separators()[:1].join(values), kind)]
        out: list[Chunk] = []
        for n, value in enumerate(values):
            out += [None, (value, kind)] if n else [(value, kind)]
        return out

    def _which(self, p: Parameter) -> str:
        """`@` or `*`, where all values are asked for."""
        if p.name in ("@", "*"):
            return p.name
        plain = p.index.plain if p.index else None
        return plain if plain in ("@", "*") else ""

    def _values(self, p: Parameter) -> list[str] | None:
        """The value, or all of them; None: not set."""
        state = self.state
        if p.name in ("@", "*"):
            if not state.told and not state.arguments:
                state.shared.assumed.setdefault("$@", p.line)
            return list(state.arguments)
        if p.name == "#":
            if not state.told:
                state.shared.assumed.setdefault("$@", p.line)
            return [str(len(state.arguments))]
        if p.name == "?" and state.status is not None:
            return ["0" if state.status else "1"]
        if p.name in ("?", "$", "!", "-"):
            return [state.shared.mark(p.text, p.line, "is known to a running shell alone")]
        if p.name.isdigit():
            return self._argument(int(p.name))
        if self._which(p):
            variable = state.variables.get(p.name)
            if variable is None:
                return None
            return self._all(p, variable)
        index = "0" if p.index is None else self._index(p.name, p.index)
        if p.name == "BASH_SOURCE" and p.name not in state.variables:
            return None if state.script is None else [state.script]
        value = state.get(p.name, index)
        if value is None and p.name in state.variables:
            return None if p.op else [""]
        return None if value is None else [value]

    def _all(self, p: Parameter, variable: Variable) -> list[str]:
        if isinstance(variable.value, str):
            return [variable.value]
        if variable.keyed and len(variable.value) > 1:
            return [self.state.shared.mark(p.text, p.line, "has no order that is known", "")]
        return list(variable.value.values())

    def _argument(self, n: int) -> list[str] | None:
        if n == 0:
            return None if self.state.script is None else [self.state.script]
        return [self.state.arguments[n - 1]] if n <= len(self.state.arguments) else None

    def _index(self, name: str, index: Word) -> str:
        variable = self.state.variables.get(name)
        text = self.value(index)
        return text if variable is not None and variable.keyed else self.computed(text, index.line)

    def _unset(self, name: str, text: str, line: int) -> str:
        """What a name stands for that has no value."""
        state = self.state
        if name.isdigit() and name != "0" and state.told:
            return ""
        if self.lenient or name in state.shared.given:
            state.shared.assumed.setdefault(f"${name}", line)
            return ""
        if name in state.emptied:
            return ""
        if name == "0":
            return state.shared.mark(text, line, "is the name of the script, which is read from elsewhere")
        if name.isdigit():
            return state.shared.mark(text, line, "is an argument of the script, to be said after its name")
        return state.shared.mark(text, line, "is not set in the script", name)

    def _with_default(self, p: Parameter, kind: Kind) -> list[Chunk]:
        state, (word,) = self.state, p.args
        how, colon = p.op[-1], p.op[0] == ":"
        values = self._values(p)
        if values is None and not (p.name in state.emptied or (p.name.isdigit() and state.told)):
            state.shared.assumed.setdefault(f"${p.name}", p.line)
        text = "".join(values or [])
        if text and not text.strip(marks(text) or "\0"):
            return self._joined(p, values or [], kind)  # whether it is set is not known
        there = bool(values) and (bool(text) or not colon)
        if how == "+":
            return self._default(word, kind) if there else [("", kind)]
        if there:
            return self._joined(p, values or [], kind)
        if how == "=":
            state.set(p.name, self.value(word))
            return [(state.get(p.name) or "", kind)]
        if how == "?":
            return [(state.shared.mark(p.text, p.line, "must be set for the script to run", p.name), kind)]
        return self._default(word, kind)

    def _default(self, word: Word, kind: Kind) -> list[Chunk]:
        chunks = self._chunks(word.parts)
        if kind == "quoted":
            return chunks or [("", kind)]
        return [None if c is None else (c[0], "split" if c[1] == "literal" else c[1]) for c in chunks]

    def _indirect(self, p: Parameter, kind: Kind) -> list[Chunk]:
        if self._which(p) and p.name not in ("@", "*"):
            variable = self.state.variables.get(p.name)
            if variable is None:
                return [(self._unset(p.name, p.text, p.line), kind)]
            if isinstance(variable.value, dict) and variable.keyed and len(variable.value) > 1:
                return [(self._all(p, variable)[0], kind)]
            keys = list(variable.value) if isinstance(variable.value, dict) else ["0"]
            return self._joined(p, keys, kind)
        name = "".join(self._values(p) or [self._unset(p.name, p.text, p.line)])
        found = re.fullmatch(r"(\w+)(?:\[(@|\*|\w+)\])?", name)
        if marks(name) or not found:
            return [(marks(name)[:1] or self.state.shared.mark(p.text, p.line, "names no variable"), kind)]
        index = Word((Literal(found[2], False),), p.line) if found[2] else None
        return self._parameter(replace(p, name=found[1], index=index, op=p.op[1:]), kind)

    def _length(self, p: Parameter) -> str:
        variable = self.state.variables.get(p.name)
        if self._which(p) and variable is not None and isinstance(variable.value, dict):
            return str(len(variable.value))
        values = self._values(p)
        if values is None:
            values = [] if self._which(p) else [self._unset(p.name, p.text, p.line)]
        if found := marks("".join(values)):
            return found[0]
        return str(len(values) if self._which(p) else len(values[0]))

    def _sliced(self, p: Parameter, values: list[str]) -> list[str]:
        bounds = [self.computed(self.value(arg), p.line) for arg in p.args]
        if found := marks("".join([*bounds, *values])):
            return [found[0]]
        start, *size = map(int, bounds)
        if p.name in ("@", "*"):
            values = [self.state.script or "", *values]
        cut: Sequence[str] = values if self._which(p) else values[0]
        start = max(0, start + len(cut)) if start < 0 else start
        end = len(cut) if not size else start + size[0] if size[0] >= 0 else len(cut) + size[0]
        taken = cut[start:end]
        return list(taken) if self._which(p) else ["".join(taken)]

    def _edited(self, p: Parameter, value: str) -> str:
        arguments = [self.pattern(p.args[0]), *map(self.value, p.args[1:])] if p.args else []
        if found := marks("".join([value, *arguments])):
            return found[0]
        op, first = p.op, arguments[0] if arguments else ""
        if op[0] == "#":
            return pattern.without_prefix(value, first, longest=len(op) == 2)
        if op[0] == "%":
            return pattern.without_suffix(value, first, longest=len(op) == 2)
        if op[0] == "/":
            return pattern.replaced(value, first, arguments[1], op)
        if op[0] in "^,":
            change = str.upper if op[0] == "^" else str.lower
            return "".join(
                change(c) if pattern.matches(c, first or "?") else c for c in value[: None if op[1:] else 1]
            ) + ("" if op[1:] else value[1:])
        if op in ("@U", "@L"):
            return value.upper() if op == "@U" else value.lower()
        return self.state.shared.mark(p.text, p.line, "is not computed here")
