"""Who speaks during a run, in which style and where, by the options of `stretto train`."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_programs import ENV

from stretto.cli import main, training  # noqa: F401  # loaded before the fork, not after it in each program
from stretto.testing import Fresh

pytestmark = pytest.mark.gloo


def with_errors_on_its_terminal(argv: Sequence[str]) -> int:
    os.dup2(0, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # as in an interpreter that starts there
    return main(argv)


def test_json_on_standard_error_and_every_rank_in_a_file(fresh: Fresh, options: list[str], tmp_path: Path) -> None:
    """Catches: an option that is not passed on, a rank without its file, a line that is not JSON."""
    logs = ["--log-level", "info", "--log-style", "json", "--log-dir", str(tmp_path / "logs")]
    words = [*options, "--steps", "1", "--nproc", "2", "--sample-tokens", "0", "--out", str(tmp_path / "run")]
    ended = fresh.run(main, [*words, *logs], env=ENV)
    assert ended.code == 0, ended.err
    heard = [json.loads(line) for line in ended.err.splitlines()]
    assert {entry["rank"] for entry in heard} == {0}, "others would only warn"
    messages = [entry["message"] for entry in heard]
    assert messages[0].startswith("rank 0 of 2, local rank 0 of 2, by stretto, meeting at 127.0.0.1:")
    assert any(message.startswith("before the first step: imports") for message in messages)
    assert any(message.startswith("start-up: imports") and ", first step " in message for message in messages)
    for rank in (0, 1):
        lines = (tmp_path / "logs" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        assert {entry["rank"] for entry in entries} == {rank}
        assert entries[0]["message"].startswith(f"rank {rank} of 2, ")
        (seconds,) = (entry["seconds"] for entry in entries if "seconds" in entry)
        assert seconds["total"] >= seconds["model"] + seconds["first step"] > 0, "numbers stay numbers"


def test_colours_on_a_terminal_and_without_options_the_launcher_alone(
    fresh: Fresh, options: list[str], tmp_path: Path
) -> None:
    keyboard, terminal = pty.openpty()
    words = [*options, "--steps", "1", "--sample-tokens", "0", "--out", str(tmp_path / "run")]
    env = {name: value for name, value in ENV.items() if name != "NO_COLOR"} | {"TERM": "xterm-256color"}
    program = fresh.start(with_errors_on_its_terminal, [*words, "--log-level", "info"], env=env, terminal=terminal)
    ended = program.wait()
    seen = os.read(keyboard, 65536).decode()
    os.close(keyboard)
    os.close(terminal)
    assert ended.code == 0
    print(repr(seen))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen)
    assert plain != seen, "no colours"
    assert "INFO" in plain
    assert "by python" in plain
    assert "\x1b[" not in ended.out, "a file"
    assert "1, started by python" in ended.out
