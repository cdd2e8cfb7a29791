"""What a person sees, in narrow and wide windows and in a file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from stretto.data.lock import Progress
from stretto.initialize.timeline import StartTimeline
from stretto.report.printable import printable
from stretto.report.progress import LiveProgress
from stretto.report.start_up import StartUp
from stretto.report.summary import curve, sample_panel
from stretto.report.tokenizing import Tokenizing
from stretto.train.record import EvalRecord, StepRecord
from stretto.world import World

pytestmark = pytest.mark.gloo

STEP = StepRecord(99_990, 12.3456, 123.456, 2.5e-4, 10**12, 1_234_567.0)
SHOWN = ("99990/100000", "loss 12.3456", "norm 123.456", "lr 2.50e-04", "1,234,567 tokens/s")


def shown(width: int, *, terminal: bool, log_every: int = 1) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    live = LiveProgress(console, steps=100_000, after=99_900, log_every=log_every)
    live.stepped(STEP)
    live.evaluated(EvalRecord(99_990, 1.5, 2.25))
    live.saved(99_990, Path("/a/long/path/" * 12) / "step-00099990")
    live.close()
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_terminal_has_all_figures_in_two_lines(width: int) -> None:
    """Catches: a line that is wider than the window, which breaks, or loses its end."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(width, terminal=True)).replace("\r", "\n").splitlines()
    bar, figures = [line for line in lines if line.strip()][-2:]
    assert SHOWN[0] in bar
    assert "━" in bar
    assert re.search(r"\d+:\d\d:\d\d left$", bar.rstrip())
    assert all(figure in figures for figure in SHOWN[1:])
    assert max(len(bar), len(figures)) <= width


def test_a_file_has_a_line_for_each_report() -> None:
    lines = shown(80, terminal=False).splitlines()
    assert len(lines) == 3
    assert all(figure in lines[0] for figure in SHOWN)
    assert lines[0].endswith(" left")
    assert "held-out loss 1.5000, 2.250 bits per byte" in lines[1]
    assert lines[2].endswith("step-00099990")


def test_a_terminal_breaks_a_long_line_between_words_and_a_file_not_at_all() -> None:
    line = "start-up 6.0 s: " + ", ".join(f"phase{i} 1.0 s" for i in range(9))
    said = {}
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, width=60, force_terminal=terminal, color_system=None)
        LiveProgress(console, steps=1, after=0, log_every=1).say(line, by_words=True)
        said[terminal] = out.getvalue()
    assert said[False] == f"{line}\n"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said[True])
    assert line.split() == plain[plain.index("start-up") :].split()[: len(line.split())]
    assert all(len(row) <= 60 for row in plain.splitlines())


def test_log_every_thins_the_lines() -> None:
    assert len(shown(80, terminal=False, log_every=7).splitlines()) == 2


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
    Console(file=out, width=60).print(sample_panel("a\tb", "\x1b[2J\x07[bold]\r\nend"))
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
    live = LiveProgress(Console(file=out, width=80), steps=9, after=0, log_every=1)
    live.evaluated(EvalRecord(9, 1.5, None))
    live.close()
    assert out.getvalue() == "step 9: held-out loss 1.5000\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_tokenizing_tells_how_far_it_is(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: minutes of silence; a line for every chunk of text; a bar that stays."""
    now = [0.0]
    monkeypatch.setattr("stretto.report.tokenizing.time.monotonic", lambda: now[0])
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with Tokenizing.shown(out) as tell:
        for now[0] in (0.0, 1.0, 30.0, 31.0, 60.0):
            tell(Progress(int(now[0] * 10**6), 10**8, "process 3 on host"))
    said = out.getvalue()
    assert ("60 of 100 MB, 1.0 MB/s, 0:00:40 left, by process 3 on host" in said) or terminal
    assert said.count("MB/s") == 2 or terminal
    assert ("\x1b[" in said) == terminal
