"""What a script of bash is made of: words and commands, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


class BashError(ValueError):
    """Text that is not read here, with its line."""

    def __init__(self, line: int, problem: str):
        super().__init__(f"line {line}: {problem}")
        self.line = line


@dataclass(frozen=True)
class Literal:
    """Text as it stands; what is quoted is neither split nor a pattern."""

    text: str
    quoted: bool


@dataclass(frozen=True)
class Parameter:
    """`$name`, `${name[index]op arg}`: `op` is one of bash's, or "", with `#` in front for a length, `!` for a name."""

    name: str
    line: int
    quoted: bool
    text: str
    op: str = ""
    index: Word | None = None
    args: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Arithmetic:
    """`$((...))`, with expansions inside."""

    word: Word
    line: int
    quoted: bool


@dataclass(frozen=True)
class Substitution:
    """`$(...)`, backquotes, and `<(...)`."""

    body: tuple[Command, ...]
    line: int
    quoted: bool
    text: str
    process: bool = False


Part = Literal | Parameter | Arithmetic | Substitution


@dataclass(frozen=True)
class Word:
    """One word before its expansion; no parts: an empty one."""

    parts: tuple[Part, ...]
    line: int

    @property
    def plain(self) -> str | None:
        """The text of a word without quotes and expansions, as reserved words are."""
        if len(self.parts) == 1 and isinstance(part := self.parts[0], Literal) and not part.quoted:
            return part.text
        return None


@dataclass(frozen=True)
class Assignment:
    """`name=value`, `name+=value`, `name[index]=value`, `name=(...)`: of an array, (index or None, value) each."""

    name: str
    value: Word | tuple[tuple[Word | None, Word], ...]
    line: int
    append: bool = False
    index: Word | None = None


@dataclass
class Redirect:
    """`op` with its target; of a here-document the target is its body, which is read where the line ends."""

    op: str
    target: Word


@dataclass(frozen=True)
class Simple:
    """Assignments, and the words of a command; those of `declare` and its like may be assignments, too."""

    line: int
    assignments: tuple[Assignment, ...] = ()
    words: tuple[Word | Assignment, ...] = ()
    redirects: tuple[Redirect, ...] = ()


@dataclass(frozen=True)
class Pipeline:
    """`a | b`, perhaps with `!` before it."""

    line: int
    commands: tuple[Command, ...]
    negated: bool = False


@dataclass(frozen=True)
class AndOr:
    """`first && second` or `first || second`."""

    line: int
    first: Command
    op: str
    second: Command


@dataclass(frozen=True)
class Group:
    """`{ ...; }` or, as a copy of the shell, `( ... )` or `... &`."""

    line: int
    body: tuple[Command, ...]
    subshell: bool
    redirects: tuple[Redirect, ...] = ()


@dataclass(frozen=True)
class If:
    """Conditions with their bodies in order, and what is done otherwise."""

    line: int
    end: int
    branches: tuple[tuple[tuple[Command, ...], tuple[Command, ...]], ...]
    otherwise: tuple[Command, ...]


@dataclass(frozen=True)
class Case:
    """`case subject in pattern) body ;;`: patterns, body and terminator of each item."""

    line: int
    end: int
    subject: Word
    items: tuple[tuple[tuple[Word, ...], tuple[Command, ...], str], ...]


@dataclass(frozen=True)
class For:
    """`for name in words`; no words: the script's arguments."""

    line: int
    end: int
    name: str
    words: tuple[Word, ...] | None
    body: tuple[Command, ...]


@dataclass(frozen=True)
class Loop:
    """`while`, `until`, and `for ((first; test; step))`, whose condition and step are arithmetic commands."""

    line: int
    end: int
    condition: tuple[Command, ...]
    body: tuple[Command, ...]
    until: bool = False
    first: tuple[Command, ...] = ()
    step: tuple[Command, ...] = ()


@dataclass(frozen=True)
class Function:
    """`name() body`."""

    line: int
    name: str
    body: Command


@dataclass(frozen=True)
class Arith:
    """`(( ... ))`."""

    line: int
    word: Word


@dataclass(frozen=True)
class Condition:
    """`[[ ... ]]` as its words; operators are words without quotes."""

    line: int
    words: tuple[Word, ...]
    redirects: tuple[Redirect, ...] = field(default=())


Command = Simple | Pipeline | AndOr | Group | If | Case | For | Loop | Function | Arith | Condition
