"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text as RichText

from stretto.arguments import Arguments
from stretto.data.baselines import Baselines
from stretto.estimate import count_parameters
from stretto.report.header import layout_line
from stretto.terminal import printable
from stretto.train.directory import Paths
from stretto.train.metrics_file import read_rows, step_records
from stretto.train.record import StepRecord
from stretto.train.trainer import Outcome

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 24
"""Characters of the loss curve."""


def summary(
    args: Arguments, checkpoint: Path | None, baselines: Mapping[str, Baselines], outcome: Outcome | None = None
) -> Table:
    """What was trained, how well, how fast, and where the results lie: read from the run's metrics.

    `baselines` are those of validation sets by name; `outcome` is of the last part of the run, of which alone speed and
    times are told.
    """
    paths = Paths.of(args)
    rows = read_rows(paths.metrics)
    steps = step_records(rows)
    evaluated = {key.removesuffix("_loss"): row for row in rows for key in row if key.endswith("_loss")}
    table = Table(box=box.ROUNDED, show_header=False, title="The run", title_justify="left", title_style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("layout", layout_line(args))
    table.add_row("parameters", f"{count_parameters(args.model, args.batch.seq_len).total:,}")
    if steps:
        first, last = steps[0], steps[-1]
        epochs = "" if last.epoch is None else f", {last.epoch:.2f} epochs"
        table.add_row("tokens seen", f"{last.tokens:,} in {last.step:,} steps{epochs}")
        rates = (f"{first.loss:.4f} → ", (f"{last.loss:.4f}", "bold cyan"), "  ", (curve(steps), "cyan"))
        table.add_row("loss", RichText.assemble(*rates))
        # An earlier part of the run may have had another layout, on another machine.
        here = [step for step in steps if outcome is not None and step.step > outcome.after]
        for name, value in _measured(here or steps):
            table.add_row(name, value)
    for name, row in evaluated.items():
        table.add_row(*_evaluation(name, row, baselines.get(name)))
    if outcome is not None:
        table.add_row("time", _times(outcome))
    if saves := [row for row in rows if "checkpoint_bytes" in row]:
        table.add_row("saves", _saves(saves))
    if checkpoint is not None:
        table.add_row("checkpoint", f"{checkpoint}")
    table.add_row("metrics", f"{paths.metrics}")
    return table


def curve(steps: list[StepRecord]) -> str:
    """The loss of a run in a few characters, from its first step to its last."""
    losses = [step.loss for step in steps]
    low, high = min(losses), max(losses)
    n = min(CURVE, len(losses))
    means = []
    for i in range(n):
        piece = losses[i * len(losses) // n : (i + 1) * len(losses) // n]
        means.append(sum(piece) / len(piece))
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def sample_panel(prompt: str, continued: str) -> Panel:
    """A prompt and how the model goes on; what would steer a terminal is shown as a dot."""
    text = RichText.assemble((printable(prompt), "bold"), (printable(continued), "cyan"))
    return Panel(text, title="a sample", title_align="left")


def _measured(steps: list[StepRecord]) -> Iterator[tuple[str, str]]:
    """Speed, use of the device and memory, as far as they are known: those of the step that is in the middle by its
    speed. The first one, which compiles and allocates, counts where it is alone."""
    by_speed = sorted(steps[1:] or steps, key=lambda step: step.tokens_per_second)
    median = by_speed[len(by_speed) // 2]

    def middle(name: str) -> float | None:
        value: float | None = getattr(median, name)
        return value

    def known(text: str, *names: str) -> str | None:
        values = [middle(name) for name in names]
        return None if None in values else text.format(*values)

    each, last = known(", {:,.0f} each", "tokens_per_second_per_gpu") or "", steps[-1]
    yield "tokens/s", f"{median.tokens_per_second:,.0f}{each} in the median step"
    waits = known(", {:.1f} ms of it for data", "data_wait_ms") or ""
    digits = ".0f" if (middle("tflops_per_gpu_full") or 0) >= 100 else ".3g"
    rows = {
        "step": known("{:,.0f} ms" + waits, "ms_per_step"),
        "TFLOP/s each": known(
            f"{{:{digits}}} full, {{:{digits}}} causal", "tflops_per_gpu_full", "tflops_per_gpu_causal"
        ),
        "MFU": known("{:.1%} full, {:.1%} causal", "mfu_full", "mfu_causal"),
        "peak memory": None if last.peak_gib is None else f"{last.peak_gib:.2f} GiB",
        "slowest rank": None
        if last.slowest_rank is None or last.slowest_over_fastest is None
        else f"{last.slowest_rank}, {last.slowest_over_fastest:.2f} times rank {last.fastest_rank}, at the end",
    }
    if last.reserved_gib is not None:
        rows["peak memory"] = f"{rows['peak memory']}, {last.reserved_gib:.2f} GiB reserved"
    yield from ((name, text) for name, text in rows.items() if text is not None)


def _times(outcome: Outcome) -> str:
    aside = f"checkpoints {outcome.checkpoint_seconds:.1f} s, evaluation {outcome.evaluation_seconds:.1f} s"
    return f"{outcome.seconds:.1f} s, of which {aside}"


def _saves(rows: list[dict[str, Any]]) -> str:
    """What the saves of a run took: the longest of each."""
    stall, copied, written, waited = (
        max(row.get(f"checkpoint_{name}_seconds", 0.0) for row in rows)
        for name in ("stall", "copied", "written", "waited")
    )
    behind = f", {waited:.2f} s of it for the save before" if waited > 0.1 else ""
    return f"{len(rows)}; at most {stall:.2f} s of training waited{behind}, copy {copied:.2f} s, write {written:.2f} s"


def _evaluation(name: str, row: dict[str, Any], baselines: Baselines | None) -> tuple[str, RichText]:
    """The last evaluation of a set: bits per byte, or the loss where its bytes are not known, or not seen."""
    said = "held-out" if name == "held_out" else name
    if (bits := row.get(f"{name}_bits_per_byte")) is None:
        return f"{said} loss", RichText(f"{row[f'{name}_loss']:.4f}", "bold cyan")
    beside = f"  (bigram {baselines.bigram:.3f}, zlib {baselines.zlib:.3f} on the same files)" if baselines else ""
    return f"{said} bits per byte", RichText.assemble((f"{bits:.3f}", "bold cyan"), beside)
