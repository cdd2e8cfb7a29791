"""`stretto train --megatron FLAGS...` is `stretto convert args` and `--config` in one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from stretto.arguments import ConfigError, parse
from stretto.cli import convert, explain, launch, train, verify
from stretto.cli.megatron import layer
from stretto.compat.megatron import words_of

pytestmark = pytest.mark.pure

SCRIPT = Path(__file__).parents[1] / "compat" / "llama.sh"
FLAGS = [word for flag in words_of(SCRIPT.read_text()) for word in flag]
SMALL = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --attention-dropout 0 --hidden-dropout 0 --vocab-size 300 "
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 32 --train-iters 10 --lr 1e-3"
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_the_same_run_as_by_way_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    assert convert.main(["args", str(SCRIPT), "--out", str(file)]) == 0
    own = ["--nproc", "64", "--seed", "7"]
    through_file = parse([*own, "--config", str(file)], env={})
    at_once = parse([*own, "--megatron", *FLAGS], env={}, translate=layer)
    assert at_once.args == through_file.args
    assert at_once.layout.size("dp") == 2
    assert str(at_once.sources["parallel.tp"]) == "file of Megatron-LM's flags"


def test_settings_of_our_own_before_them_are_stronger() -> None:
    run = parse(["--device", "cpu", "--layers", "6", "--nproc", "4", "--megatron", *SMALL], env={}, translate=layer)
    assert (run.args.model.layers, run.args.run.device, run.layout.size("dp")) == (6, "cpu", 4)


def test_all_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--tp", "3", "--megatron", *SMALL, "--fp16", "--num-layer", "3", "--use-mcore-models"]) == 2
    heard = capsys.readouterr().err
    for line in (
        "megatron: --fp16: fp16 with loss scaling is not available",
        "megatron: --num-layer: is not known; did you mean --num-layers?",
        "heads % tp = 4 % 3 = 1, must be 0",
        "changes nothing here: --use-mcore-models: chooses among implementations",
    ):
        assert line in heard


def test_explain_and_launch_take_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main(["--world-size", "4", "--megatron", *SMALL]) == 0
    assert "= 4 cuda ranks" in capsys.readouterr().out
    assert launch.main(["slurm", "--nodes", "1", "--", "--megatron", *SMALL]) == 0
    assert "--megatron --num-layers 2" in capsys.readouterr().out
    assert launch.main(["local", "2", "--tp", "3", "--megatron", *SMALL]) == 2
    assert "nproc % (tp*cp*pp) = 2 % (3*1*1) = 2" in capsys.readouterr().err


def test_verify_takes_them_too_after_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Rejected for what they say, not for being there."""
    assert verify.main(["--updates", "1", "--tp", "3", "--megatron", *SMALL, "--num-layer", "3"]) == 2
    heard = capsys.readouterr().err
    assert "megatron: --num-layer: is not known; did you mean --num-layers?" in heard
    assert "heads % tp = 4 % 3 = 1, must be 0" in heard


def test_where_they_are_not_taken_they_are_rejected() -> None:
    with pytest.raises(ConfigError, match="--megatron is not taken here"):
        parse(["--megatron", "--num-layers", "2"], env={})


def test_experts_over_more_ranks_than_the_layout_names_go_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many ranks there are is said at the start. Catches: scripts of Mixtral that are rejected for dp = 1."""
    script = tmp_path / "moe.sh"
    flags = "--num-experts 8 --moe-router-topk 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 8"
    script.write_text(f"torchrun --nproc_per_node 8 pretrain_gpt.py {shlex.join(SMALL)} {flags}\n")
    assert convert.main(["args", str(script), "--out", str(tmp_path / "run.toml")]) == 0, capsys.readouterr().err
    assert "dp =" not in (tmp_path / "run.toml").read_text()
    at_work = parse(["--nproc", "16", "--config", str(tmp_path / "run.toml"), "--device", "cpu"], env={}).args
    assert (at_work.parallel.ep, at_work.parallel.dp) == (8, 8)
