"""What is about to run, said once before the first step."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text as RichText

from stretto.arguments import Arguments
from stretto.data.describe import data_lines, epochs_line, lossy, loud, silent, tokenizer_line
from stretto.data.text import Text
from stretto.estimate import count_parameters, stage_counts
from stretto.estimate.stored import trained_parameters
from stretto.schedule.blocks import counts_text, cut_layers
from stretto.train.directory import Paths
from stretto.verify.matrix import untested


def header(
    args: Arguments, text: Text, *, resume: Path | None, after: int, aside: Path | None, preset: str | None = None
) -> Table:
    """Layout, model, data, batch and where the results go; `after`: the step that `resume`, a checkpoint, is of.

    `preset` says which preset was taken where the user named none.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if preset is not None:
        table.add_row("preset", preset)
    table.add_row("layout", layout_line(args))
    if (warning := untested(args)) is not None:
        table.add_row(RichText("warning", "yellow"), warning)
    table.add_row("model", _model(args))
    stores = text.mix.stores
    tokens, size = (sum(of) for of in zip(*((s.header.tokens, s.header.bytes) for s in stores), strict=True))
    table.add_row("data", "\n".join(data_lines(args, text)))
    table.add_row("tokenizer", tokenizer_line(text.tokenizer, size / tokens))
    table.add_row("steps", _steps(args, after, tokens))
    for warning in (*loud(args, text.tokenizer, tokens), *lossy(text), *silent(args, text)):
        table.add_row(RichText("warning", "bold yellow"), RichText(warning, "bold yellow"))
    if resume is not None:
        table.add_row("from", f"step {after}, {resume}")
    table.add_row("to", f"{Paths.of(args).root}" + (f"  (an earlier run moved to {aside})" if aside else ""))
    return table


def layout_line(args: Arguments) -> str:
    """tp=2 x pp=2 x dp=2 on 8 cpu ranks, sequence parallel, 1f1b, fp32."""
    p, r = args.parallel, args.run
    ranks = "1 rank" if r.nproc == 1 else f"{r.nproc} ranks"
    cp, experts = f" x cp={p.cp}" * (p.cp > 1), f", experts ep={p.ep} x etp={p.etp}" if args.model.experts else ""
    parts = [f"tp={p.tp}{cp} x pp={p.pp} x dp={p.dp} on {ranks} ({r.device}){experts}"]
    several = f", {p.vpp} stages a rank{' in a loop' * (p.schedule == 'auto' and p.shape == 'loop')}"
    layers = stage_counts(args) if p.num_stages > 1 else ()
    held = f", layers {counts_text(layers)}" if p.stage_layers is not None or cut_layers(layers) else ""
    staged = [p.schedule + several * ((p.vpp or 1) > 1) + held] * (p.num_stages > 1)
    parts += ["sequence parallel"] * p.sequence_parallel + staged + [r.dtype]
    return ", ".join(parts)


def _model(args: Arguments) -> str:
    m, found = args.model, count_parameters(args.model, args.batch.seq_len)
    experts = (
        f" ({found.active:,} for a token: {m.top_k} of {m.experts} experts in {found.sparse} layers)"
        if m.experts
        else ""
    )
    heads = f"{m.heads} heads" + (f" over {m.num_kv_heads} kv" if m.num_kv_heads != m.heads else "")
    trained = trained_parameters(args)
    alone = "" if trained == found.total else f", {trained:,} of them trained"
    if args.tuning.lora_rank:
        alone = f" and {trained:,} of adapters, which alone are trained"
    shape = f"{m.layers} layers of {m.hidden}, {heads}, vocabulary {m.vocab_size:,}"
    return f"{found.total:,} parameters{experts}{alone}: {shape}"


def _steps(args: Arguments, after: int, available: int) -> str:
    b = args.batch
    tokens = b.global_batch * b.seq_len
    left = args.run.steps - after
    return (
        f"{left:,} of {b.global_batch} x {b.seq_len} = {tokens:,} tokens, {left * tokens:,} in all: "
        f"{epochs_line(args, available, left)}"
        if left
        else f"all {args.run.steps:,} are done"
    )
