"""Bad configurations and the exact words they are rejected with, as a transcript to read.

`data/rejections.txt` has for each case a command, perhaps the text of the file that it reads (lines that begin
with `|`), and the whole message. After a change of words: `python tests/arguments/test_arguments_rejections.py`
writes the messages anew; read the difference.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stretto.arguments import ConfigError
from stretto.cli.words import parse_or_demo

pytestmark = pytest.mark.pure

TRANSCRIPT = Path(__file__).parent / "data" / "rejections.txt"


@dataclass(frozen=True)
class Case:
    command: str
    file: str
    message: str

    def rejection(self) -> str:
        """What the command says; the directory is one that has the case's file in it."""
        words = shlex.split(self.command)
        env = {"WORLD_SIZE": words.pop(0).partition("=")[2]} if words[0].startswith("WORLD_SIZE=") else {}
        name = next((w for w in words if re.fullmatch(r"\w+\.(toml|ya?ml|txt)", w)), None)
        if self.file and name:
            Path(name).write_text(self.file)
        try:
            parse_or_demo(words[2:], env=env)
        except ConfigError as error:
            return str(error)
        return "accepted"

    def __str__(self) -> str:
        file = "".join(f"| {line}\n" for line in self.file.splitlines())
        return f"$ {self.command}\n{file}{self.message}\n"


def cases() -> Iterator[Case]:
    for block in re.split(r"^\$ ", TRANSCRIPT.read_text(), flags=re.MULTILINE)[1:]:
        command, *rest = block.rstrip("\n").split("\n")
        file = [line.removeprefix("| ") for line in rest if line.startswith("| ")]
        yield Case(command, "\n".join(file), "\n".join(line for line in rest if not line.startswith("| ")).rstrip())


def test_every_bad_configuration_is_rejected_in_these_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begin = time.process_time()
    all_cases = list(cases())
    found = [replace(case, message=case.rejection()) for case in all_cases]
    assert found == all_cases, (
        "run: .venv/bin/python tests/arguments/test_arguments_rejections.py, and read the difference"
    )
    assert time.process_time() - begin < 2.0
    assert len(all_cases) >= 80
    assert not any(case.message == "accepted" for case in all_cases)


def test_rejecting_needs_no_torch() -> None:
    code = (
        "import sys, stretto.arguments as a\n"
        "try: a.parse(['--tp', '3'], env={})\n"
        "except a.ConfigError: sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        anew = [str(replace(case, message=case.rejection())) for case in cases()]
    TRANSCRIPT.write_text("\n".join(anew))
