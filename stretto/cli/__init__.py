"""The command line: `stretto COMMAND ...`. Each command is a module of its name, imported when it is asked for."""

from __future__ import annotations

import sys
from importlib import import_module

from stretto.terminal import OUTPUT, require_streams, say, silence, speak_any_encoding

TYPE_CHECKING = False  # little is loaded before `main` can answer Ctrl-C, and `typing` is much
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

COMMANDS: Final = {
    "train": "train a model",
    "explain": "show what a run would be, without starting it",
    "plan": "rank the layouts that fit a device by the time of a step",
    "verify": "prove that a layout gives what one process gives",
    "sample": "continue a prompt from a checkpoint",
    "export": "write a checkpoint as a Hugging Face model",
    "checkpoint": "list, show, verify, compare and prune checkpoints",
    "launch": "run on this machine, or write a SLURM script or a Kubernetes manifest",
    "data": "tokenize a corpus, and say what is in it",
    "convert": "turn the flags of a Megatron-LM script into a settings file",
    "schedule": "list, draw, check and simulate schedules of a pipeline",
    "layout": "show where each rank stands, and who its peers are",
    "completion": "write what bash, zsh or fish complete these words by",
}

STORE_CLIENTS: Final = {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "adlfs", "azure", "aiohttp", "fsspec"}
"""Packages whose errors are of a store, not of this program."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a wrong command line or configuration, 1 for a failure."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(words[:1])
    try:
        require_streams()
        speak_any_encoding()
        return _run(words)
    except KeyboardInterrupt:
        return 130  # as a shell says it: 128 + SIGINT
    except OSError as error:  # of a file that was to be read or written; what breaks a run has been told already
        if error.filename is None or (name == "train" and error.filename != OUTPUT):
            raise
        say(f"stretto {name}: {error.filename}: {error.strerror}")
        if error.filename == OUTPUT:
            silence(sys.stdout)
        return 2
    except Exception as error:
        if name == "train" or type(error).__module__.partition(".")[0] not in STORE_CLIENTS:
            raise
        say(f"stretto {name}: {type(error).__name__}: {error}")  # a wrong endpoint, name or key of a store
        return 2


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        say(_help(), out=True)
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        from stretto import __version__

        say(__version__, out=True)
        return 0
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        say(f"stretto: no command {name!r}{guess}\n\n{_help()}")
        return 2
    code = import_module(f"stretto.cli.{name}").main(rest)
    assert isinstance(code, int)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: stretto COMMAND [options]", "", *lines, "", "`stretto COMMAND --help` says what each takes."]
    )
