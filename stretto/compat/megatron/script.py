"""The command of a launch script that trains, and its flags, without running the script."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath

from stretto.arguments.errors import Violation
from stretto.compat.megatron.bash import BashError, Call, Shared, marks, read

Flags = list[list[str]]
"""Each flag with its values."""

_MODEL = frozenset(
    [
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--seq-length",
        "--micro-batch-size",
        "--global-batch-size",
        "--train-iters",
        "--train-samples",
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--lr",
        "--max-position-embeddings",
    ]
)
"""Flags that training has and other programs rarely; two of them are enough."""
_TRAINS = re.compile(r"train|finetune|sft", re.IGNORECASE)
_LAUNCHERS = re.compile(r"(torch\.distributed\.(run|launch)|torchrun|deepspeed.*|accelerate.*)$")
_WAY = "name the command that trains, or leave the other out of the script"


def _whole(text: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,8}", text) is not None


def _open(word: str, before: str) -> bool:
    """Whether a word of a launcher could be any option."""
    return bool(marks(word)) and not word.strip(marks(word)) and not before.startswith("-")


@dataclass(frozen=True)
class Program:
    """A command that starts a program: the words of its launchers, its name, and its own words."""

    launcher: tuple[str, ...]
    name: str
    words: tuple[str, ...]
    line: int

    @property
    def trains(self) -> int:
        """How likely it is the one that trains; 0: it is not."""
        flags = {word.partition("=")[0] for word in self.words}
        by_name = bool(_TRAINS.search(PurePosixPath(self.name).name))
        by_flags = len(flags & _MODEL) >= 2
        likely = bool(flags & _MODEL) or any(map(marks, self.words))
        return (2 * by_flags + by_name) if likely else 0

    @property
    def processes(self) -> int | None:
        """Processes that its launchers start, where they say so."""
        if any(_open(word, before) for before, word in pairwise(("", *self.launcher))):
            return None
        said = {f.lstrip("-").replace("_", "-"): v for f, v in _pairs(self.launcher)}
        if per_node := said.get("nproc-per-node"):
            nodes = said.get("nnodes", "1")
            return int(per_node) * int(nodes) if _whole(per_node) and _whole(nodes) else None
        if any(PurePosixPath(word).name in ("srun", "mpirun", "mpiexec") for word in self.launcher):
            ranks = next((said[f] for f in ("ntasks", "np", "n") if f in said), "")
            return int(ranks) if _whole(ranks) else None
        return None


@dataclass(frozen=True)
class Script:
    """What a script passes on to the program that trains.

    `processes`: of the run, where its launchers say so; `notes`: what was taken for granted; `problems`: what could
    not be filled in, by line.
    """

    flags: Flags
    processes: int | None
    notes: tuple[str, ...]
    problems: tuple[Violation, ...]
    written: Flags = field(default_factory=list)
    """The flags with what is not known as the script has it."""


def script_of(
    text: str, *, name: str | None = None, arguments: Sequence[str] = (), given: Mapping[str, str] | None = None
) -> Script:
    """The flags of the one command that trains, as bash would pass them on.

    Args:
        text: The script.
        name: Its path, as the user says it; files that it sources are looked for beside it, too.
        arguments: What it would be started with.
        given: Variables of its environment.
    """
    try:
        shared = read(text, script=name, arguments=arguments, given=given)
    except BashError as error:
        return Script([], None, (), (_problem(f"the script cannot be followed: {error}"),))
    except RecursionError:
        return Script([], None, (), (_problem("the script cannot be followed: it is nested too deeply"),))
    program, problem = _trainer(shared)
    missing = [
        _problem(f"line {line}: {file} is not here, and may set anything: bring it, or leave the line out")
        for file, line in shared.missing.items()
    ]
    if program is None:
        return Script([], None, _notes(shared), (*missing, _problem(problem)))
    flags, wrong = flags_of(program.words)
    unknown = [_problem(f"{who}: {what}") for who, what in _unknown(shared, flags)]
    notes = _notes(shared)
    if program.name:
        notes = (f"line {program.line} trains, with {shared.unknowns.shown(program.name)}", *notes)
    written = [[shared.unknowns.shown(word) for word in flag] for flag in flags]
    return Script(flags, program.processes, notes, (*missing, *unknown, *wrong), written)


def words_of(text: str) -> Flags:
    """Every flag of a script's training command with its values; what is not known of them is as the script has it."""
    return script_of(text).written


