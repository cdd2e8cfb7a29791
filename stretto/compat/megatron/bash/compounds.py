"""Compound commands, and what comes of a script where a condition is not known: all ways on are followed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from stretto.compat.megatron.bash import pattern
from stretto.compat.megatron.bash.assigning import Assigning
from stretto.compat.megatron.bash.conditions import Conditions, both, either, negated
from stretto.compat.megatron.bash.names import assigned
from stretto.compat.megatron.bash.state import Leave, State
from stretto.compat.megatron.bash.syntax import AndOr, Case, Command, For, Group, If, Loop, Pipeline
from stretto.compat.megatron.bash.unknown import marks

Path = Callable[["Compounds"], None]
"""One way on from where a condition is not known."""


class Compounds(Assigning):
    """Follows compound commands on a state."""

    def __init__(self, state: State, depth: int = 0):
        self.state, self.depth = state, depth

    def run(self, commands: Iterable[Command]) -> None:
        """Follow commands one after the other."""
        for command in commands:
            self.execute(command)

    @abstractmethod
    def execute(self, command: Command) -> None:
        """Follow one command."""

    @abstractmethod
    def within(self, text: str, line: int, leaves: str, first: int = 1) -> None:
        """Follow a whole script, which begins in line `first`."""

    _reason = ""

    def _test(self, line: int, ask: Callable[[Conditions], bool | None]) -> None:
        condition = Conditions(self, line)
        self.state.status = ask(condition)
        self._reason = condition.why

    def why(self, line: int, end: int) -> str:
        """Why what is set between two lines is not known."""
        found = self.state.shared.unknowns.of(self._reason)
        said = "; ".join(f"{u.text} (line {u.line}) {u.why}" for u in found) or self._reason
        lines = f"line {line}" if line == end else f"lines {line} to {end}"
        return f"{lines} set it under a condition that is not known{f': {said}' if said else ''}"

    def fork(self) -> Compounds:
        """A copy on its own state."""
        other = type(self)(self.state.fork(), self.depth)
        other._reason = self._reason
        return other

    def either_way(self, line: int, end: int, *ways: Path) -> None:
        """Follow each way on its own copy, and go on with what they agree on; a way that ends the script is none."""
        why, ended = self.why(line, end), list[State]()
        leaves = list[Leave]()
        for way in ways:
            other = self.fork()
            try:
                way(other)
            except Leave as leave:
                if leave.what != "exit":
                    leaves.append(leave)
                continue
            ended.append(other.state)
        if leaves and (ended or any(one.what != leaves[0].what for one in leaves)):
            raise Leave("somewhere")
        if not ended:
            raise leaves[0] if leaves else Leave("exit")
        self.state.merge(ended, line, why)

    def astray(self, body: object, line: int, end: int, follow: Path | None = None) -> None:
        """How often a body runs, or how far, is not known: what it sets is not, either; its commands are seen once."""
        names, why = assigned(body, self.state.functions), self.why(line, end)
        self.state.blur(names, line, why)
        if follow:
            other = self.fork()
            try:
                follow(other)
            except Leave as leave:
                if leave.what == "exit":
                    pass
        self.state.status = None

    # Compound commands

    def _pipeline(self, command: Pipeline) -> None:
        if len(command.commands) == 1:
            self.execute(command.commands[0])
        else:
            for one in command.commands:
                self.subshell(partial(type(self).execute, command=one))
            if self.state.out is not None:
                self.state.out.append(
                    self.state.shared.mark("a | b", command.line, "is the output of commands, which are not run here")
                )
            self.state.status = None
        if command.negated:
            self.state.status = negated(self.state.status)

    def subshell(self, way: Path, *, heard: bool = False) -> None:
        """Follow commands in a copy of the shell, which changes nothing here."""
        other = self.fork()
        if not heard:
            other.state.out = None if self.state.out is None else []
        try:
            way(other)
        except Leave as leave:
            if leave.what == "somewhere":
                other.state.status = None
        if heard:
            self.state.out = other.state.out
        self.state.status = other.state.status

    def _and_or(self, command: AndOr) -> None:
        self.execute(command.first)
        status, wanted = self.state.status, command.op == "&&"
        if status is None:

            def second(other: Compounds) -> None:
                other.execute(command.second)
                other.state.status = (both if wanted else either)(None, other.state.status)

            def first(other: Compounds) -> None:
                other.state.status = None

            self.either_way(command.line, command.second.line, second, first)
        elif status == wanted:
            self.execute(command.second)

    def _group(self, command: Group) -> None:
        if command.subshell:
            self.subshell(lambda other: other.run(command.body), heard=True)
        else:
            silent = any(r.op in (">", ">>", ">|", "&>", "&>>") for r in command.redirects)
            heard, self.state.out = self.state.out, None if silent else self.state.out
            self.run(command.body)
            self.state.out = heard if silent else self.state.out

    def _if(self, command: If, at: int) -> None:
        if at == len(command.branches):
            self.state.status = True
            return self.run(command.otherwise)
        condition, body = command.branches[at]
        self.run(condition)
        if self.state.status is None:
            return self.either_way(
                command.line, command.end, lambda other: other.run(body), lambda other: other._if(command, at + 1)
            )
        return self.run(body) if self.state.status else self._if(command, at + 1)

    def _case(self, command: Case, at: int, subject: str, *, entered: bool) -> None:
        if at == len(command.items):
            self.state.status = True
            return None
        patterns, body, ending = command.items[at]

        def taken(other: Compounds) -> None:
            other.run(body)
            if ending != ";;":
                other._case(command, at + 1, subject, entered=ending == ";&")

        def passed(other: Compounds) -> None:
            other._case(command, at + 1, subject, entered=False)

        fits: bool | None = entered
        for one in patterns:
            text = self.pattern(one)
            unknown = marks(subject + text)
            self._reason = unknown or self._reason
            fits = either(fits, pattern.matches(subject, text) if not unknown or text == "*" else None)
        if fits is None:
            return self.either_way(command.line, command.end, taken, passed)
        return taken(self) if fits else passed(self)

    def _for(self, command: For) -> None:
        words = self.state.arguments if command.words is None else self.fields(command.words)
        if found := marks("".join(words)):
            self._reason = found
            return self.astray(command, command.line, command.end, lambda other: other.run(command.body))
        for word in list(words):
            self.state.set(command.name, word)
            if not self._turn(command.body, command, command.line, command.end):
                break
        return None

    def _turn(self, body: Sequence[Command], whole: object, line: int, end: int) -> bool:
        """One turn of a loop; whether another may follow."""
        try:
            self.run(body)
        except Leave as leave:
            if leave.what == "somewhere":
                self.astray(whole, line, end, lambda other: other.run(body))
                return False
            if leave.what not in ("break", "continue"):
                raise
            if leave.levels > 1:
                raise Leave(leave.what, leave.levels - 1) from None
            return leave.what == "continue"
        return True

    def _loop(self, command: Loop) -> None:
        self.run(command.first)
        while True:
            self.state.shared.step(command.line)
            if command.condition:
                self.run(command.condition)
            going = negated(self.state.status) if command.until else self.state.status
            if not command.condition:
                going = True
            if going is None:
                return self.astray(command, command.line, command.end, lambda other: other.run(command.body))
            if not going or not self._turn(command.body, command, command.line, command.end):
                self.state.status = True
                return None
            self.run(command.step)
