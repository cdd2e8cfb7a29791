"""What rich draws of foreign text is that text."""

from __future__ import annotations

import io

import pytest
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


@pytest.mark.parametrize(
    ("said", "width"), [("0", 80), ("²", 80), ("9" * 99, 80), ("-3", 80), ("19", 80), ("132", 132)]
)
def test_a_width_that_is_none_is_passed_over(monkeypatch: pytest.MonkeyPatch, said: str, width: int) -> None:
    with monkeypatch.context() as within:  # pytest itself asks how wide the terminal is before the test's own end
        within.setenv("COLUMNS", said)
        within.setenv("LINES", said)
        assert console(file=io.StringIO()).width == width
