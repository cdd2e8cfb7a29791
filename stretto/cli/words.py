"""The settings that a command trains with, or talks of: those of the demo where the user names no others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

from stretto.arguments import ConfigError, Resolved, Violation, parse
from stretto.arguments.tree import settings
from stretto.cli.adopt import adopted
from stretto.initialize.gpus import visible_gpus

FALLBACK: Final = "demo"
"""The preset that every command starts from where its words name neither a preset nor a file."""

parse_or_demo: Final = partial(parse, fallback=FALLBACK, adopt=adopted)
"""`stretto.arguments.parse` for the words of a command."""

parse_for_here: Final = partial(parse_or_demo, gpus=visible_gpus)
"""The same for a run on this machine: device and processes follow from its GPUs where nobody says them."""


def with_vocabulary(resolved: Resolved) -> Resolved:
    """The run with its tokenizer's number of entries filled in, if nobody said it.

    Raises DataError when the tokenizer cannot be read, ConfigError when it has more entries than any.
    """
    if resolved.args.model.vocab is not None:
        return resolved
    from stretto.data.tokenizer import load_tokenizer

    need, most = load_tokenizer(resolved.args.data.tokenizer).vocab_size, settings()["model.vocab"].bounds.at_most
    if most is not None and need > most:
        problem = f"the tokenizer {resolved.args.data.tokenizer!r} has ids up to {need - 1:,}, must be < {most:,}"
        raise ConfigError([Violation("vocab_is_bounded", ("data.tokenizer",), problem, hint="use another tokenizer")])
    return replace(resolved, args=replace(resolved.args, model=replace(resolved.args.model, vocab=need)))


def origin(resolved: Resolved) -> str | None:
    """Which preset the run starts from, where nobody named it."""
    if resolved.fallback is None:
        return None
    return f"{resolved.fallback}, as neither --preset nor --config is given"
