"""A run that is stopped, or killed, and resumed is the uninterrupted one, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_programs import ENV, happens, rows, tensors

from stretto.cli import main, training  # noqa: F401  # loaded before the fork, not after it in each program
from stretto.initialize.stop import REQUEUE
from stretto.testing import Ended, Fresh

pytestmark = pytest.mark.gloo

DP2 = ["--nproc", "2"]


@pytest.fixture(scope="module")
def whole(fresh: Fresh, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ended = fresh.run(main, [*options, *DP2, "--out", str(out)], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    return out


@pytest.fixture
def resume(fresh: Fresh, options: list[str]) -> Callable[..., Ended]:
    """Goes on with the run in a directory."""

    def go_on(out: Path, *layout: str) -> Ended:
        ended = fresh.run(main, [*options, *(layout or DP2), "--out", str(out), "--resume"], env=ENV)
        assert (ended.code, ended.err) == (0, "")
        return ended

    return go_on


def require_same(run: Path, whole: Path) -> None:
    """The same rows, none missing and none twice, and the same weights, masters and moments, to the last bit."""
    assert rows(run) == rows(whole)
    one, other = tensors(run, 12), tensors(whole, 12)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_rows_of_a_run(whole: Path) -> None:
    steps = [row["step"] for row in rows(whole) if "loss" in row]
    evaluated = [row["step"] for row in rows(whole) if "held_out_loss" in row]
    assert (steps, evaluated) == ([*range(1, 13)], [4, 8, 12])
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]


def test_another_tokenizer_is_rejected_with_both_named(fresh: Fresh, options: list[str], whole: Path) -> None:
    """Catches fingerprints alone, and the advice to give the model another vocabulary."""
    ended = fresh.run(main, [*options, "--out", str(whole), "--resume", "--tokenizer", "python"], env=ENV)
    assert ended.code == 2
    said = " ".join(ended.err.split())
    assert "was trained with the tokenizer 'byte' (fingerprint 'byte'), but data.tokenizer is 'python'" in said
    assert "leave --tokenizer out, or say --tokenizer byte, to go on; leave --resume out" in said


@pytest.mark.parametrize("what", ["ctrl_c", "terminate_the_parent", "terminate_this_rank"])
def test_stopped_and_resumed_is_uninterrupted(
    fresh: Fresh, options: list[str], whole: Path, tmp_path: Path, resume: Callable[..., Ended], what: str
) -> None:
    """P15, P18. Catches: votes heard at different steps, a save without its place in the data, evaluations repeated."""
    out = tmp_path / "run"
    ended = fresh.run(happens, what, 3, 1, [*options, *DP2, "--out", str(out)], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    last = ended.out.splitlines()[-1]
    assert last.startswith("stopped at step 4 of 12; go on with the same command and --resume")
    if what == "ctrl_c":
        other_layouts(tmp_path, whole, resume)
    assert "step 4," in resume(out).out
    require_same(out, whole)


@pytest.mark.parametrize(
    ("what", "more", "code"),
    [
        ("warn_the_parent", [], REQUEUE),
        ("warn_the_parent_and_terminate_this_rank", [], 0),
        ("nothing", ["--exit-duration", "0.01", "--auto-resume"], REQUEUE),
    ],
)
def test_a_warned_run_saves_and_asks_to_be_started_again(
    fresh: Fresh, options: list[str], tmp_path: Path, what: str, more: list[str], code: int
) -> None:
    """P15. Catches: SIGUSR1 or a limit without effect, exit codes that differ, a warning over an order."""
    out = tmp_path / "run"
    logs = ["--log-dir", str(tmp_path / "logs")]
    ended = fresh.run(happens, what, 3, 1, [*options, *DP2, *more, *logs, "--out", str(out)], env=ENV)
    assert (ended.code, ended.err) == (code, "")
    told = [(tmp_path / "logs" / f"rank-0000{rank}.jsonl").read_text() for rank in (0, 1)]
    assert [text.count("stopping after this step") for text in told] == [1, 1], "each rank says why, in its file"
    said = ended.out.splitlines()[-1]
    assert ("exit code 75 asks for that" in said) == (code == REQUEUE)
    step = int(said.split()[3])
    assert ("and --resume" in said) == ("--auto-resume" not in more)
    assert 1 <= step < 12
    assert (out / "checkpoints" / f"step-{step:08d}").is_dir()
    if "--auto-resume" in more:
        ended = fresh.run(main, [*options, *DP2, *more, "--out", str(out)], env=ENV)
        assert ended.code == REQUEUE
        assert f"step {step}," in ended.out, "begun anew the first time, it goes on the second"


def other_layouts(tmp_path: Path, whole: Path, resume: Callable[..., Ended]) -> None:
    """P18. The same order of samples and learning rates; the losses of these very samples, up to rounding."""
    for name, layout in (("one", ["--nproc", "1"]), ("four", ["--nproc", "4", "--tp", "2", "--pp", "2"])):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "run", copy)
        resume(copy, *layout)
        for got, expected in zip(rows(copy), rows(whole), strict=True):
            measured = {key for key in expected if "loss" in key or "bits" in key or "norm" in key}
            assert {k: v for k, v in got.items() if k not in measured} == {
                k: v for k, v in expected.items() if k not in measured
            }
            assert {k: got[k] for k in measured} == pytest.approx({k: expected[k] for k in measured}, rel=3e-5)


@pytest.mark.parametrize(
    ("what", "code"),
    [pytest.param("kill_this_rank", 137, marks=pytest.mark.nightly), ("kill_the_parent", -9), ("ctrl_c_twice", 130)],
)
def test_killed_and_resumed_is_uninterrupted(
    fresh: Fresh, options: list[str], whole: Path, tmp_path: Path, resume: Callable[..., Ended], what: str, code: int
) -> None:
    """P16, P18. Catches: rows of the lost steps that stay, an unfinished save that is taken for a whole one."""
    out = tmp_path / "run"
    ended = fresh.run(happens, what, 8, 1, [*options, *DP2, "--out", str(out)], env=ENV)
    assert ended.code == code
    assert ended.seconds < 15
    # Killed before step 8; numbers are read a step late, so the row of step 6 may just be under way.
    assert {row["step"] for row in rows(out)} >= {1, 2, 3, 4, 5}
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # as a machine that stops may leave it
    assert "step 5," in resume(out).out
    require_same(out, whole)


def test_a_finished_run_resumes_to_its_table(whole: Path, tmp_path: Path, resume: Callable[..., Ended]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    assert "tokens seen" in resume(copy).out
    require_same(copy, whole)
