"""The commands of bash itself, as far as they bear on the words of others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stretto.compat.megatron.bash.state import Leave, Variable
from stretto.compat.megatron.bash.syntax import Assignment, BashError, Simple, Word
from stretto.compat.megatron.bash.unknown import marks

if TYPE_CHECKING:
    from stretto.compat.megatron.bash.shell import Shell

Builtin = Callable[["Shell", list[str], Simple], None]

DECLARING = frozenset({"declare", "typeset", "local", "readonly", "export"})
_LARGEST = 2**20
_OF_TOOLS = re.compile(
    r"(^|/)(\.\w*rc|\.?(bash_)?profile|activate|deactivate|conda\.sh|modules?\.sh|bash|setvars\.sh|z?lmod.*)$"
)
"""Files that set up tools, such as conda and environment modules, and none of a script's own variables."""


def declare(shell: Shell, arguments: list[str], assignments: Sequence[Assignment]) -> None:
    """`declare`, `local`, `export` and their like: options, names, and assignments."""
    state, options = shell.state, "".join(a[1:] for a in arguments[1:] if a[:1] in "-+")
    plain = [a for a in arguments[1:] if a[:1] not in "-+"]
    local = bool(state.locals) and arguments[0] in ("declare", "typeset", "local") and "g" not in options
    made = [(name, name.partition("=")[2] if "=" in name else None) for name in plain]
    names = [name.partition("=")[0] for name in plain] + [a.name for a in assignments]
    for name in names:
        if local and name not in state.locals[-1]:
            state.locals[-1][name] = state.variables.pop(name, None)
        if name not in state.variables and (set(options) & set("aAi") or any(a.name == name for a in assignments)):
            keyed = "A" in options
            state.variables[name] = Variable({} if keyed or "a" in options else "", keyed=keyed, integer="i" in options)
        elif local and name not in state.variables:
            state.variables[name] = Variable("")
    for name, value in made:
        if value is not None:
            state.set(name.partition("=")[0], value)
    for one in assignments:
        shell.assign(one)
    if arguments[0] == "export" or "x" in options:
        for name in names:
            if name in state.variables:
                state.variables[name].exported = "n" not in options
    state.status = True


def _unset(shell: Shell, arguments: list[str], _command: Simple) -> None:
    for name in arguments[1:]:
        found = re.fullmatch(r"(\w+)\[(\w+)\]", name)
        variable = shell.state.variables.get(found[1] if found else name)
        if found and variable and isinstance(variable.value, dict):
            variable.value.pop(found[2], None)
        elif name == "-f":
            break
        elif not name.startswith("-"):
            shell.state.variables.pop(name, None)
            shell.state.emptied |= {name}
    shell.state.status = True


def _set(shell: Shell, arguments: list[str], _command: Simple) -> None:
    if "--" in arguments or (len(arguments) > 1 and arguments[1][:1] not in "-+"):
        start = arguments.index("--") + 1 if "--" in arguments else 1
        shell.state.arguments, shell.state.told = arguments[start:], True
    shell.state.status = True


def _shift(shell: Shell, arguments: list[str], _command: Simple) -> None:
    n = int(arguments[1]) if len(arguments) > 1 and re.fullmatch(r"[0-9]{1,9}", arguments[1]) else 1
    if marks("".join(shell.state.arguments[:n])) and len(shell.state.arguments) == 1:
        return
    shell.state.status = n <= len(shell.state.arguments)
    if shell.state.status:
        del shell.state.arguments[:n]
        shell.state.told = True


def _leave(shell: Shell, arguments: list[str], command: Simple) -> None:
    number = int(arguments[1]) if len(arguments) > 1 and re.fullmatch(r"[0-9]{1,9}", arguments[1]) else 1
    if arguments[0] in ("exit", "return") and len(arguments) > 1:
        shell.state.status = arguments[1] == "0"
    if arguments[0] == "exit":
        shell.state.shared.ended.append(command.line)
    raise Leave(arguments[0], number)


def _source(shell: Shell, arguments: list[str], command: Simple) -> None:
    if len(arguments) < 2:
        raise BashError(command.line, f"{arguments[0]} without a file")
    shell.state.status = True
    text = read(shell, arguments[1], command.line, shell.state.shared.missing)
    if text is None:
        shell.state.status = True
        return
    saved, script = (shell.state.arguments, shell.state.told), shell.state.script
    if len(arguments) > 2:
        shell.state.arguments, shell.state.told = arguments[2:], True
    sources = shell.state.variables.pop("BASH_SOURCE", None)
    shell.state.variables["BASH_SOURCE"] = Variable({"0": arguments[1]})
    shell.within(text, command.line, "return")
    if sources is None:
        shell.state.variables.pop("BASH_SOURCE", None)
    else:
        shell.state.variables["BASH_SOURCE"] = sources
    shell.state.script = script
    if len(arguments) > 2:
        shell.state.arguments, shell.state.told = saved


def read(shell: Shell, name: str, line: int, missing: dict[str, int]) -> str | None:
    """The text of a file that a script reads, where it is there; else it is noted as missing."""
    state = shell.state
    path = None if marks(name) else Path(name).expanduser()
    if path is not None and not path.is_absolute():
        beside = Path(state.script).parent if state.script else Path()
        places = [] if state.directory is None else [state.directory / path]
        path = next((p for p in (*places, beside / path) if p.is_file()), None)
    if path is None or not path.is_file() or path.stat().st_size > _LARGEST:
        shown = "; ".join(u.text for u in state.shared.unknowns.of(name)) if marks(name) else name
        if not _OF_TOOLS.search(shown):
            missing.setdefault(shown, line)
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BashError(line, f"{name} cannot be read: {error}") from error


