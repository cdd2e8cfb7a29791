"""Live progress of a run: a bar and figures on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stretto.console import console
from stretto.report.console import Manner
from stretto.train.record import EvalRecord, Listener, RunRecord, SaveRecord, StepRecord


class LiveProgress(Listener):
    """Loss, gradient norm and rate of each step; speed, memory and waits since the last line; the time left.

    "live" keeps them up to date under a bar, for a terminal; with "lines" each `log_every`-th step has one.
    """

    def __init__(self, screen: Console | None = None, manner: Manner | None = None) -> None:
        self.console = screen or console(goes_on=True)
        self.manner: Manner = manner or ("live" if self.console.is_terminal else "lines")
        self._live: Live | None = None

    def started(self, run: RunRecord) -> None:
        self._run, self._begin = run, (run.after, time.monotonic())
        self._first: tuple[int, float] | None = None
        self._now = run.after, "", ["starting"]
        if run.after >= run.steps:
            self.say(f"step {run.after}/{run.steps}: all steps are made, there is nothing left to train")
        elif self.manner == "live":
            self._live = Live(self._drawn(*self._now), console=self.console, refresh_per_second=4)
            self._live.start()

    def stepped(self, record: StepRecord) -> None:
        left = f"{self._left(record.step)} left"
        self._first = self._first or (record.step, time.monotonic())
        figures = [_learned(record), _further(record), _speed(record, self._run.unit), _use(record)]
        self._now = record.step, left, ["   ".join(some) for some in figures if some]
        if self._live is not None:
            self._live.update(self._drawn(*self._now))
        elif record.step % self._run.log_every == 0 or record.step == self._run.steps:
            step = f"step {record.step:{len(str(self._run.steps))}}/{self._run.steps}"
            self.say("  ".join([step, *(figure for some in figures for figure in some), left]))

    def evaluated(self, record: EvalRecord) -> None:
        name = record.name.replace("held_out", "held-out")
        bits = "" if record.bits_per_byte is None else f", {record.bits_per_byte:.3f} bits per byte"
        self.say(f"step {record.step}: {name} loss {record.loss:.4f}{bits}{_in(record.seconds)}")

    def saving(self, step: int) -> None:
        if self._live is None:
            self.say(f"step {step}: saving ...")
        else:
            at, left, figures = self._now
            self._live.update(self._drawn(at, left, [*figures[:-1], "saving ..."]), refresh=True)

    def saved(self, record: SaveRecord) -> None:
        self.say(f"step {record.step}: saved {record.path}{_in(record.seconds)}")
        if self._live is not None:  # no longer "saving ..."
            self._live.update(self._drawn(*self._now))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _drawn(self, step: int, left: str, figures: list[str]) -> Table:
        """A bar as wide as the window, and the figures under it."""
        bar = Table.grid(padding=(0, 1, 0, 0), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(f"step {step}/{self._run.steps}", ProgressBar(total=self._run.steps, completed=step), left)
        both = Table.grid(expand=True)
        both.add_row(bar)
        for line in figures:
            both.add_row(line)
        return both

    def say(self, line: str, *, by_words: bool = False) -> None:
        """A line of its own, above what is kept up to date; `by_words`, a terminal breaks it between words."""
        if self.manner == "none":
            return
        self.console.print(Text(line), soft_wrap=not (by_words and self.console.is_terminal))

    def _left(self, step: int) -> timedelta:
        """Time until the last step, at the speed so far: that of the steps behind the first, in which kernels are
        compiled, as soon as there are any."""
        after, begin = self._first if self._first is not None and step > self._first[0] else self._begin
        return timedelta(seconds=round((time.monotonic() - begin) / (step - after) * (self._run.steps - step)))


def _learned(r: StepRecord) -> list[str]:
    """What is not known is left out, here and below."""
    found = [f"loss {r.loss:.4f}", f"norm {r.grad_norm:.3f}", f"lr {r.lr:.2e}"]
    found += [] if r.epoch is None else [f"epoch {r.epoch:.2f}"]
    reserved = "" if r.reserved_gib is None else f"/{r.reserved_gib:.1f}"
    return [*found, *([] if r.peak_gib is None else [f"{r.peak_gib:.1f}{reserved} GiB"])]


def _further(r: StepRecord) -> list[str]:
    return [f"mtp {' '.join(f'{loss:.4f}' for loss in r.mtp_losses)}"] if r.mtp_losses else []


def _speed(r: StepRecord, unit: str) -> list[str]:
    found = [] if r.ms_per_step is None else [f"{r.ms_per_step:,.0f} ms"]
    found += [f"{r.tokens_per_second:,.0f} {unit}/s"]
    found += [] if r.tokens_per_second_per_gpu is None else [f"{r.tokens_per_second_per_gpu:,.0f} each"]
    full, causal = r.tflops_per_gpu_full, r.tflops_per_gpu_causal
    if full is not None and causal is not None:
        digits = ".0f" if full >= 100 else ".1f" if full >= 1 else ".2g"
        found += [f"TFLOP/s {full:{digits}} full {causal:{digits}} causal"]
    return found


def _use(r: StepRecord) -> list[str]:
    known = r.mfu_full is not None and r.mfu_causal is not None
    found = [f"MFU {r.mfu_full:.1%} full {r.mfu_causal:.1%} causal"] if known else []
    found += [] if r.data_wait_ms is None else [f"data {r.data_wait_ms:.1f} ms"]
    if r.slowest_rank is not None and r.slowest_over_fastest is not None:
        found += [f"slowest rank {r.slowest_rank} x{r.slowest_over_fastest:.2f}"]
    return found


def _in(seconds: float | None) -> str:
    return "" if seconds is None else f" in {seconds:.1f} s"
