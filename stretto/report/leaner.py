"""What a run may change to need less memory, of a device or a host, without another layout: what no rule rejects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stretto.arguments import Arguments
from stretto.arguments.elsewhere import graphed
from stretto.arguments.errors import as_flag
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, put
from stretto.arguments.validate import RULES


def leaner(args: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Single changes, the cheapest first: words of the command line, and the run with them."""
    yield from _possible(args, _changes(args))


def leaner_on_hosts(args: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same of the host's memory."""
    yield from _possible(args, _changes_on_hosts(args))


def leaner_and_leaner(args: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same on top of each other, until there is nothing left to change."""
    said: dict[str, str] = {}
    while (change := next(leaner(args), None)) is not None:
        words, args = change
        said[words.split()[0]] = words
        yield " ".join(said.values()), args


def _possible(args: Arguments, changes: Iterable[tuple[str, Value]]) -> Iterator[tuple[str, Arguments]]:
    for path, value in changes:
        found = graphed(put(args, path, value))
        if get(args, path) != value and all(rule.check(found) is None for rule in RULES):
            yield as_flag(path, value).removesuffix(" true"), found


def _changes(args: Arguments) -> Iterator[tuple[str, Value]]:
    p, how, sharded = args.parallel, args.run.recompute, (args.parallel.dp or 1) * args.parallel.cp > 1
    if how == "none":
        yield "run.recompute", "selective"
    if sharded and p.mode == "none":
        yield "parallel.sharding", "zero1"
    if args.batch.micro_batch > 1:
        yield "batch.micro_batch", args.batch.micro_batch // 2
    if sharded:
        yield "parallel.sharding", "fsdp"
    if how in ("none", "selective"):
        yield "run.recompute", "block"
    if args.optimizer.optimizer == "adamw":
        yield "optimizer.optimizer_cpu_offload", True


def _changes_on_hosts(args: Arguments) -> Iterator[tuple[str, Value]]:
    p, offload = args.parallel, args.optimizer.optimizer_cpu_offload
    yield "checkpoint.async_save", False
    if offload and (p.dp or 1) * p.cp > 1 and p.mode == "none":
        yield "parallel.sharding", "zero1"
    yield "optimizer.moments", "bf16"
    if offload:
        yield "optimizer.masters", "remainder"
        yield "optimizer.optimizer_cpu_offload", False
    if args.run.recompute == "offload":
        yield "run.recompute", "block"
    if args.batch.micro_batch > 1:
        yield "batch.micro_batch", args.batch.micro_batch // 2
