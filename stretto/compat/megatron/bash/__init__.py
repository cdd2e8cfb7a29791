"""Reads a script of bash: the commands that it would run, with their words, without running any.

calls = read(text, script="run.sh", arguments=["8"], given={"NNODES": "2"})
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from stretto.compat.megatron.bash.shell import Shell
from stretto.compat.megatron.bash.state import Call, Leave, Shared, State
from stretto.compat.megatron.bash.syntax import BashError
from stretto.compat.megatron.bash.unknown import Unknown, is_mark, marks

__all__ = ["BashError", "Call", "Shared", "Unknown", "is_mark", "marks", "read"]


def read(
    text: str, *, script: str | None = None, arguments: Sequence[str] = (), given: Mapping[str, str] | None = None
) -> Shared:
    """What a script would run. `given`: variables of its environment; of no other is anything known.

    `BashError` for what is not bash, or is not followed here, with its line.
    """
    if any(map(is_mark, text)):
        raise BashError(1, "letters of a plane that is kept for private use")
    shared = Shared(dict(given or {}))
    shell = Shell(State(shared, script, arguments))
    with suppress(Leave):
        shell.within(text, 1, "exit")
    return shared
