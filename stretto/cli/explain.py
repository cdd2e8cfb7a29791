"""`stretto explain`: a run on one screen, from its arguments alone: no workers, no device, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stretto.arguments import Arguments, ConfigError, Record, Resolved, SourceKind
from stretto.arguments.errors import as_text
from stretto.arguments.setting import setting
from stretto.arguments.tree import get, settings
from stretto.cli.command import USAGE_ERROR
from stretto.cli.equations import equations
from stretto.cli.hosts import limit_of_host
from stretto.cli.megatron import layer
from stretto.cli.memory import host_verdict, memory_table, verdict
from stretto.cli.words import of_run, origin, parse_or_demo, with_vocabulary
from stretto.console import console
from stretto.data.errors import DataError
from stretto.estimate import count_parameters, stage_blocks, stage_counts, stage_pieces
from stretto.estimate.chips import CHIPS
from stretto.estimate.context import comm_of, exchanged
from stretto.estimate.kept import seconds
from stretto.estimate.recompute import policies_of, policy_of, said
from stretto.estimate.step_time import step_time
from stretto.layout import Layout, Topology, warnings
from stretto.layout.ranks import named, ranges
from stretto.schedule import Cost, bubble, schedule_for, simulate
from stretto.schedule.blocks import amounts, blocks_text
from stretto.schedule.draw import gantt
from stretto.terminal import say

if TYPE_CHECKING:
    from stretto.cli.resume import Resumed


@dataclass(frozen=True)
class Options:
    """Show what a run would be, without starting it; --world-size is --nproc."""

    hbm: float | None = setting(None, "memory of a device: does the run fit, and how would it?", unit="GiB", above=0)
    host_memory: float | None = setting(
        None, "memory of a host; unset: of this one, where the run could be here", unit="GiB", above=0
    )


FORMS: Final = (of_run("explain", Options),)

_NODES = 4
"""Nodes to list: the others go on in the same way."""

_DRAWABLE = 400
"""Actions that still can be told apart in a picture as wide as a terminal."""


def main(argv: Sequence[str]) -> int:
    """Run `stretto explain ...`; 0, or 2 when the settings are no valid run."""
    words = [word.replace("--world-size", "--nproc", 1) for word in argv]
    found: list[Resumed] = []

    def resumed(directory: str, required: bool) -> Record | None:
        from stretto.cli.resume import newest  # loads torch

        found.extend(newest(directory, required=required))
        return found[0].record if found else None

    try:
        resolved = parse_or_demo(words, translate=layer, files=False, form=FORMS[0], checkpoint=resumed)
        for each in found:
            each.require_fits(resolved)
        resolved = with_vocabulary(resolved)
        _require_vocabulary(resolved)
        policies_of(resolved.args)  # what else the run would be rejected for
        if resolved.args.tuning.freeze:
            from stretto.train.tuning import require_trained  # loads torch

            require_trained(resolved.args)
    except (ConfigError, DataError, ValueError) as error:
        say(f"stretto explain: {error}")
        return USAGE_ERROR
    screen = console()
    if (preset := origin(resolved)) is not None:
        screen.print(Text.assemble(("preset ", "bold"), preset))
    for each in found:
        screen.print(Text.assemble(("from ", "bold"), f"step {each.step}, {each.path}"))
        for name, change in each.all_changes(resolved):
            if change is not None:
                screen.print(Text.assemble((f"{name} ", "bold"), change))
    show(resolved, screen, resolved.own.hbm, limit_of_host(resolved.args, resolved.own.host_memory))
    return 0


def _require_vocabulary(resolved: Resolved) -> None:
    """Raise ConfigError where the vocabulary does not hold a tokenizer that this machine has."""
    from stretto.data.tokenizer import load_tokenizer

    with suppress(DataError):
        resolved.with_vocabulary(load_tokenizer(resolved.args.data.tokenizer).vocab_size)


def show(resolved: Resolved, screen: Console, limit: float | None = None, host: float | None = None) -> None:
    """Print layout, batch, stages, memory, schedule, and every setting that is not a default with its source.

    `limit` is what a device has, in GiB, `host` what a host has, in bytes.
    """
    args = resolved.args
    for title, lines in (("layout", _layout(resolved)), ("batch", _batch(args)), ("data", _data(args))):
        screen.print(Text(title, style="bold"))
        for line in lines:
            screen.print(Text(f"  {line}", style="bold yellow" if line.startswith("WARNING: ") else ""))
    screen.print(Text("stages", style="bold"))
    screen.print(_stages(resolved))
    for line in equations(args):
        screen.print(f"  {line}")
    screen.print(Text("memory of a rank, in MiB", style="bold"))
    screen.print(memory_table(args))
    for line in (*_recomputed(args), *verdict(args, limit), *host_verdict(args, host)):
        screen.print(Text(f"  {line}", style="bold yellow" if line.startswith("WARNING: ") else ""))
    if args.run.device == "cuda" and args.run.dtype == "bf16":
        screen.print(Text("time of a step, estimated", style="bold"))
        screen.print(f"  {_time(args)}")
    screen.print(Text("schedule", style="bold"))
    screen.print(Text("\n".join(f"  {line}" for line in _schedule(args, screen.width - 2))), soft_wrap=True)
    screen.print(Text("settings", style="bold"))
    screen.print(_settings(resolved))


def _settings(resolved: Resolved) -> Table:
    """Those that are not defaults, with the source of each.

    A model's config.json and a checkpoint say all that they know: of theirs, those that differ from the defaults.
    """
    t = Table(box=None, show_header=False)
    for name in ("setting", "value", "source"):
        t.add_column(name, overflow="fold")
    for path, source in resolved.sources.items():
        value, whole = get(resolved.args, path), source.kind in (SourceKind.MODEL, SourceKind.CHECKPOINT)
        if source.kind is not SourceKind.DEFAULT and not (whole and value == settings()[path].default):
            t.add_row(path, as_text(value), str(source))
    return t


def _time(args: Arguments) -> str:
    time, b = step_time(args, CHIPS["h200"]), args.batch
    rate = b.global_batch * b.seq_len / (args.run.nproc or 1) / time.total
    whole = f"{time.total * 1e3:,.0f} ms on H200s, {rate:,.0f} tokens/s of each"
    return f"{whole}: {time.said} ms; `stretto plan` ranks layouts"


def _recomputed(args: Arguments) -> Iterator[str]:
    """What each stage recomputes, and what that costs by the model that a budget goes by."""
    for stage, layers in enumerate(stage_blocks(args)):
        policy = policy_of(args, stage)
        if any(policy):
            cost = sum(seconds(args, block, parts) for block, parts in zip(layers, policy, strict=True))
            yield (
                f"stage {stage} recomputes: {said(policy)}; {cost * 1e3:,.2f} ms of each microbatch, by the "
                "cost model of GPUs"
            )


def _layout(resolved: Resolved) -> Iterator[str]:
    layout, p, run = resolved.layout, resolved.args.parallel, resolved.args.run
    sizes = " x ".join(f"{axis}={layout.size(axis)}" for axis in ("tp", "cp", "dp", "pp"))
    also = ", sequence parallel" if p.sequence_parallel else ""
    yield f"{sizes} = {layout.world} {run.device} ranks{also}, {run.dtype}"
    for axis, what in (
        ("tp", "share each matrix"),
        ("cp", "share each sequence"),
        ("dp", "average gradients"),
        ("pp", "pass activations on"),
    ):
        if layout.size(axis) > 1:
            groups = layout.groups(axis)
            shown = "; ".join(ranges(group, 4) for group in groups[:4])
            yield f"{axis}: ranks that {what}: {shown}{'; ...' if len(groups) > 4 else ''}"
    if p.cp > 1:
        yield from _context(resolved.args)
    yield from _nodes(layout, Topology(p.gpus_per_node or layout.world))


def _context(args: Arguments) -> Iterator[str]:
    """How layers communicate over cp, and what each way costs by the model that `auto` goes by."""
    ways = Counter((comm_of(args, layer), args.model.window_of(layer)) for layer in range(args.model.layers))
    for (comm, window), layers in ways.items():
        said = exchanged(args, comm, args.model.layers - 1 if window is None else 0)
        yield (
            f"cp: {layers} layers by {comm}, {said.bytes / 2**20:,.1f} MiB and {said.seconds * 1e3:,.2f} ms each that "
            "attention does not hide, by the cost model of GPUs"
        )


def _nodes(layout: Layout, topology: Topology) -> Iterator[str]:
    """Who sits on which node, and what of that is slow."""
    for node in range(min(topology.nodes(layout.world), _NODES)):
        first = node * topology.gpus_per_node
        ranks = range(first, min(first + topology.gpus_per_node, layout.world))
        places = [layout.coords(rank) for rank in ranks]
        axes = [axis for axis in ("tp", "cp", "dp", "pp") if layout.size(axis) > 1]
        held = [f"{axis} {ranges({place[axis] for place in places}, 4)}" for axis in axes]
        yield ", ".join([f"node {node}: {named(ranks, 4)}", *held])
    if (rest := topology.nodes(layout.world) - _NODES) > 0:
        yield f"and so on, {rest} more"
    for warning in warnings(layout, topology):
        yield f"warning: {warning}"


def _batch(args: Arguments) -> Iterator[str]:
    b, dp, steps = args.batch, args.parallel.dp or 1, args.run.steps
    m, tokens = args.batch.microbatches(args.parallel.dp), b.global_batch * b.seq_len
    yield f"{b.global_batch} sequences = micro_batch {b.micro_batch} * dp {dp} * {m} microbatches"
    yield f"{tokens:,} tokens a step = {b.global_batch} * seq_len {b.seq_len}"
    yield f"{tokens * steps:,} tokens = {steps:,} steps * {tokens:,}"


def _data(args: Arguments) -> Iterator[str]:
    """The text as far as this machine has it: nothing is tokenized here."""
    from stretto.data.describe import foreseen_lines  # NumPy and tokenizers, which --help does not wait for
    from stretto.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(args.data.tokenizer)
        yield from foreseen_lines(args, tokenizer)
    except DataError as error:
        yield f"{args.data.data or 'the standard library'}: not known here ({error})"


def _stages(resolved: Resolved) -> Table:
    args, layout = resolved.args, resolved.layout
    rows = Table(box=None, pad_edge=True)
    for name in ("stage", "layers", "also", "parameters", "per rank", "ranks"):
        rows.add_column(name, justify="right" if name in ("parameters", "per rank") else "left")
    parts = stage_blocks(args)
    last = len(parts) - 1
    p = count_parameters(args.model, args.batch.seq_len)
    for stage, layers in enumerate(parts):
        head = p.final_norm + p.further + (0 if args.model.tied else p.head)
        head += p.embedding if args.model.shared_embedding and last else 0
        sparse = sum(block.feed_forward and args.model.is_sparse(block.layer) for block in layers)
        size = p.held(layers, args.model.is_sparse) + p.embedding * (stage == 0) + head * (stage == last)
        routed = (sparse + p.further_sparse * (stage == last)) * args.model.experts * p.expert
        behind = "norm, head" + f", {args.model.mtp_layers} further" * (args.model.mtp_layers > 0)
        also = [name for name, here in (("embedding", stage == 0), (behind, stage == last)) if here]
        first = layout.rank(pp=layout.placement[stage])
        ranks = layout.group(first, "tp", "cp", "dp")
        rows.add_row(
            str(stage),
            blocks_text(layers),
            ", ".join(also),
            f"{size:,}",
            f"~{(size - routed) // args.parallel.tp + routed // (args.parallel.ep * args.parallel.etp):,}",
            ranges(ranks, 4),
        )
    rows.add_section()
    rows.add_row("model", str(args.model.layers), "", f"{p.total:,}", "", str(layout.world))
    if p.sparse:
        rows.add_row("", "", "for one token", f"{p.active:,}", "", "")
    return rows


def _schedule(args: Arguments, width: int) -> Iterator[str]:
    p, m = args.parallel.pp, args.batch.microbatches(args.parallel.dp)
    shares = stage_pieces(args).shares or (0.0,)
    layers = tuple(round(each, 2) or 1.0 for each in amounts(stage_counts(args), shares[0]))
    schedule = schedule_for(args.parallel.schedule, p, m, args.parallel.stages_per_rank, shape=args.parallel.shape)
    if args.parallel.schedule in ("1f1b", "gpipe"):
        ideal = f"(pp-1)/(m+pp-1) = {p - 1}/{m + p - 1} = {(p - 1) / (m + p - 1):.1%}"
    else:
        ideal = f"{bubble(simulate(schedule)):.1%}"
    yield f"{args.parallel.schedule}, {m} microbatches; bubble {ideal} if stages were equal"
    if len(schedule.ranks) * m <= _DRAWABLE:
        yield "with these layers, a backward taken as two forwards and messages as free:"
        yield from gantt(simulate(schedule, Cost(stages=layers)), width=width).splitlines()