def _eval(shell: Shell, arguments: list[str], command: Simple) -> None:
    shell.text(" ".join(arguments[1:]), command.line)


def _test(shell: Shell, arguments: list[str], command: Simple) -> None:
    words = [w for w in command.words[1:] if isinstance(w, Word)]
    if arguments[0] == "[" and (not words or words.pop().plain != "]"):
        raise BashError(command.line, "a [ that is not closed")
    shell.test(words, command.line)


def _echo(shell: Shell, arguments: list[str], _command: Simple) -> None:
    words, end = arguments[1:], "\n"
    escapes = False
    while words and re.fullmatch("-[neE]+", words[0]):
        end = "" if "n" in words[0] else end
        escapes = escapes or "e" in words[0]
        words = words[1:]
    text = " ".join(words)
    _say(shell, (_unescaped(text) if escapes else text) + end)


def _printf(shell: Shell, arguments: list[str], command: Simple) -> None:
    variable = arguments[2] if arguments[1:2] == ["-v"] and len(arguments) > 3 else None
    form, *values = arguments[3:] if variable else arguments[1:] or [""]
    directives = re.findall(r"%(?!%)[^a-zA-Z]*[a-zA-Z]", form)
    text = shell.state.shared.mark("printf", command.line, "is not computed here")
    if set(directives) <= {"%s", "%d"} and (not directives or len(values) % len(directives) == 0):
        rounds = max(1, len(values) // max(1, len(directives)))
        given = iter(values or [""] * len(directives))
        text = "".join(
            re.sub(r"%([sd%])", lambda m: "%" if m[1] == "%" else next(given), _unescaped(form)) for _ in range(rounds)
        )
    if variable:
        shell.state.set(variable, text)
        shell.state.status = True
    else:
        _say(shell, text)


def _say(shell: Shell, text: str) -> None:
    if shell.state.out is not None:
        shell.state.out.append(text)
    shell.state.status = True


def _unescaped(text: str) -> str:
    letters = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda m: letters[m[1]], text)


def _directory(shell: Shell, arguments: list[str], _command: Simple) -> None:
    target = arguments[-1] if len(arguments) > 1 else "~"
    known = shell.state.directory is not None and not marks(target) and target not in ("-", "~")
    shell.state.directory = shell.state.directory / target if known and shell.state.directory is not None else None
    shell.state.status = True


def _pwd(shell: Shell, _arguments: list[str], command: Simple) -> None:
    here = shell.state.directory
    if here is None or here == Path():
        _say(shell, shell.state.shared.mark("$(pwd)", command.line, "is where the script is started from"))
    else:
        _say(shell, f"{here}\n")


def _read(shell: Shell, arguments: list[str], command: Simple) -> None:
    names = [a for a in arguments[1:] if re.fullmatch(r"[A-Za-z_]\w*", a)] or ["REPLY"]
    strings = [r for r in command.redirects if r.op == "<<<"]
    options = "".join(a[1:] for a in arguments[1:] if a.startswith("-"))
    if arguments[0] == "read" and len(strings) == 1 and set(options) <= set("ra"):
        value = shell.value(strings[0].target)
        pieces = shell.pieces(value)
        if "a" in options:
            shell.state.set(names[-1], {str(n): piece for n, piece in enumerate(pieces)})
            shell.state.variables[names[-1]].value = {str(n): piece for n, piece in enumerate(pieces)}
        elif len(names) == 1 or len(pieces) <= len(names):
            values = [" ".join(value.split())] if len(names) == 1 else [*pieces, *[""] * len(names)]
            for name, one in zip(names, values, strict=False):
                shell.state.set(name, one)
        else:
            shell.state.blur(names, command.line, "is read from more words than names")
        shell.state.status = True
        return
    shell.state.blur(names, command.line, f"is what {arguments[0]} reads when the script runs")
    shell.state.status = None


def _let(shell: Shell, _arguments: list[str], command: Simple) -> None:
    words = [shell.value(w) for w in command.words[1:] if isinstance(w, Word)]  # a * in them is no pattern
    values = [shell.computed(a, command.line) for a in words] or ["0"]
    shell.state.status = None if marks(values[-1]) else int(values[-1]) != 0


def _command(shell: Shell, arguments: list[str], command: Simple) -> None:
    rest = [w for w in command.words[1:] if isinstance(w, Word)]
    while rest and (rest[0].plain or "").startswith("-"):
        if rest[0].plain in ("-v", "-V"):
            shell.state.status = None
            return
        rest = rest[1:]
    if rest:
        shell.execute(Simple(command.line, (), tuple(rest), command.redirects))
    if rest and arguments[0] == "exec":
        raise Leave("exit")


def _succeed(shell: Shell, _arguments: list[str], _command: Simple) -> None:
    shell.state.status = True


def _fail(shell: Shell, _arguments: list[str], _command: Simple) -> None:
    shell.state.status = False


TABLE: Mapping[str, Builtin] = {
    **dict.fromkeys((":", "true", "trap", "shopt", "ulimit", "wait", "module", "mkdir", "umask", "hash"), _succeed),
    **dict.fromkeys(("exit", "return", "break", "continue"), _leave),
    **dict.fromkeys(("source", "."), _source),
    **dict.fromkeys(("[", "test"), _test),
    **dict.fromkeys(("cd", "pushd"), _directory),
    **dict.fromkeys(("read", "mapfile", "readarray", "getopts"), _read),
    **dict.fromkeys(("command", "builtin", "exec"), _command),
    "false": _fail,
    "unset": _unset,
    "set": _set,
    "shift": _shift,
    "eval": _eval,
    "echo": _echo,
    "printf": _printf,
    "pwd": _pwd,
    "let": _let,
}
