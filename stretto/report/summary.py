"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text as RichText

from stretto.arguments import Arguments
from stretto.data.baselines import Baselines
from stretto.estimate import count_parameters
from stretto.report.header import layout_line
from stretto.report.printable import printable
from stretto.train.directory import Paths
from stretto.train.record import StepRecord, read_rows

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 24
"""Characters of the loss curve."""


def summary(args: Arguments, checkpoint: Path, baselines: Mapping[str, Baselines]) -> Table:
    """What was trained, how well, how fast, and where the results lie: read from the run's metrics."""
    paths = Paths.of(args)
    rows = read_rows(paths.metrics)
    steps = [StepRecord(**row) for row in rows if "loss" in row]
    evaluated = {key.removesuffix("_loss"): row for row in rows for key in row if key.endswith("_loss")}
    table = Table(box=box.ROUNDED, show_header=False, title="The run", title_justify="left", title_style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("layout", layout_line(args))
    table.add_row("parameters", f"{count_parameters(args.model, args.batch.seq_len).total:,}")
    if steps:
        first, last = steps[0], steps[-1]
        table.add_row("tokens seen", f"{last.tokens:,} in {last.step:,} steps")
        table.add_row("loss", f"{first.loss:.4f} → [bold cyan]{last.loss:.4f}[/]  [cyan]{curve(steps)}[/]")
        table.add_row("tokens/s", f"{_median([step.tokens_per_second for step in steps]):,.0f} in the median step")
    for name, row in evaluated.items():
        table.add_row(*_evaluation(name, row, baselines.get(name)))
    table.add_row("checkpoint", escape(f"{checkpoint}"))
    table.add_row("metrics", escape(f"{paths.metrics}"))
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


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _evaluation(name: str, row: dict[str, Any], baselines: Baselines | None) -> tuple[str, str]:
    """The last evaluation of a set: bits per byte, or the loss where its bytes are not known, or not seen."""
    said = "held-out" if name == "held_out" else escape(name)
    if (bits := row.get(f"{name}_bits_per_byte")) is None:
        return f"{said} loss", f"[bold cyan]{row[f'{name}_loss']:.4f}[/]"
    beside = f"  (bigram {baselines.bigram:.3f}, zlib {baselines.zlib:.3f} on the same files)" if baselines else ""
    return f"{said} bits per byte", f"[bold cyan]{bits:.3f}[/]{beside}"
