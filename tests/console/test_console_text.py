"""What rich draws of foreign text is that text."""

from __future__ import annotations

import errno
import io
import sys

import pytest
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stretto.console import console

pytestmark = pytest.mark.pure

HOSTILE = "\x1b[31m[bold]x[/nope] :smile: [link=file:///]y\x9b"
SHOWN = "·[31m[bold]x[/nope] :smile: [link=file:///]y·"


@pytest.mark.parametrize("terminal", [False, True])
def test_foreign_text_is_neither_markup_nor_control(terminal: bool) -> None:
    """Catches: a closing tag that nobody opened, which raises, and escape sequences in strings, texts and tables."""
    out = io.StringIO()
    screen = console(file=out, width=100, force_terminal=terminal, color_system=None)
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    for each in (HOSTILE, Text(HOSTILE), table, Panel(HOSTILE, title="t")):
        screen.print(each)
    assert out.getvalue().count(SHOWN) == 5
    assert not {"\x1b", "\x9b"} & set(out.getvalue())


class Full(io.StringIO):
    """A disk without room."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_goes_on_unheard(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: hours of training that end because the disk of the log is full; and a word for each line."""
    screen = console(file=Full(), goes_on=True)
    for _ in range(3):
        screen.print("step 1")
    assert capsys.readouterr().err.count("No space left on device; the run goes on, unheard\n") == 1
    with pytest.raises(OSError, match="No space left"):
        console(file=Full()).print("a table that was asked for")


def test_a_live_display_goes_on_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that was closed. Catches: what says so on a standard error that the display itself shows, for ever."""
    out, err = Full(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with Live("bar", console=console(force_terminal=True, goes_on=True), auto_refresh=False) as live:
        live.update("further", refresh=True)
    assert err.getvalue() == "stretto: standard output: No space left on device; the run goes on, unheard\n"


@pytest.mark.parametrize(
    ("said", "width"), [("0", 80), ("²", 80), ("9" * 99, 80), ("-3", 80), ("19", 80), ("132", 132)]
)
def test_a_width_that_is_none_is_passed_over(monkeypatch: pytest.MonkeyPatch, said: str, width: int) -> None:
    with monkeypatch.context() as within:  # pytest itself asks how wide the terminal is before the test's own end
        within.setenv("COLUMNS", said)
        within.setenv("LINES", said)
        assert console(file=io.StringIO()).width == width
