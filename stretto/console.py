"""Consoles of rich that take foreign text as text: neither markup nor emoji nor control characters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr
from typing import IO, Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from stretto.terminal import direct, named_in_errors, printable, say, silence

_SIZES: Final = ("COLUMNS", "LINES", "JUPYTER_COLUMNS", "JUPYTER_LINES")
_NARROWEST, _WIDEST = 20, 2000


class SafeConsole(Console):
    """As rich's, but strings are shown as they are; markup of our own is `Text.from_markup`.

    Where what is said is not what the program is for, `goes_on`: what cannot be written any more (`| head`, a full
    disk) is left out from then on, and raises nothing.
    """

    def __init__(self, *, goes_on: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._goes_on = goes_on

    def _check_buffer(self) -> None:
        """Where rich writes."""
        try:
            with named_in_errors(self.file):
                super()._check_buffer()
        except (OSError, SystemExit) as error:  # rich ends the program when nobody reads any more
            if not self._goes_on:
                raise
            self.quiet = True
            silence(self.file)
            if isinstance(error, OSError):  # not by way of this console, through which a live one sends it
                with redirect_stderr(direct(sys.stderr)):
                    say(f"stretto: {error.filename}: {error.strerror}; the run goes on, unheard")

    def render_str(self, text: str, **style: Any) -> Text:
        """A string of a table or a line, cleaned before its width is measured."""
        return super().render_str(printable(text), **style)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is drawn of anything; only rich itself may steer the terminal."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def console(*, stderr: bool = False, file: IO[str] | None = None, **options: Any) -> Console:
    """A console; sizes in the environment that are none are passed over."""
    return SafeConsole(
        stderr=stderr, file=file, markup=False, emoji=False, highlight=False, _environ=_environment(), **options
    )


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _SIZES or _is_size(value)}


def _is_size(value: str) -> bool:
    return value.isascii() and value.isdigit() and len(value) < 6 and _NARROWEST <= int(value) <= _WIDEST
