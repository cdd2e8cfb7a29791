"""What a person sees, in narrow and wide windows and in a file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.console import console
from stretto.data.lock import Progress
from stretto.initialize.timeline import StartTimeline
from stretto.report.progress import LiveProgress
from stretto.report.start_up import StartUp
from stretto.report.summary import curve, sample_panel, summary
from stretto.report.tokenizing import Tokenizing
from stretto.terminal import printable
from stretto.train.metrics_file import JsonLines
from stretto.train.record import EvalRecord, RunRecord, SaveRecord, StepRecord
from stretto.train.trainer import Outcome
from stretto.world import World

pytestmark = pytest.mark.gloo

STEP = StepRecord(
    99_990,
    12.3456,
    123.456,
    2.5e-4,
    10**12,
    1_234_567.0,
    epoch=1.25,
    mtp_losses=(3.25, 4.5),
    ms_per_step=12_345.6,
    tokens_per_second_per_gpu=98_765.4,
    tflops_per_gpu_full=412.3,
    tflops_per_gpu_causal=380.6,
    mfu_full=0.4167,
    mfu_causal=0.3846,
    peak_gib=71.2,
    reserved_gib=78.9,
    data_wait_ms=0.4,
    slowest_rank=127,
    fastest_rank=3,
    slowest_over_fastest=1.07,
)
SHOWN = (
    *("99990/100000", "loss 12.3456", "norm 123.456", "lr 2.50e-04", "12,346 ms", "1,234,567 tokens/s", "98,765 each"),
    *("TFLOP/s 412 full 381 causal", "MFU 41.7% full 38.5% causal", "71.2/78.9 GiB", "data 0.4 ms"),
    *("epoch 1.25", "slowest rank 127 x1.07", "mtp 3.2500 4.5000"),
)


def shown(width: int, *, terminal: bool, log_every: int = 1) -> str:
    out = io.StringIO()
    screen = console(file=out, width=width, force_terminal=terminal, color_system=None)
    live = LiveProgress(screen)
    live.started(RunRecord(100_000, 99_900, log_every))
    live.stepped(STEP)
    live.evaluated(EvalRecord(99_990, 1.5, 2.25, 3.21))
    live.saving(99_990)
    live.saved(SaveRecord(99_990, Path("/a/long/path/" * 12) / "step-00099990", 4.56))
    live.stepped(STEP)
    live.close()
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_terminal_has_all_figures_under_a_bar(width: int) -> None:
    """Catches: a line that is wider than the window, which breaks, or loses its end."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(width, terminal=True)).replace("\r", "\n").splitlines()
    bar, *figures = [line for line in lines if line.strip()][-5:]
    assert SHOWN[0] in bar
    assert "━" in bar
    assert re.search(r"\d+:\d\d:\d\d left$", bar.rstrip())
    assert all(any(figure in line for line in figures) for figure in SHOWN[1:])
    assert max(map(len, (bar, *figures))) <= width
    assert any("saving ..." in line for line in lines)


def test_a_save_that_is_over_is_no_longer_shown() -> None:
    """Catches: a run whose last picture says that it is saving."""
    out = io.StringIO()
    live = LiveProgress(console(file=out, width=80, force_terminal=True, color_system=None))
    live.started(RunRecord(100_000, 99_900))
    live.stepped(STEP)
    live.saving(99_990)
    live.saved(SaveRecord(99_990, Path("step-00099990"), 4.56))
    before = out.tell()
    live.close()
    assert "12,346 ms" in out.getvalue()[before:]
    assert "saving ..." not in out.getvalue()[before:]


def test_a_run_that_has_made_all_its_steps_says_so() -> None:
    """Catches: a program that is started again, ends at once, and says nothing."""
    out = io.StringIO()
    LiveProgress(console(file=out, width=80)).started(RunRecord(100, 100))
    assert out.getvalue() == "step 100/100: all steps are made, there is nothing left to train\n"


def test_the_table_tells_the_speed_of_the_part_that_ran_last(tmp_path: Path) -> None:
    """Catches: tokens/s of each rank that are no share of the tokens/s beside them, as the ranks were fewer before."""
    args = parse(["--preset", "tiny", "--out", str(tmp_path)], env={}).args
    lines = JsonLines(tmp_path / "metrics.jsonl", after=0)
    for n in range(1, 8):  # five steps of two ranks, then two of four
        ranks = 2 if n <= 5 else 4
        lines.stepped(replace(STEP, step=n, tokens_per_second=4000.0, tokens_per_second_per_gpu=4000.0 / ranks))
    lines.close()
    out = io.StringIO()
    console(file=out, width=80).print(summary(args, None, {}, Outcome(True, 7, 1.0, after=5)))
    assert "4,000, 1,000 each in the median step" in out.getvalue()


@pytest.mark.parametrize(("ms", "median"), [([9000], 9000), ([9000, 100], 100), ([9000, 300, 100, 200], 200)])
def test_the_median_step_is_one_of_them_and_not_the_first(tmp_path: Path, ms: list[int], median: int) -> None:
    """Catches: a step that compiles taken for one of the others; tokens/s of one step beside the time of another."""
    args = parse(["--preset", "tiny", "--out", str(tmp_path)], env={}).args
    lines = JsonLines(tmp_path / "metrics.jsonl", after=0)
    for n, each in enumerate(ms, 1):
        lines.stepped(replace(STEP, step=n, tokens_per_second=18e6 / each, ms_per_step=float(each)))
    lines.close()
    out = io.StringIO()
    console(file=out, width=80).print(summary(args, None, {}, Outcome(True, len(ms), 1.0)))
    assert f"{18e6 / median:,.0f}, 98,765 each in the median step" in out.getvalue()
    assert f" {median:,.0f} ms, 0.4 ms of it for data" in out.getvalue()


