"""The settings that a command trains with, or talks of: those of the demo where the user names no others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from stretto.arguments import Record, Resolved, parse
from stretto.arguments.command_line import NoOptions
from stretto.arguments.form import Form
from stretto.cli.adopt import adopted
from stretto.initialize.gpus import visible_gpus

FALLBACK: Final = "demo"
"""The preset that every command starts from where its words name neither a preset nor a file."""


def of_run(name: str, own: type = NoOptions, only: tuple[str, ...] = ()) -> Form:
    """A command that takes the settings of a run beside options of its own."""
    return Form(f"stretto {name}", own, settings=True, only=only, fallback=FALLBACK)


@dataclass(frozen=True)
class Train:
    """Train a model."""


FORMS: Final = (of_run("train", Train),)

parse_or_demo: Final = partial(parse, form=FORMS[0], adopt=adopted)
"""`stretto.arguments.parse` for the words of a command."""

parse_for_here: Final = partial(parse_or_demo, gpus=visible_gpus)
"""The same for a run on this machine: device and processes follow from its GPUs where nobody says them."""


def newest_record(directory: str, required: bool) -> Record | None:
    """What the newest checkpoint of a run remembers, for commands that talk of it: `parse(..., checkpoint=)`."""
    from stretto.cli.resume import newest  # loads torch

    return next((found.record for found in newest(directory, required=required)), None)


def with_vocabulary(resolved: Resolved) -> Resolved:
    """The run with its tokenizer's number of entries filled in, if nobody said it, which needs the tokenizer.

    Raises DataError when the tokenizer cannot be read, ConfigError when the vocabulary does not hold it.
    """
    if resolved.args.model.vocab is not None:
        return resolved
    from stretto.data.tokenizer import load_tokenizer

    return resolved.with_vocabulary(load_tokenizer(resolved.args.data.tokenizer).vocab_size)


def origin(resolved: Resolved) -> str | None:
    """Which preset the run starts from, where nobody named it."""
    if resolved.fallback is None:
        return None
    return f"{resolved.fallback}, as neither --preset nor --config is given"
