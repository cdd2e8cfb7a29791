"""Commands that bash would ask other programs to run: noted, not run; shells among them are followed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from stretto.compat.megatron.bash import builtins
from stretto.compat.megatron.bash.state import Call
from stretto.compat.megatron.bash.syntax import Simple
from stretto.compat.megatron.bash.unknown import marks

if TYPE_CHECKING:
    from stretto.compat.megatron.bash.compounds import Compounds
    from stretto.compat.megatron.bash.shell import Shell

_SHELLS = frozenset({"bash", "sh", "zsh", "dash", "ksh"})
_STARTERS = frozenset(
    [
        *("srun", "sbatch", "mpirun", "mpiexec", "nohup", "env", "time", "timeout", "numactl", "taskset", "stdbuf"),
        *(
            "sudo",
            "nsys",
            "docker",
            "podman",
            "singularity",
            "apptainer",
            "enroot",
            "deepspeed",
            "pdsh",
            "bsub",
            "qsub",
        ),
    ]
)
"""Programs that start what stands behind their own options."""
_SCRIPTS = (".sh", ".slurm", ".sbatch")
NOT_RUN = "is the output of a command, which is not run here"


@dataclass(frozen=True)
class _Inner:
    """What another shell is to run: a text that begins in a line of this script, or a file with its name."""

    text: str
    arguments: list[str]
    line: int
    file: str | None = None


def start(shell: Shell, words: list[str], command: Simple) -> None:
    """Note a command; follow the text or the file that it has a shell run."""
    state = shell.state
    state.status = None
    if state.out is not None:
        state.out.append(_output(shell, words, command))
    inner = _inner(shell, words, command)
    if inner is None:
        state.shared.calls.append(Call(tuple(words), command.line))
    else:
        _follow(shell, inner, command.line)


def _follow(shell: Shell, inner: _Inner, line: int) -> None:
    """Such a shell has the variables that are exported, and no functions."""

    def way(other: Compounds) -> None:
        state = other.state
        state.variables = {n: v for n, v in state.variables.items() if v.exported}
        state.functions, state.locals, state.out = {}, [], None
        state.arguments, state.told, state.script = inner.arguments, True, inner.file or state.script
        other.within(inner.text, line, "exit", first=inner.line)

    shell.subshell(way)
    shell.state.status = None


def _inner(shell: Shell, words: list[str], command: Simple) -> _Inner | None:
    """What a shell among the words of a command runs; None: there is no shell among them."""
    starts = PurePosixPath(words[0]).name in _STARTERS
    for n, word in enumerate(words if starts else words[:1]):
        if PurePosixPath(word).name in _SHELLS:
            return _of_shell(shell, words[n + 1 :], command)
        if word.endswith(_SCRIPTS) and (n == 0 or words[n - 1][:1] != "-") and not marks(word):
            return _file(shell, words[n:], command)
        if word.startswith("--wrap"):
            return _Inner(word.partition("=")[2] or "".join(words[n + 1 : n + 2]), [], command.line)
        if re.search(r"\.py$|^-m$", word):
            return None
    if words[0] == "sbatch":
        return _document(shell, command)
    if words[0] == "ssh" and " " in words[-1]:
        return _Inner(words[-1], [], command.line)
    return None


def _of_shell(shell: Shell, words: list[str], command: Simple) -> _Inner | None:
    for n, word in enumerate(words):
        if re.fullmatch(r"-[a-zA-Z]*c", word):
            return _Inner(words[n + 1], words[n + 3 :], command.line) if n + 1 < len(words) else None
        if not word.startswith("-") and (n == 0 or words[n - 1] != "-o"):
            return _file(shell, words[n:], command)
    return _document(shell, command)


def _file(shell: Shell, words: list[str], command: Simple) -> _Inner | None:
    text = builtins.read(shell, words[0], command.line, shell.state.shared.unread)
    return None if text is None else _Inner(text, words[1:], 1, words[0])


def _document(shell: Shell, command: Simple) -> _Inner | None:
    found = [r for r in command.redirects if r.op in ("<<", "<<-", "<<<")]
    return _Inner(shell.value(found[-1].target), [], found[-1].target.line) if found else None


def _output(shell: Shell, words: list[str], command: Simple) -> str:
    """What a program without effects says: those that scripts find their own directory with, and arithmetic."""
    name, *arguments = words
    if name == "cat" and not arguments and (document := _document(shell, command)):
        return document.text
    if not marks("".join(arguments)) and (said := _said(shell, name, arguments, command.line)) is not None:
        return said + "\n"
    return shell.state.shared.mark(f"$({name})", command.line, NOT_RUN)


def _said(shell: Shell, name: str, arguments: list[str], line: int) -> str | None:
    if name == "dirname" and len(arguments) == 1:
        return str(PurePosixPath(arguments[0]).parent) if arguments[0] else "."
    if name == "basename" and 1 <= len(arguments) <= 2:
        last = PurePosixPath(arguments[0]).name or arguments[0][:1]
        ending = arguments[1] if len(arguments) == 2 else ""
        return last if last == ending else last.removesuffix(ending)
    if name == "expr" and re.fullmatch(r"-?\d+( [-+*/%] -?\d+)*", " ".join(arguments)):
        return shell.computed(" ".join(arguments), line)
    if name == "seq" and 1 <= len(arguments) <= 2 and all(re.fullmatch(r"\d{1,4}", a) for a in arguments):
        first, last_ = (1, int(arguments[0])) if len(arguments) == 1 else map(int, arguments)
        return "\n".join(map(str, range(first, last_ + 1)))
    return None
