"""What a shell knows while a script is read: variables, arguments, and what all copies of it share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from stretto.compat.megatron.bash.syntax import BashError, Command
from stretto.compat.megatron.bash.unknown import Unknown, Unknowns, marks

_STEPS = 100_000
_LENGTH = 10**6

Array = dict[str, str]
"""Values by index, as text, in the order of the indices; of `declare -A`, by key."""


@dataclass
class Variable:
    """A value, or those of an array."""

    value: str | Array
    exported: bool = False
    keyed: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Call:
    """A command that another program is asked to run."""

    words: tuple[str, ...]
    line: int


class Leave(Exception):  # noqa: N818 - it is no error
    """`exit`, `return`, `break`, `continue`, and a way on that is not known."""

    def __init__(self, what: str, levels: int = 1):
        super().__init__(what)
        self.what, self.levels = what, levels


@dataclass
class Shared:
    """What is found out on every path: commands, what is not known, what was taken for unset."""

    given: Mapping[str, str]
    calls: list[Call] = field(default_factory=list)
    unknowns: Unknowns = field(default_factory=Unknowns)
    assumed: dict[str, int] = field(default_factory=dict)
    """Names that are set outside of the script or not at all, and were taken for unset; each with its line."""
    missing: dict[str, int] = field(default_factory=dict)
    """Files that the script sources and that are not here; each with its line."""
    unread: dict[str, int] = field(default_factory=dict)
    """Scripts that it starts and that are not here; each with its line."""
    ended: list[int] = field(default_factory=list)
    steps: int = 0
    line: int = 1

    def step(self, line: int, letters: int = 0) -> None:
        """Count a command, or a value by its length; a script that does not end is given up."""
        self.steps += 1 + letters // 100
        self.line = line or self.line
        if self.steps > _STEPS:
            raise BashError(self.line, f"more than {_STEPS} commands: does a loop end?")

    def mark(self, text: str, line: int, why: str, name: str = "") -> str:
        """The mark of something unknown."""
        return self.unknowns.mark(Unknown(text, line, why, name))


class State:
    """Variables, functions and arguments of one shell."""

    def __init__(self, shared: Shared, script: str | None, arguments: Iterable[str]):
        self.shared, self.script = shared, script
        self.arguments = list(arguments)
        self.told = bool(self.arguments)
        """Whether the arguments are known: none given is none known."""
        self.variables = {name: Variable(value, exported=True) for name, value in shared.given.items()}
        self.emptied: frozenset[str] = frozenset()
        """Names that the script itself has unset."""
        self.functions: dict[str, Command] = {}
        self.directory: Path | None = Path()
        self.status: bool | None = True
        self.out: list[str] | None = None
        self.locals: list[dict[str, Variable | None]] = []

    def fork(self) -> State:
        """A copy that shares what is found out."""
        other = copy.copy(self)
        other.variables = copy.deepcopy(self.variables)
        other.functions, other.arguments = dict(self.functions), list(self.arguments)
        other.locals = [dict(frame) for frame in self.locals]
        other.out = None if self.out is None else list(self.out)
        return other

    def get(self, name: str, index: str = "0") -> str | None:
        """The value of a variable; None: it is not set."""
        variable = self.variables.get(name)
        if variable is None:
            return None
        if isinstance(variable.value, str):
            return variable.value if index == "0" else None
        if index.startswith("-") and not variable.keyed:
            last = max(map(int, variable.value), default=-1)
            index = str(last + 1 + int(index))
        return variable.value.get(index)

    def set(self, name: str, value: str | Array) -> None:
        """Set a variable. What the user has said of it stays, where the script's own value is not known."""
        text = value if isinstance(value, str) else "".join(value.values())
        if len(text) > _LENGTH:
            raise BashError(self.shared.line, f"${name} grows beyond {_LENGTH} letters")
        self.shared.step(0, len(text) + (0 if isinstance(value, str) else 10 * len(value)))
        if name in self.shared.given and marks(text):
            return
        old = self.variables.get(name)
        if old is None:
            self.variables[name] = Variable(value)
        elif isinstance(value, str) and isinstance(old.value, dict):
            old.value["0"] = value
        else:
            old.value = value

    def blur(self, names: Iterable[str], line: int, why: str) -> None:
        """These are not known any more; what the user has said of one counts again."""
        for name in names:
            old = self.variables.get(name, Variable(""))
            said = self.shared.given.get(name)
            mark = self.shared.mark(f"${name}", line, why, name) if said is None else said
            self.variables[name] = replace(old, value=mark)

    def merge(self, others: list[State], line: int, why: str) -> None:
        """Go on from where several paths meet: what differs between them is not known."""
        first = others[0]
        names = dict.fromkeys(name for other in others for name in other.variables)
        differ = [n for n in names if any(other.variables.get(n) != first.variables.get(n) for other in others)]
        self.variables, self.functions = first.variables, first.functions
        self.blur(differ, line, why)
        for other in others[1:]:
            self.functions = {n: f for n, f in self.functions.items() if other.functions.get(n) == f}
            self.directory = first.directory if other.directory == first.directory else None
        if any(other.arguments != first.arguments for other in others):
            self.arguments = [self.shared.mark("$@", line, why)]
        else:
            self.arguments, self.told = first.arguments, first.told
        if self.out is not None:
            same = all(other.out == first.out for other in others)
            self.out = first.out if same else [*self.out, self.shared.mark("the output", line, why)]
        self.locals, self.emptied = first.locals, first.emptied.intersection(*(other.emptied for other in others))
        self.status = first.status if all(other.status == first.status for other in others) else None
