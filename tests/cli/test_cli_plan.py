"""P19: layouts that fit a device, the quickest first, from arguments alone."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from stretto.arguments import parse
from stretto.cli.plan import main
from stretto.estimate import fullest
from stretto.estimate.chips import CHIPS
from stretto.estimate.step_time import step_time

pytestmark = pytest.mark.pure

RUN = ["--preset", "llama3-8b", "--nproc", "8", "--seq-len", "8192", "--global-batch", "64"]


def test_what_it_says_first_fits_and_takes_so_long(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: words that a run rejects; figures of another run than the words make; rows out of order."""
    assert main([*RUN, "--hbm", "80"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r" *[\d,]+ +[\d,]+ +[\d.]+ ", line)]
    times = [int(row[0].replace(",", "")) for row in rows]
    assert times == sorted(times)
    assert all(float(row[2]) <= 80 for row in rows)
    assert len(rows) == 10
    (words,) = (line.split() for line in out.splitlines() if line.startswith("  --"))
    args = parse([*RUN, "--device", "cuda", *words], files=False).args
    assert round(step_time(args, CHIPS["h200"]).total * 1e3) == times[0]
    assert f"{fullest(args) / 2**30:.1f}" == rows[0][2]


def test_what_the_words_set_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([*RUN, "--tp", "2", "--sharding", "zero1", "--micro-batch", "1", "--pp", "2", "--schedule", "1f1b"]) == 0
    )
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if re.match(r" *[\d,]+ +[\d,]+ +[\d.]+ ", line)]
    assert rows
    assert len(set(rows)) == len(rows)  # a schedule that is set is tried once
    assert "not varied, as they are set: --tp, --pp, --micro-batch, --schedule, --sharding" in out
    assert all("tp=2 pp=2 dp=2 1f1b zero1 1 " in " ".join(row.split()) for row in rows)


def test_where_nothing_fits_it_says_what_lacks_least(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--hbm", "9", "--micro-batch", "1"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"nothing fits: --tp 8 --pp 1 .* lacks least, [\d.]+ GiB; try more GPUs", out)


def test_a_budget_of_activations_leaves_what_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Layouts whose activations do not fit the budget are passed over, and it alone chooses what is recomputed."""
    words = ["--preset", "llama3-8b", "--nproc", "16", "--pp", "1", "--micro-batch", "1", "--global-batch", "16"]
    assert main([*words, "--activation-budget", "1GB"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r" *[\d,]+ +[\d,]+ +[\d.]+ ", line)]
    assert {row[3] for row in rows} <= {"tp=4", "tp=8"}
    assert "--recompute" not in out
    assert main([*words, "--activation-budget", "1MB"]) == 1
    assert "no layout passes the rules" in capsys.readouterr().out


def test_experts_are_spread(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "qwen3-30b-a3b", "--nproc", "8", "--micro-batch", "1", "--pp", "1", "--hbm", "100"]) == 0
    assert "ep=8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu"], "rates are those of GPUs in bf16 or FP8, but device = cpu; try --device cuda"),
        (["--chip", "abacus"], "h100, h200"),
        (["--tp", "3"], "tp"),
    ],
)
def test_what_is_no_run_is_rejected(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, *words]) == 2
    assert said in capsys.readouterr().err


def test_it_imports_no_torch() -> None:
    words = [*RUN, "--tp", "1", "--pp", "1", "--micro-batch", "1"]
    code = f"import sys; from stretto.cli.plan import main; main({words}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_layout_of_a_preset_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a number of GPUs that is rejected beside the dp and ep of the preset, which the plan is to choose."""
    few = ["--tp", "1", "--pp", "1", "--sharding", "zero1", "--micro-batch", "1", "--recompute", "none"]
    assert main(["--preset", "qwen3-30b-a3b", "--layers", "4", "--nproc", "16", "--top", "1", *few]) == 0
    assert " dp=16" in capsys.readouterr().out
    assert main(["--preset", "qwen3-30b-a3b", "--nproc", "16", "--dp", "3"]) == 2, "what the words say does"
