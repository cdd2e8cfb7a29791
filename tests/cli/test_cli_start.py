"""Starting `stretto`: quick, without torch, and without effects of an import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import stretto
from stretto.cli import COMMANDS, main, usage_error
from stretto.initialize.environment import Launch

pytestmark = pytest.mark.pure


def python(code: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def test_help_does_not_wait_for_torch() -> None:
    """Catches: an import of torch, numpy or rich at the top of a module that help needs."""
    ended = python(
        "import sys; from stretto.cli import main; assert main(['--help']) == 0; assert main(['--version']) == 0\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert main(['train', '--tp', '3']) == 2\n"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "set()"), ended.stderr
    for command in COMMANDS:
        assert f"  {command} " in ended.stdout
    assert "--tp" in ended.stdout


def test_little_is_loaded_before_ctrl_c_is_answered() -> None:
    """Catches: a traceback of imports for a user who changes their mind at once."""
    words = [
        sys.executable,
        "-S",
        "-c",
        "import sys, stretto.cli; print(*{'typing', 're', 'difflib'} & set(sys.modules))",
    ]
    root = str(Path(stretto.__file__).parent.parent)
    ended = subprocess.run(words, env={"PYTHONPATH": root}, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr) == ("\n", "")


def test_every_module_can_be_imported_and_does_nothing(tmp_path: Path) -> None:
    """P12. In one process, without arguments or environment, each warning an error."""
    root = Path(stretto.__file__).parent
    names = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in sorted(root.rglob("*.py"))]
    ended = python(
        "import importlib, os, signal, sys, threading\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "def state(): return dict(os.environ), signal.getsignal(2), signal.getsignal(15), threading.active_count()\n"
        "before = state()\n"
        f"for name in {[n for n in names if n != 'stretto.__main__']!r}: importlib.import_module(name)\n"
        "assert state() == before, (before, state())\n"
        "assert os.listdir() == []\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_an_unknown_command_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    said = capsys.readouterr()
    assert "no command 'trian'; did you mean train?" in said.err
    assert said.out == ""
    assert main([]) == 2


@pytest.mark.parametrize(
    ("rank", "local_rank", "waits", "said"),
    [
        (0, 0, False, "stretto train: rank 2: no"),
        (1, 1, True, ""),
        (2, 0, True, "stretto train (rank 2): no"),
        (4, 0, True, "stretto train (rank 4): rank 2: no"),
    ],
)
def test_rank_0_may_speak_first(
    rank: int,
    local_rank: int,
    waits: bool,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: a rank whose early end has the launcher end rank 0 before it has spoken, or that names itself twice."""
    waited: list[float] = []
    monkeypatch.setattr(usage_error.time, "sleep", waited.append)
    assert usage_error.reject("rank 2: no", Launch("torchrun", rank, 6, local_rank, 2)) == 2
    assert bool(waited) == waits
    assert capsys.readouterr().err.strip() == said
