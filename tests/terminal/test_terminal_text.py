"""No text steers a terminal, and every terminal shows what we say."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.terminal import hand_on, printable, say, speak_any_encoding

pytestmark = pytest.mark.pure


@given(st.text())
def test_printable_text_has_as_many_characters_and_no_controls(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    assert printable(shown) == shown


@pytest.mark.parametrize("c", ["\x1b", "\x07", "\r", "\b", "\x9b", "\x7f", "\u202e", "\u2028", "\udcff"])
def test_what_steers_is_a_dot(c: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: 8-bit controls, directions of writing, and half characters, which also make `print` raise."""
    say(f"a{c}b")
    assert capsys.readouterr().err == "a·b\n"


@pytest.mark.parametrize(
    ("encoding", "said"), [("ascii", "a > . 18 ??"), ("latin-1", "a > · 18 ?é"), ("utf-8", "a → · ▁█ €é")]
)
def test_an_encoding_without_a_character_has_a_stand_in(
    monkeypatch: pytest.MonkeyPatch, encoding: str, said: str
) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    speak_any_encoding()
    say("a → · ▁█ €é", out=True)
    assert out.getvalue().decode(encoding) == said + "\n"


def test_a_program_gets_a_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    hand_on("name = '\u200d'\n")
    assert capsys.readouterr().out == "name = '\u200d'\n"


def test_a_command_says_what_it_could_not_write() -> None:
    """A full disk. Catches: a traceback, and a second error as the interpreter ends."""
    for words in (["--help"], ["explain", "--preset", "tiny"]):
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "stretto", *words]
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert ended.returncode == 2
        assert ended.stderr == f"stretto {words[0]}: standard output: No space left on device\n"


def test_a_message_that_nobody_can_hear_is_no_error() -> None:
    """Catches: a run that is stopped as its terminal closes, and fails where it says so."""
    program = "import os; from stretto.terminal import say; r, w = os.pipe(); os.close(r); os.dup2(w, 2); "
    program += "say('a'); say('b'); print('done')"
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


def test_standard_streams_that_are_closed_are_nobody_elses(tmp_path: Path) -> None:
    """Catches: a checkpoint whose file has the number of standard output, and what libraries print in it."""
    program = "import sys, os; from stretto.terminal import require_streams, say; require_streams(); "
    program += "out = open(sys.argv[1], 'w'); say('a'); say('b', out=True); os.write(1, b'c'); out.write('done')"
    shell = 'exec "$0" -c "$1" "$2" >&- 2>&- <&-'
    ended = subprocess.run(["sh", "-c", shell, sys.executable, program, str(tmp_path / "file")], check=False)
    assert ended.returncode == 0
    assert (tmp_path / "file").read_text() == "done"
