"""What a person sees, in narrow and wide windows and in a file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from stretto.console import console
from stretto.data.lock import Progress
from stretto.initialize.timeline import StartTimeline
from stretto.report.progress import LiveProgress
from stretto.report.start_up import StartUp
from stretto.report.summary import curve, sample_panel
from stretto.report.tokenizing import Tokenizing
from stretto.terminal import printable
from stretto.train.record import EvalRecord, RunRecord, SaveRecord, StepRecord
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