def flags_of(words: Sequence[str]) -> tuple[Flags, tuple[Violation, ...]]:
    """Every flag of a command line with its values, one list each, and the words that belong to none."""
    found, wrong = Flags(), list[Violation]()
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            if re.search(r"\s", flag):
                wrong.append(_problem(f"{word!r} is one word, as bash passes it on: no flag has blanks"))
            found.append([flag, value] if equals else [flag])
        elif found:
            found[-1].append(word)
        elif not marks(word):
            wrong.append(_problem(f"{word!r} stands before the first flag and belongs to none"))
        else:
            found.append([word])
    return found, tuple(wrong)


def _trainer(shared: Shared) -> tuple[Program | None, str]:
    """The one command that trains, or why there is none."""
    bare = [word for call in shared.calls if call.words[0].startswith("--") for word in call.words]
    programs = [p for call in shared.calls if (p := _program(call))]
    best = max((p.trains for p in programs), default=0)
    found = [p for p in programs if p.trains == best] if best else []
    if not found and bare:
        return Program((), "", tuple(bare), shared.calls[0].line), ""
    if not found:
        return None, _none(shared)
    first = found[0]
    if other := next((p for p in found if p.words != first.words), None):
        if other.line == first.line:
            return (
                None,
                f"line {first.line} trains more than once, with other flags each time: convert a script of one run",
            )
        names = [shared.unknowns.shown(p.name) for p in (first, other)]
        return None, f"{names[0]} in line {first.line} and {names[1]} in line {other.line} both train: {_WAY}"
    return first, ""


def _none(shared: Shared) -> str:
    loose = next((c for c in shared.calls if len(_MODEL & {w.partition("=")[0] for w in c.words}) >= 2), None)
    if loose is not None:
        unknown = "; ".join(str(u) for u in shared.unknowns.of("".join(loose.words)))
        return f"line {loose.line}: which program trains is not known: {unknown or 'no word ends in .py'}"
    if shared.unread:
        return "no command in it trains; " + ", ".join(
            f"{file}, which line {line} starts, is not here" for file, line in shared.unread.items()
        )
    if shared.ended and any(name.startswith("$") for name in shared.assumed):
        given = ", ".join(_name(name) for name in shared.assumed)
        return f"it ends in line {shared.ended[0]} before it trains, where {given} are taken for unset: say them"
    if not any(word.startswith("--") for call in shared.calls for word in call.words):
        return "there is no flag in it: what is read is a script of bash that starts Megatron-LM"
    return "no command in it trains: none runs a .py with Megatron-LM's flags"


def _program(call: Call) -> Program | None:
    """A command apart into launchers, program and its words; None: it runs no Python."""
    places = list[tuple[int, int, str]]()
    for n, word in enumerate(call.words):
        if word.endswith(".py") and not word.startswith("--"):
            places.append((n, n + 1, word))
        elif word in ("-m", "--module") and n + 1 < len(call.words) and not _LAUNCHERS.match(call.words[n + 1]):
            places.append((n, n + 2, call.words[n + 1]))
    if not places:
        return None
    start, end, name = next((p for p in places if _TRAINS.search(PurePosixPath(p[2]).name)), places[0])
    return Program(call.words[:start], name, call.words[end:], call.line)


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Options with their values: `--a b`, `--a=b`, `-n8`."""
    found: list[tuple[str, str]] = []
    for word, after in zip(words, [*words, ""][1:], strict=True):
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            short = re.fullmatch(r"(-n)(\d+)", word)
            found.append((short[1], short[2]) if short else (option, value if equals else after))
    return found


def _unknown(shared: Shared, flags: Flags) -> list[tuple[str, str]]:
    """Each expansion that could not be filled in, with the flag that it stands behind."""
    found: dict[str, str] = {}
    for flag, *values in flags:
        for unknown in shared.unknowns.of("".join([flag, *values])):
            found.setdefault(str(unknown), "the command" if marks(flag) else flag)
    return [(flag, unknown) for unknown, flag in found.items()]


def _notes(shared: Shared) -> tuple[str, ...]:
    taken = [f"{_name(name)} (line {line})" for name, line in shared.assumed.items()]
    return (f"taken for unset: {', '.join(taken)}",) if taken else ()


def _name(name: str) -> str:
    return "its arguments" if name == "$@" else name


def _problem(text: str) -> Violation:
    return Violation("megatron", (), text)
