"""What cannot run is rejected in one message with all that is wrong, and nothing on disk has changed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_programs import ENV, happens, reads_other_text, rows

from stretto.arguments import parse
from stretto.cli import main, training  # noqa: F401  # loaded before the fork, not after it in each program
from stretto.testing import Ended, Fresh
from stretto.train.consensus import RunRejectedError
from stretto.train.directory import occupied

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def earlier(fresh: Fresh, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two ranks that was stopped after step 4."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    ended = fresh.run(happens, "terminate_this_rank", 3, 1, [*options, "--nproc", "2", "--out", str(out)], env=ENV)
    assert ended.code == 0
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def finished(*command: str) -> subprocess.CompletedProcess[str]:
    """What a launcher and its ranks said."""
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def rejected(fresh: Fresh, options: list[str], earlier: Path) -> Callable[..., str]:
    """Run with these further words in the place of an earlier run; what is said, once that is all that happened."""

    def run(*words: str, out: Path = earlier, code: int = 2) -> str:
        before = contents(out.parent)
        ended: Ended = fresh.run(main, [*options, "--nproc", "2", "--out", str(out), *words], env=ENV)
        assert (ended.code, ended.out) == (code, "")
        assert "Traceback" not in ended.err
        assert contents(out.parent) == before
        return ended.err

    return run


def test_all_violations_at_once(rejected: Callable[..., str], tmp_path: Path) -> None:
    """P3. A layout that does not fit, sizes that do not divide, no data, a typing error, an unknown flag."""
    words = "--tp 3 --dp 2 --micro-batch 3 --dtype bf61 --layerz 1 --data"
    err = rejected(*words.split(), str(tmp_path / "nowhere"))
    assert [
        said
        for said in ("nproc", "heads % tp", "bf61", "bf16", "--layers", "nowhere does not exist")
        if said not in err
    ] == []
    assert err.count("problems in the configuration") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (
            ["--checkpoint", ".", "--tokens", "0", "--temperature", "-1"],
            "--tokens: 0 is out of range, must be >= 1\n  --temperature: -1.0 is out of range",
        ),
        (["--checkpoint", "/"], "/ has no COMPLETE"),
    ],
)
def test_a_sample_from_nothing(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["sample", "--prompt", "a", *words])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_an_unknown_key_in_a_file(rejected: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[parallel]\ntensor = 2\n\n[optimiser]\nlr = 1.0\n")
    err = rejected("--config", str(tmp_path / "run.toml"))
    assert "parallel.tensor" in err
    assert "optimiser" in err


def test_an_empty_directory_of_data(rejected: Callable[..., str], tmp_path: Path) -> None:
    assert "has no files" in rejected("--data", str(tmp_path))


def test_a_file_that_is_no_tokenizer(rejected: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "no tokenizer.json of the tokenizers library" in rejected("--tokenizer", str(tmp_path / "tokenizer.json"))


def test_a_text_that_is_shorter_than_a_sample(rejected: Callable[..., str]) -> None:
    """Catches: moving the earlier run aside before all ranks have what they need."""
    err = rejected("--seq-len", "100000")
    assert err.count("a sample takes seq_len + 1 = 100001") == 1


def test_a_model_without_room_for_the_tokenizer(rejected: Callable[..., str]) -> None:
    assert "the tokenizer 'byte' has 257 entries" in rejected("--vocab", "100")


def test_resume_where_no_run_was(rejected: Callable[..., str], tmp_path: Path) -> None:
    err = rejected("--resume", out=tmp_path / "none" / "run")
    assert "no complete checkpoint" in err
    assert "leave --resume out to begin anew" in err


def test_resume_with_fewer_steps_than_are_done(rejected: Callable[..., str]) -> None:
    assert "is of step 4" in rejected("--resume", "--steps", "3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hidden", "64"], "model.hidden was 32 in "),
        (["--seed", "5"], "run.seed was 1234 in "),
        (["--held-out", "0.5"], "digest was"),
    ],
)
def test_resume_as_another_run(rejected: Callable[..., str], words: list[str], said: str) -> None:
    """Catches: going on over other text, as if it were the same."""
    assert said in rejected("--resume", *words)


def test_resume_from_a_corrupt_checkpoint(
    fresh: Fresh, rejected: Callable[..., str], earlier: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "root" / "run"
    fresh.run(copy_tree, earlier, copy)
    damaged = next((copy / "checkpoints" / "step-00000004").glob("__0_*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    err = rejected("--resume", out=copy)
    assert "passing over" in err
    assert "no complete checkpoint" in err


def test_a_damaged_file_in_a_directory_that_is_called_timeout(
    fresh: Fresh, rejected: Callable[..., str], earlier: Path, tmp_path: Path
) -> None:
    """Catches: the words of an error of a file that are taken for those of a lost peer, with a traceback."""
    copy = tmp_path / "timeout-3" / "connection reset"
    fresh.run(copy_tree, earlier, copy)
    damaged = next((copy / "checkpoints" / "step-00000004").glob("__0_*.distcp"))
    content = bytearray(damaged.read_bytes())
    for at in range(len(content) // 2, len(content) // 2 + 2000):  # numbers among them
        content[at] ^= 1
    damaged.write_bytes(content)
    err = rejected("--resume", out=copy)
    assert err.count(f"{damaged.name}: the ") == 1
    assert "the checksum differs" in err


def copy_tree(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


def test_a_directory_that_is_no_run_is_not_moved(rejected: Callable[..., str], tmp_path: Path) -> None:
    """Catches: `--out ~` that renames a home directory."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear reader")
    assert "is not the directory of a run" in rejected(out=home)


