"""A run on one screen."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from stretto.cli.explain import main
from stretto.data.corpus import Corpus
from stretto.data.prepare import prepare
from stretto.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.pure


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def test_the_demo_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", "--tp", "2", "--pp", "2", "--dp", "2", "--layers", "4"]) == 0
    said = capsys.readouterr().out
    for line in (
        "tp=2 x cp=1 x dp=2 x pp=2 = 8 cpu ranks, fp32",
        "dp: ranks that average gradients: 0, 2; 1, 3; 4, 6; 5, 7",
        "8 sequences = micro_batch 1 * dp 2 * 4 microbatches",
        "128 tokens a step = 8 * seq_len 16",
        "1f1b, 4 microbatches; bubble (pp-1)/(m+pp-1) = 1/5 = 20.0% if stages were equal",
        "rank 1",
        "derived: tp*cp*pp*dp = 2*1*2*2",
        "preset tiny",
    ):
        assert line in said
    assert "run.seed" not in said, "defaults are left out"


def test_a_block_on_two_stages_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Its parameters are on both; catches halves that are counted as layers."""
    assert main(["--preset", "tiny", "--layers", "4", "--pp", "2", "--no-tied", "--stage-layers", "2.5,1.5"]) == 0
    said = capsys.readouterr().out
    sizes = [
        int(re.search(rf"{held} +[a-z, ]+([\d,]+)", said)[1].replace(",", ""))  # type: ignore[index]
        for held in (r"0\.\.1, attention of 2", "feed-forward of 2, 3", "model +4")
    ]
    assert sizes[0] + sizes[1] == sizes[2]


def test_the_published_size_of_llama(capsys: pytest.CaptureFixture[str]) -> None:
    """70,553,706,496 parameters (Hugging Face, meta-llama/Meta-Llama-3-70B, total of its index)."""
    assert main(["--preset", "llama3-70b", "--nproc", "256"]) == 0
    assert "70,553,706,496" in capsys.readouterr().out


def test_where_nothing_fits_the_leanest_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a list of modes that all do not fit, and nothing to do; settings that the run has already."""
    words = ["--preset", "llama3-8b", "--tp", "1", "--nproc", "8", "--device", "cuda", "--micro-batch", "2"]
    assert main([*words, "--hbm", "40"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"(--(sharding fsdp|micro-batch 1|recompute block) ?){2,3}: [\d.]+ GiB, fits", said)
    assert "with the same words tries" not in said
    assert main([*words, "--hbm", "2", "--recompute", "block"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"(--(sharding fsdp|micro-batch 1|optimizer-cpu-offload) ?){3}: ([\d.]+) GiB, [\d.]+ too much; `stret", said
    )


def test_who_sits_on_which_node(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "llama3-8b", "--world-size", "64", "--gpus-per-node", "4"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "node 1: ranks 4-7, tp 4-7, dp 0" in said
    assert "and so on, 12 more" in said
    assert "warning: tp=8 spans 2 nodes of 4 GPUs" in said
    assert main([*words, "--order", "dp-tp"]) == 0
    assert "node 1: ranks 4-7, tp 0, dp 4-7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model",
    [
        *("", "--tied", "--bias", "--activation gelu --norm layer --position learned --qk-norm"),
        *("--kv-lora-rank 24 --rope-head-dim 4", "--kv-lora-rank 24 --q-lora-rank 10 --v-head-dim 6"),
        "--experts 8 --bias --shared-ffn 64 --first-dense 1",
    ],
)
def test_equations_give_what_they_say(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", *model.split()]) == 0
    lines = " ".join(capsys.readouterr().out.split())
    equations = re.findall(r"= ([0-9][0-9*+() -]*) = ([0-9,]+)", lines)
    assert len(equations) >= 3
    assert [eval(left) for left, _ in equations] == [int(right.replace(",", "")) for _, right in equations]


def test_a_file_may_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[parallel]\ntp = 2\n[model]\nvocab = 1000\n")
    assert main([str(file), "--layers", "5"]) == 0
    assert "tp=2 x cp=1 x dp=1 x pp=1 = 2 cpu ranks" in capsys.readouterr().out


def test_what_cannot_run_is_not_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tp", "4", "--nproc", "7"]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    assert "2 problems in the configuration" in heard.err
    assert main(["--preset", "tiny", "--tokenizer", "missing.json"]) == 2
    assert main(["--preset", "tiny", "--freeze", "model.nothing.*"]) == 2
    assert "is the name of no parameter" in capsys.readouterr().err


def test_needs_no_torch() -> None:
    code = "import sys; from stretto.cli.explain import main; main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_is_there_at_once() -> None:
    """In less than half a second of the processor, Python's own start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "stretto", "train", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_preset_that_nobody_named_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: the demo taken in silence."""
    said = "preset demo, as neither --preset nor --config is given"
    assert main(["--tp", "1", "--pp", "4"]) == 0
    assert said in capsys.readouterr().out
    assert main(["--preset", "tiny"]) == 0
    assert said not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    helped = capsys.readouterr().out
    assert "starts from the preset demo" in helped
    assert "[default 4; demo: 2]" in helped


def test_text_tokenizer_and_epochs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a page that says nothing of the text, or nothing once it is tokenized."""
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text("x" * 99)
    words = ["--preset", "tiny", "--data", str(tmp_path / "text"), "--cache", str(tmp_path), "--held-out", "0"]
    assert main([*words, "--steps", "50"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "20 files of 1,980 bytes, not tokenized yet, so figures are about tokenizer byte, 257 entries" in said
    assert f"{50 * 8 * 16 / 1980:.2f} epochs of 1,980 tokens" in said
    prepare(Corpus.open(tmp_path / "text"), ByteTokenizer(), held_out=0, cache=tmp_path)
    assert main([*words, "--steps", "50"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "20 documents, 2,001 tokens tokenizer byte, 257 entries, 0.99 bytes a token" in said
    assert f"{50 * 8 * 16 / 2001:.2f} epochs of 2,001 tokens" in said
    assert "WARNING" not in said


@pytest.mark.parametrize("preset", ["gpt2-small", "llama3-8b", "llama3-70b"])
def test_a_real_model_without_its_text_is_told_loudly(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a model of billions that reads the standard library thousands of times, unsaid."""
    assert main(["--preset", preset, "--nproc", "64", "--cache", "/nowhere"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: no --data is given, so a model with a vocabulary of" in said
    assert re.search(r"of the tokenizer byte \(257 entries\), read [0-9,]{5,}\.\d\d times in", said)
    assert main(["--preset", "tiny", "--cache", "/nowhere"]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_text_that_is_not_here_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", "--data", "/cluster/text"]) == 0
    assert "/cluster/text: not known here" in " ".join(capsys.readouterr().out.split())


def test_a_budget_that_no_recomputation_keeps_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    """As `stretto train` says it; it was a traceback behind half of the tables."""
    assert main(["--preset", "tiny", "--activation-budget", "20KB"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "activation_budget = 20KB, but stage 0 needs 32,000 bytes for 1 microbatch" in told.err
