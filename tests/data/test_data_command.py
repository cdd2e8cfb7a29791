"""`stretto data` says what is in a corpus, and ends with 2 and one line when it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.cli.data import main
from stretto.data.text import Text
from stretto.data.tokenizer import ByteTokenizer

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


def test_inspect_shows_what_the_first_batch_holds(
    text_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: rows that are not those of a run with the same words."""
    monkeypatch.setenv("COLUMNS", "160")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"line {i}\x1b[2J"}) + "\n" for i in range(60)))
    words = ["--data", f"{text_dir}:0.75,{other}:0.25", "--cache", str(tmp_path / "cache"), "--preset", "tiny"]
    words += ["--seq-len", "32", "--global-batch", "12", "--seed", "7", "--held-out", "0.25"]
    assert main(["inspect", *words]) == 0
    said = capsys.readouterr().out
    assert "The first batch, samples 0 to 11 of 32 tokens: songbook 9, other 3" in said
    assert "and 4 more" in said
    assert "\x1b" not in said
    mix = Text.open(parse(words).args).mix
    corpora, windows = mix.order(32, 7).places(0, 8)
    shown = [line.split("│")[1:6] for line in said.splitlines() if line.startswith("│") and "from" not in line][-8:]
    for row, corpus, window in zip(shown, corpora, windows, strict=True):
        ids = mix.stores[int(corpus)].window(int(window), 32)[:-1]
        assert row[1].strip() == ("songbook", "other")[int(corpus)]
        assert row[2].strip() == f"{32 * int(window):,}"
        assert row[4][1:9].split("|")[0].rstrip("\ufffd ") in ByteTokenizer().decode(ids).replace("\n", " ").replace(
            "\x1b", "·"
        )


@pytest.mark.parametrize("words", [["--workers", "0"], ["--workers=x"], ["--workers"]])
def test_workers_are_a_number(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", *words]) == 2
    assert "--workers" in (said := capsys.readouterr().err)
    assert "must be" in said or "lacks its value" in said


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
    assert "a.jsonl, line 1: a list" in line


def test_a_bad_option_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--held-out", "2", "--data", str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert "data.held_out" in err
    assert "nowhere does not exist" in err


@pytest.mark.parametrize(("words", "code"), [([], 2), (["bild"], 2), (["--help"], 0)])
def test_without_a_verb_the_usage_is_said(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == code
    assert "usage: stretto data COMMAND" in (said.err if code else said.out)


def test_help_has_the_options_that_matter_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: all settings of a run, of which four matter."""
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    helped = capsys.readouterr().out
    for word in (
        "usage: stretto data build",
        "Tokenize a corpus",
        "--data PATH",
        "--tokenizer",
        "--held-out",
        "--cache",
        "--preset",
    ):
        assert word in helped
    assert "--tp" not in helped.replace("--set parallel.tp", "")


def test_a_file_is_told_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: the directory in which it lies, as if all of that had been read."""
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n' * 9)
    (tmp_path / "b.txt").write_text("another")
    assert main(["build", "--data", str(tmp_path / "a.jsonl"), "--held-out", "0", "--cache", str(tmp_path / "c")]) == 0
    assert f"{tmp_path / 'a.jsonl'}: 1 file; ready in" in capsys.readouterr().out
