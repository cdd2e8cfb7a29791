"""`stretto data` says what is in a corpus, and ends with 2 and one line when it cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from stretto.cli.data import main

pytestmark = pytest.mark.pure


def test_build_prints_the_split(text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--data", str(text_dir), "--cache", str(tmp_path), "--held-out", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "40 files" in out
    held = next(line for line in out.splitlines() if "held out" in line).replace("│", " ").split()
    train = next(line for line in out.splitlines() if "train" in line).replace("│", " ").split()
    assert int(train[1]) + int(held[2]) == 40
    assert "bigram" not in out


def test_inspect_adds_what_a_model_must_beat(
    text_dir: Path, bpe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data", str(text_dir), "--cache", str(tmp_path), "--tokenizer", str(bpe_dir / "tokenizer.json")]
    assert main(["inspect", *where, "--held-out", "0.25"]) == 0
    assert "held out, bits per byte: bigram" in capsys.readouterr().out
    assert main(["inspect", *where, "--held-out", "0"]) == 0
    assert "bigram" not in capsys.readouterr().out


def test_inspect_finds_a_damaged_token(text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--data", str(text_dir), "--cache", str(tmp_path)]
    assert main(["build", *where]) == 0
    (store,) = tmp_path.rglob("train")
    with store.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    assert main(["inspect", *where]) == 2
    assert "is damaged: its tokens do not have the digest of its header" in capsys.readouterr().err


def test_a_bad_corpus_ends_with_2_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("[]\n")
    assert main(["build", "--data", str(tmp_path / "a.jsonl"), "--cache", str(tmp_path / "cache")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stretto data: ")
    assert "a.jsonl, line 1: a JSON list" in line


def test_a_bad_option_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--held-out", "2", "--data", str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert "data.held_out" in err
    assert "nowhere does not exist" in err


@pytest.mark.parametrize(("words", "code"), [([], 2), (["bild"], 2), (["--help"], 0)])
def test_without_a_verb_the_usage_is_said(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    said = capsys.readouterr()
    assert "stretto data build" in (said.err if code else said.out)


def test_help_has_the_options_that_matter_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: all settings of a run, of which four matter."""
    assert main(["build", "--help"]) == 0
    helped = capsys.readouterr().out
    for word in ("stretto data build: tokenize", "--data TEXT", "--tokenizer", "--held-out", "--cache", "--preset"):
        assert word in helped
    assert "--tp" not in helped.replace("--set parallel.tp", "")