def test_rows_are_not_called_tokens() -> None:
    """Catches: tokens a second of a model that knows of none; a rate that is shown as 0.0000."""
    out = io.StringIO()
    live = LiveProgress(console(file=out, width=80))
    live.started(RunRecord(100, unit="rows"))
    live.stepped(replace(STEP, step=7, tflops_per_gpu_full=3.21e-5, tflops_per_gpu_causal=3.04e-5))
    assert "1,234,567 rows/s" in out.getvalue()
    assert "TFLOP/s 3.2e-05 full 3e-05 causal" in out.getvalue()


def test_the_time_left_is_at_the_speed_behind_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a minute of compilation that counts for each hundred steps."""
    out, now = io.StringIO(), iter((0.0, 60.0, 60.0, 69.0))
    monkeypatch.setattr("stretto.report.progress.time.monotonic", lambda: next(now))
    live = LiveProgress(console(file=out, width=200), "lines")
    live.started(RunRecord(100))
    for step in (1, 10):
        live.stepped(replace(STEP, step=step))
    assert [line.split()[-2] for line in out.getvalue().splitlines()] == ["1:39:00", "0:01:30"]


def test_a_file_has_a_line_for_each_report() -> None:
    lines = shown(80, terminal=False).splitlines()
    assert len(lines) == 5
    assert all(figure in lines[0] for figure in SHOWN)
    assert lines[0].endswith(" left")
    assert "held-out loss 1.5000, 2.250 bits per byte" in lines[1]
    assert lines[1].endswith(" in 3.2 s")
    assert lines[2] == "step 99990: saving ..."
    assert lines[3].endswith("step-00099990 in 4.6 s")


def test_a_terminal_breaks_a_long_line_between_words_and_a_file_not_at_all() -> None:
    line = "start-up 6.0 s: " + ", ".join(f"phase{i} 1.0 s" for i in range(9))
    said = {}
    for terminal in (True, False):
        out = io.StringIO()
        screen = console(file=out, width=60, force_terminal=terminal, color_system=None)
        LiveProgress(screen).say(line, by_words=True)
        said[terminal] = out.getvalue()
    assert said[False] == f"{line}\n"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said[True])
    assert line.split() == plain[plain.index("start-up") :].split()[: len(line.split())]
    assert all(len(row) <= 60 for row in plain.splitlines())


def test_without_progress_nothing_is_said() -> None:
    out = io.StringIO()
    none = LiveProgress(console(file=out), "none")
    none.started(RunRecord(100_000, 0, 1))
    none.stepped(STEP)
    none.evaluated(EvalRecord(1, 1.5, 2.25, 0.1))
    none.say("start-up")
    none.close()
    assert out.getvalue() == ""


def test_log_every_thins_the_lines() -> None:
    assert len(shown(80, terminal=False, log_every=7).splitlines()) == 3


def test_the_start_is_told_once_with_its_first_step() -> None:
    now, said = [5.0], []
    timeline = StartTimeline(clock=lambda: now[0], began=1.0)
    timeline.until_now("imports")
    start = StartUp(timeline, World.single(), said.append)
    with timeline.phase("first step"):
        now[0] += 2
    start.stepped(STEP)
    start.stepped(STEP)
    assert said == ["start-up 6.0 s: imports 4.0 s, first step 2.0 s"]


def test_a_sample_cannot_steer_the_terminal() -> None:
    """Catches: an escape sequence, which a model of bytes may well write, that reaches the terminal."""
    out = io.StringIO()
    console(file=out, width=60).print(sample_panel("a\tb", "\x1b[2J\x07[bold]\r\nend"))
    assert "\x1b" not in out.getvalue()
    assert "·[2J·[bold]·" in out.getvalue()
    assert printable("naïve\n") == "naïve\n"


def test_the_curve_runs_from_the_first_loss_to_the_last() -> None:
    steps = [StepRecord(i, 10.0 - i, 1.0, 1.0, i, 1.0) for i in range(1, 9)]
    assert curve(steps) == "█▇▆▅▄▃▂▁"
    assert curve(steps[:1]) == "▁"
    assert len(curve(steps * 40)) == 24


def test_without_bits_per_byte_the_loss_is_told() -> None:
    """Catches: a figure that counts text the tokenizer has lost."""
    out = io.StringIO()
    live = LiveProgress(console(file=out, width=80))
    live.started(RunRecord(9))
    live.evaluated(EvalRecord(9, 1.5, None))
    live.close()
    assert out.getvalue() == "step 9: held-out loss 1.5000\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_tokenizing_tells_how_far_it_is(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: minutes of silence; a line for every chunk of text; a bar that stays; days that are left, by the
    pace of the first kilobyte."""
    now = [0.0]
    monkeypatch.setattr("stretto.report.tokenizing.time.monotonic", lambda: now[0])
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with Tokenizing.shown(out) as tell:
        tell(Progress(0, 10**8, "process 3 on host"))
        now[0] = 12.0
        tell(Progress(500, 10**8, "process 3 on host"))
        now[0] = 0.0
    assert "0 of 100 MB, by process 3" in out.getvalue() or terminal
    assert "days" not in out.getvalue()
    with Tokenizing.shown(out) as tell:
        for now[0] in (0.0, 1.0, 30.0, 31.0, 60.0):
            tell(Progress(int(now[0] * 10**6), 10**8, "process 3 on host"))
    said = out.getvalue()
    assert ("60 of 100 MB, 1.0 MB/s, 0:00:40 left, by process 3 on host" in said) or terminal
    assert said.count("MB/s") == 2 or terminal
    assert ("\x1b[" in said) == terminal
