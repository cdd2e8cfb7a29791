"""What a run may change to need less memory without another layout: changes that no rule rejects."""

from __future__ import annotations

from collections.abc import Iterator

from stretto.arguments import Arguments
from stretto.arguments.elsewhere import graphed
from stretto.arguments.rules import RULES
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, put, settings


def leaner(args: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Single changes, the cheapest first: words of the command line, and the run with them."""
    for path, value in _changes(args):
        found = graphed(put(args, path, value))
        if get(args, path) != value and all(rule.check(found) is None for rule in RULES):
            name = settings()[path].flag
            yield (name if value is True else f"{name} {value}"), found


def leaner_and_leaner(args: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same on top of each other, until there is nothing left to change."""
    said: dict[str, str] = {}
    while (change := next(leaner(args), None)) is not None:
        words, args = change
        said[words.split()[0]] = words
        yield " ".join(said.values()), args


def _changes(args: Arguments) -> Iterator[tuple[str, Value]]:
    p, how, sharded = args.parallel, args.run.recompute, (args.parallel.dp or 1) * args.parallel.cp > 1
    if how == "none":
        yield "run.recompute", "selective"
    if sharded and p.sharding == "none":
        yield "parallel.sharding", "zero1"
    if args.batch.micro_batch > 1:
        yield "batch.micro_batch", args.batch.micro_batch // 2
    if sharded:
        yield "parallel.sharding", "fsdp"
    if how in ("none", "selective"):
        yield "run.recompute", "block"
    if args.optimizer.optimizer == "adamw":
        yield "optimizer.optimizer_cpu_offload", True
