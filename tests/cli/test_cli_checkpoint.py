"""`stretto checkpoint`: what it says of checkpoints that are whole, damaged, unfinished, or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stretto.checkpoint import save
from stretto.cli import main
from stretto.params import Slice
from stretto.world import World

pytestmark = pytest.mark.gloo

RECORD = {"record": {"arguments": {"parallel": {"tp": 2, "dp": 4, "sharding": "fsdp", "schedule": "1f1b"}}}}


def write(directory: Path, step: int, **more: float) -> Path:
    values = {"model/a": 1.0, "model/b": 2.0} | {f"model/{name}": value for name, value in more.items()}
    slices = [Slice(name, torch.full((4, 3), x), (4, 3), (0, 0), True) for name, x in values.items()]
    return save(directory / "checkpoints", step, slices, RECORD | {"step": step}, World.single())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    for step in (10, 20, 30):
        write(tmp_path / "run", step, b=float(step))
    return tmp_path / "run"


def test_list_and_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step-00000020/COMPLETE").unlink()
    assert main(["checkpoint", "list", str(run)]) == 0
    said = capsys.readouterr().out
    lines = [line.split()[:1] + line.split()[3:4] for line in said.splitlines()[1:4]]
    assert lines == [["30", "yes"], ["20", "no"], ["10", "yes"]]
    assert "tp=2 x dp=4, fsdp, 1f1b" in said
    assert "step-00000020: " in said
    assert "its save did not finish" in said
    assert main(["checkpoint", "show", str(run), "--tensors"]) == 0
    said = capsys.readouterr().out
    for part in ("tp=2 x dp=4, fsdp, 1f1b, 1 ranks", "2 tensors, 96 B", "model/a", "4 x 3", "float32"):
        assert part in said


def test_verify_finds_a_flipped_bit_and_names_the_tensor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a look at sizes alone."""
    assert main(["checkpoint", "verify", str(run), "--all"]) == 0
    assert capsys.readouterr().out.count(": whole; 2 tensors, 96 B") == 3
    file = run / "checkpoints/step-00000030/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[content.index(torch.full((3,), 30.0).numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert "step-00000030: damaged" in said
    assert "model/b: 48 bytes from" in said
    assert "model/a" not in said
    assert f"go on from step 20: mv {file.parent} {file.parent}.damaged" in said


@pytest.mark.parametrize("words", [["verify"], ["show"], ["diff"]])
def test_a_newer_checkpoint_that_is_not_whole_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Catches: verify of the one before, which is whole, and not a word of the newest, which was truncated."""
    newest = run / "checkpoints/step-00000030"
    file = newest / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    asked = ["checkpoint", *words, str(run), *([str(run)] if words == ["diff"] else [])]
    assert main(asked) == (words == ["verify"])
    said = "".join(capsys.readouterr())
    assert f"{file} has {file.stat().st_size} bytes, {file.stat().st_size + 1} were written" in said
    assert "step-00000020" in said
    (newest / "COMPLETE").unlink()  # it may be on its way
    assert main(asked) == 0
    assert f"passing over {newest} has no COMPLETE" in capsys.readouterr().err


def test_verify_of_a_run_without_a_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a message about the directory of the run, which is no checkpoint and need not be one."""
    path = write(tmp_path, 1)
    (path / "extra.json").write_text("{}")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert f"{path}: damaged" in capsys.readouterr().out
    assert main(["checkpoint", "show", str(tmp_path)]) == 2
    assert f"no checkpoint of {tmp_path} is whole; the newest: {path}" in capsys.readouterr().err
    (path / "COMPLETE").unlink()
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2


def test_diff_names_tensors_and_settings(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "other", 30, b=30.5, c=0.0)
    extra = json.loads((other / "extra.json").read_text())
    assert main(["checkpoint", "diff", str(run), str(run / "checkpoints/step-00000030")]) == 0
    assert "0 of 2 tensors differ, 0 settings" in capsys.readouterr().out
    assert main(["checkpoint", "diff", str(run), str(other.parent)]) == 1
    said = capsys.readouterr().out
    assert "model/b  (4, 3) float32" in said
    assert " 12 " in said
    assert " 0.5" in said
    assert "in step-00000030 alone" in said
    assert "2 of 3 tensors differ" in said
    assert extra["step"] == 30


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["checkpoint", "prune", str(run), "--keep", "1", "--keep-every", "20"]
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == f"would remove {run}/checkpoints/step-00000010\n"
    assert main(words) == 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "nowhere"], "nowhere does not exist: name the directory of a run"),
        (["list", "."], ". has no checkpoints: name the directory of a run"),
        (["verify", "nowhere"], "nowhere does not exist: name a checkpoint"),
        (["show", "nosuch://x"], "nosuch://x: "),
        (["prune", "run", "--keep", "0"], "keep=0: at least the newest checkpoint must stay"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    (run.parent / "empty").mkdir()
    monkeypatch.chdir(run.parent if words[0] == "prune" else run.parent / "empty")
    code = main(["checkpoint", *words])
    shown = capsys.readouterr()
    if words[0] == "verify":
        assert (code, said in shown.out + shown.err) in ((1, True), (2, True))
    else:
        assert code == 2
        assert said in shown.err


def test_it_starts_without_torch(run: Path) -> None:
    """And so do writers. Catches: an import at the top that costs each of them seconds."""
    program = "import sys; from stretto.cli import main; import stretto.checkpoint.writer; code = main(sys.argv[1:]); "
    program += "sys.exit(code or ('torch' in sys.modules and 9))"
    words = ["checkpoint", "verify", str(run)]
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