@pytest.mark.parametrize("flag", ["--out", "--checkpoint-dir", "--log-dir"])
def test_a_directory_of_a_file_system_that_takes_none(rejected: Callable[..., str], flag: str) -> None:
    """It may be written, as far as root can see. Catches: a bare errno once all is loaded, or a traceback."""
    said = rejected(flag, "/proc/run")
    if os.geteuid() == 0:
        assert said.startswith(f"stretto train: {flag} /proc/run cannot be written: ")
        assert said.count("\n") == 1
    else:
        assert "/proc/run: /proc may not be written" in said


def test_a_full_disk_is_said_with_the_directory(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: an errno alone."""

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    out = occupied(parse([*options[1:], "--out", str(tmp_path / "run")]), resume=False)
    with pytest.raises(RunRejectedError, match=r"--out .*/run cannot be written: No space left on device"), out:
        pass


def test_a_directory_in_use(rejected: Callable[..., str], options: list[str], earlier: Path) -> None:
    """Catches: a run that moves aside the directory in which another one is writing."""
    with occupied(parse([*options[1:], "--out", str(earlier)]), resume=True):
        assert "is training in" in rejected("--resume")
        assert "is training in" in rejected()


def test_ranks_that_read_different_text(
    fresh: Fresh, options: list[str], corpus: Path, earlier: Path, tmp_path: Path
) -> None:
    """Catches: nodes that train on their own Python's standard library, each on another one."""
    copy_tree(corpus, tmp_path / "other")
    (tmp_path / "other" / "00.txt").write_text("once upon a time")
    before = contents(earlier)
    words = [*options, "--nproc", "4", "--tp", "2", "--out", str(earlier)]
    ended = fresh.run(reads_other_text, [1, 3], str(tmp_path / "other"), words, env=ENV)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("ranks read different text") == 1
    assert "ranks 0, 2 on " in ended.err
    assert "ranks 1, 3 on " in ended.err
    assert contents(earlier) == before


def test_an_earlier_run_is_kept(fresh: Fresh, options: list[str], earlier: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy_tree(earlier, copy)
    ended = fresh.run(main, [*options, "--steps", "1", "--out", str(copy)], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    assert "an earlier run moved to" in " ".join(ended.out.split()), "wherever the line breaks: the path may be long"
    assert rows(copy.with_name("run.1")) == rows(earlier)
    assert len([row for row in rows(copy) if "loss" in row]) == 1


@pytest.mark.parametrize(
    "words",
    [["--tp", "3", "--layerz", "2"], pytest.param(["--seq-len", "100000"], marks=pytest.mark.nightly)],
)
def test_under_torchrun_it_is_said_once(
    torchrun: list[str], options: list[str], earlier: Path, words: list[str]
) -> None:
    """Catches: each rank that says it, and rank 0 that is ended before it could."""
    before = contents(earlier)
    ended = finished(*torchrun, "-m", "stretto", *options, "--out", str(earlier), *words)
    assert ended.returncode != 0
    assert ended.stderr.count("stretto train:") == 1
    assert contents(earlier) == before
    said = ended.stderr[ended.stderr.index("stretto train:") :]
    assert ("layerz" in said and "tp" in said) or "100001" in said


def test_ranks_that_are_started_with_other_words(torchrun: list[str], options: list[str], tmp_path: Path) -> None:
    """Catches: a script that gives each rank a learning rate of its own, which trained."""
    program = 'exec "$0" -m stretto "$@" --lr "1e-$((RANK + 3))"'
    words = [*options, "--out", str(tmp_path / "run")]
    ended = finished(*torchrun, "--no-python", "sh", "-c", program, sys.executable, *words)
    assert ended.returncode != 0
    assert "\n  optimizer.lr: 0.001 on rank 0, 0.0001 on rank 1\n" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_the_resolved_configuration_runs_again(fresh: Fresh, earlier: Path, tmp_path: Path) -> None:
    words = ["train", "--config", str(earlier / "resolved.toml"), "--nproc", "2", "--out", str(tmp_path / "again")]
    ended = fresh.run(main, [*words, "--steps", "12"], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    assert json.dumps(rows(tmp_path / "again")[:4]) == json.dumps(rows(earlier)[:4])
