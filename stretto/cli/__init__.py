"""The command line: `stretto COMMAND ...`. Each command is a module of its name, imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Final

COMMANDS: Final = {
    "train": "train a model",
    "explain": "show what a run would be, without starting it",
    "verify": "prove that a layout gives what one process gives",
    "sample": "continue a prompt from a checkpoint",
    "launch": "run on this machine, or write a SLURM script or a Kubernetes manifest",
    "data": "tokenize a corpus, and say what is in it",
    "convert": "turn the flags of a Megatron-LM script into a settings file",
    "schedule": "list, draw, check and simulate schedules of a pipeline",
    "layout": "show where each rank stands, and who its peers are",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a wrong command line or configuration, 1 for a failure."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        from stretto import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        print(f"stretto: no command {name!r}{guess}\n\n{_help()}", file=sys.stderr)
        return 2
    try:
        code = import_module(f"stretto.cli.{name}").main(rest)
    except KeyboardInterrupt:
        return 130  # as a shell says it: 128 + SIGINT
    assert isinstance(code, int)
    return code


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: stretto COMMAND [options]", "", *lines, "", "`stretto COMMAND --help` says what each takes."]
    )
