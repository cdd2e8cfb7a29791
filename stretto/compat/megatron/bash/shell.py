"""Follows a script as bash would, and runs nothing: where a condition is not known, all ways are followed."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.compat.megatron.bash import builtins, programs
from stretto.compat.megatron.bash.compounds import Compounds
from stretto.compat.megatron.bash.expand import split
from stretto.compat.megatron.bash.parser import parse
from stretto.compat.megatron.bash.state import Leave, Variable
from stretto.compat.megatron.bash.syntax import (
    AndOr,
    Arith,
    Assignment,
    BashError,
    Case,
    Command,
    Condition,
    For,
    Function,
    Group,
    If,
    Loop,
    Pipeline,
    Simple,
    Substitution,
    Word,
)
from stretto.compat.megatron.bash.unknown import marks

_DEEP = 15


class Shell(Compounds):
    """Executes commands on a state."""

    def text(self, text: str, line: int) -> None:
        """Follow a text that a command is given to run, as `eval` is."""
        if self.depth > _DEEP:
            raise BashError(line, f"functions and files that call each other more than {_DEEP} deep")
        self.depth += 1
        try:
            self.run(parse(text, line))
        finally:
            self.depth -= 1

    def within(self, text: str, line: int, leaves: str, first: int = 1) -> None:
        """Follow a whole file or script, which ends where it says so; `first`: the line that it begins in."""
        commands = parse(text, first)
        if self.depth > _DEEP:
            raise BashError(line, f"functions and files that call each other more than {_DEEP} deep")
        self.depth += 1
        try:
            self.run(commands)
        except Leave as leave:
            if leave.what == "somewhere":
                self.astray(commands, line, line)
            elif leave.what != leaves:
                raise
        finally:
            self.depth -= 1

    def pieces(self, text: str) -> list[str]:
        """A text as `read` splits it."""
        return [piece for piece, _ in split(text, self._separators()) if piece]

    def execute(self, command: Command) -> None:
        """Follow one command."""
        self.state.shared.step(command.line)
        match command:
            case Simple():
                self._simple(command)
            case Pipeline():
                self._pipeline(command)
            case AndOr():
                self._and_or(command)
            case Group():
                self._group(command)
            case If():
                self._if(command, 0)
            case Case():
                self._case(command, 0, self.value(command.subject), entered=False)
            case For():
                self._for(command)
            case Loop():
                self._loop(command)
            case Function():
                self.state.functions[command.name], self.state.status = command.body, True
            case Arith():
                value = self.computed(self.value(command.word), command.line)
                self._reason, self.state.status = marks(value), None if marks(value) else int(value) != 0
            case Condition():
                self._test(command.line, lambda c: c.double(command.words))

    # Simple commands

    def _simple(self, command: Simple) -> None:
        for redirect in command.redirects:
            if redirect.op not in ("<<", "<<-"):
                self.value(redirect.target)
        words = [w for w in command.words if isinstance(w, Word)]
        declared = [w for w in command.words if isinstance(w, Assignment)]
        arguments = self.fields(words)
        if not arguments:
            self.state.status = True
            for one in command.assignments:
                self.assign(one)
            return
        heard = self.state.out
        if any(r.op in (">", ">>", ">|", "&>", "&>>") for r in command.redirects):
            self.state.out = None
        before = {one.name: self.state.variables.get(one.name) for one in command.assignments}
        try:
            if command.assignments:
                self._prefix(command.assignments)
            self._call(command, arguments, declared)
        finally:
            for name, variable in before.items():
                if variable is None:
                    self.state.variables.pop(name, None)
                else:
                    self.state.variables[name] = variable
            if heard is not None and self.state.out is None:
                self.state.out = heard

    def _prefix(self, assignments: Sequence[Assignment]) -> None:
        for one in assignments:
            old = self.state.variables.pop(one.name, None)
            if old is not None:
                self.state.variables[one.name] = Variable(old.value, True, old.keyed)
            self.assign(one)
            self.state.variables[one.name].exported = True

    def _call(self, command: Simple, arguments: list[str], declared: Sequence[Assignment]) -> None:
        name = arguments[0]
        if name in self.state.functions:
            self._function(name, arguments[1:], command.line)
        elif name in builtins.DECLARING:
            builtins.declare(self, arguments, declared)
        elif name in builtins.TABLE:
            builtins.TABLE[name](self, arguments, command)
        else:
            programs.start(self, arguments, command)

    def test(self, words: Sequence[Word], line: int) -> None:
        """`[` and `test`."""
        self._test(line, lambda c: c.simple(words))

    def _function(self, name: str, arguments: list[str], line: int) -> None:
        if self.depth > _DEEP:
            raise BashError(line, f"functions and files that call each other more than {_DEEP} deep")
        state, body = self.state, self.state.functions[name]
        saved, told, depth = state.arguments, state.told, self.depth
        state.arguments, state.told, self.depth = arguments, True, depth + 1
        state.locals.append({})
        try:
            self.execute(body)
        except Leave as leave:
            if leave.what == "somewhere":
                self.astray(body, line, line)
            elif leave.what != "return":
                raise
        finally:
            for local, variable in state.locals.pop().items():
                if variable is None:
                    state.variables.pop(local, None)
                else:
                    state.variables[local] = variable
            state.arguments, state.told, self.depth = saved, told, depth

    def substituted(self, s: Substitution) -> str:
        """The output of commands, where all of them are known ones."""
        if s.process:
            return self.state.shared.mark(s.text, s.line, "is the name of a pipe")
        other = self.fork()
        other.state.out = []
        try:
            other.run(s.body)
        except Leave as leave:
            if leave.what == "somewhere":
                other.state.out = [self.state.shared.mark(s.text, s.line, "depends on a condition that is not known")]
        self.state.status = other.state.status
        text = "".join(other.state.out or [])
        if marks(text):
            found = self.state.shared.unknowns.of(text)
            if any(u.why == programs.NOT_RUN for u in found):
                return self.state.shared.mark(s.text, s.line, programs.NOT_RUN)
        return text.rstrip("\n")
