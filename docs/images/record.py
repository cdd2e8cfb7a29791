"""Make a picture of a terminal from a real run: python docs/images/record.py PICTURE.svg COMMAND ...

The command runs on a terminal of its own, in an empty directory; what that terminal shows at the end, colours
included, is the picture.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections import defaultdict
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 112, 60
PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def record(command: list[str]) -> str:
    """All that `command` writes to a terminal, control sequences included. Raises when it fails."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))

    def take_terminal() -> None:
        """As a shell starts a command: the terminal is the session's, and the command in its foreground."""
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    written = bytearray()
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=empty,
            env=env,
            preexec_fn=take_terminal,  # noqa: PLW1509
        )
        os.close(theirs)
        while chunk := _read(ours):
            written += chunk
        if process.wait():
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{written.decode()}")
    return written.decode()


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # Linux says EIO, not end of file, when the last writer has gone
        return b""


def screen(written: str) -> list[str]:
    """The lines that a terminal shows in the end: obeys line feeds, erased lines and the cursor going up."""
    lines: defaultdict[int, str] = defaultdict(str)
    row = 0
    for arguments, control, feed, text in PIECE.findall(written):
        if feed == "\n":
            row += 1
        elif control == "A":
            row -= int(arguments or 1)
        elif control == "K":
            lines[row] = ""
        elif control == "m":
            lines[row] += f"\x1b[{arguments}m"
        else:
            lines[row] += text
    return [lines[i] for i in range(max(lines) + 1)]


def main() -> None:
    """Run the command, keep the picture."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    picture, *command = sys.argv[1:]
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    shown = screen(record(command))
    console.print(f"[bold green]$[/] {' '.join([Path(command[0]).name, *command[1:]])}", highlight=False)
    console.print(Text.from_ansi("\n".join(shown).strip("\n")), soft_wrap=True)
    Path(picture).write_text(console.export_svg(title="stretto"))


if __name__ == "__main__":
    main()
