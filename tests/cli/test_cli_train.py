"""`stretto train` from end to end: launchers, layouts, data, faults, and what it shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_programs import ENV, happens, rows, tensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stretto.arguments import from_dict, parse
from stretto.checkpoint.marker import read_extra
from stretto.cli import main  # loaded before the fork, not after it in each program
from stretto.cli.stopping import after_divergence
from stretto.data.evaluation import held_out_batches
from stretto.data.text import Text
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Fresh
from stretto.train.sample import load_over
from stretto.world import World

pytestmark = pytest.mark.gloo

CUBE = ["--tp", "2", "--pp", "2", "--sequence-parallel"]
TWO_STEPS = ["--steps", "2", "--nproc", "2", "--tp", "2", "--sample-tokens", "5"]


@pytest.fixture(scope="module")
def cube(fresh: Fresh, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of tp=2 x pp=2 x dp=2 with TensorBoard, stopped at step 4 and resumed: its directory and output."""
    out = tmp_path_factory.mktemp("cube") / "run"
    words = [*options, "--nproc", "8", *CUBE, "--tensorboard", "--out", str(out)]
    stopped = fresh.run(happens, "terminate_this_rank", 3, 6, words, env=ENV)
    assert (stopped.code, stopped.err) == (0, "")
    ended = fresh.run(main, [*words, "--resume", "--sample-tokens", "8", "--profile", "steps=7:8"], env=ENV)
    assert (ended.code, ended.err) == (0, "")  # not a word of torch's profiler
    assert (out / "profile" / "rank-0.trace.json.gz").exists()
    return out, ended.out


def test_a_run_says_what_runs_and_what_came_of_it(cube: tuple[Path, str], corpus: Path) -> None:
    out, said = cube
    before, after = said.split("step  5/12")
    for once in ("tp=2 x pp=2 x dp=2 on 8 ranks (cpu), sequence parallel, 1f1b, fp32", "39,712"):
        assert (before.count(once), after.count(once)) == (1, 1)
    assert f"{corpus.name}: 60 documents" in before
    assert f"step 4, {out}/checkpoints/step-00000004" in before
    for shown in ("groups  ", "pp:1>0[0,4]"):
        assert shown in before
    (start,) = (line for line in before.splitlines() if line.startswith("start-up "))
    assert after.count("start-up") == 0
    phases = ("imports", "data", "rendezvous", "groups", "model", "checkpoint", "output", "evaluation", "first step")
    assert [start.index(f" {phase} ") for phase in phases] == sorted(start.index(f" {phase} ") for phase in phases)
    for shown in ("a sample", "1,536 in 12 steps", "→", "tokens/s", "bigram", "zlib", f"{out}/metrics.jsonl"):
        assert shown in after
    assert f"{out}/checkpoints/step-00000012" in after


def test_tensorboard_has_the_rows_of_the_metrics(cube: tuple[Path, str]) -> None:
    """Also after a resume. Catches: points of a lost run that stay, and points that are there twice."""
    events = EventAccumulator(str(cube[0] / "tensorboard"))
    events.Reload()
    measured = [json.loads(line) for line in (cube[0] / "metrics.jsonl").read_text().splitlines()]
    for tag, key in {
        "loss/train": "loss",
        "grad_norm": "grad_norm",
        "lr": "lr",
        "tokens_per_second": "tokens_per_second",
        "data_wait_ms": "data_wait_ms",
        "loss/held_out": "held_out_loss",
        "bits_per_byte/held_out": "held_out_bits_per_byte",
    }.items():
        expected = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in measured if key in row]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected


def test_one_process_computes_the_logits_of_the_layout(cube: tuple[Path, str]) -> None:
    """The held-out loss that eight ranks measured, from the whole model's logits. P14."""
    path = cube[0] / "checkpoints" / "step-00000012"
    args = from_dict(read_extra(path)["record"]["arguments"])
    model = load_over(args, path, ParallelState.build(Layout.of(), World.single())).stages[0]
    total = count = 0.0
    for (batch,) in held_out_batches(
        Text.open(args).eval_sets[0].store, seq_len=16, global_batch=8, dp_rank=0, dp_size=1, micro_batch=8, limit=1
    ):
        with torch.no_grad():
            logits = model.logits(batch.tokens)[..., :257].transpose(0, 1)  # [b, s, v]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        total += float((losses * batch.loss_mask.flatten()).sum())
        count += float(batch.loss_mask.sum())
    measured = [row["held_out_loss"] for row in rows(cube[0]) if "held_out_loss" in row]
    assert total / count == pytest.approx(measured[-1], rel=1e-6)


def test_sample_continues_in_one_process_and_over_ranks(fresh: Fresh, cube: tuple[Path, str]) -> None:
    words = ["sample", "--prompt", "over the", "--tokens", "12"]
    said = []
    for checkpoint in (cube[0], cube[0] / "checkpoints" / "step-00000012"):
        ended = fresh.run(main, [*words, "--checkpoint", str(checkpoint), "--temperature", "0"], env=ENV)
        assert (ended.code, ended.err) == (0, "")
        said.append(ended.out)
    assert said[0] == said[1]
    assert said[0].startswith("over the")
    for layout in (["--tp", "2", "--pp", "3"], ["--pp", "2"]):
        spread = fresh.run(main, [*words, "--checkpoint", str(cube[0]), "--temperature", "0", *layout], env=ENV)
        assert (spread.code, spread.err, spread.out) == (0, "", said[0])
    drawn = fresh.run(main, [*words, "--checkpoint", str(cube[0])], env=ENV)
    assert drawn.out != said[0]


@pytest.mark.nightly
def test_torchrun_is_the_same_run(fresh: Fresh, options: list[str], torchrun: list[str], tmp_path: Path) -> None:
    """P21, bit for bit."""
    words = [*options, "--steps", "6", "--dp", "2"]
    ended = subprocess.run(
        [*torchrun, "-m", "stretto", *words, "--out", str(tmp_path / "torchrun")],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (ended.returncode, ended.stdout.count("The run"), ended.stdout.count("step 6/6")) == (0, 1, 1), ended.stderr
    assert ended.stdout.count("start-up ") == 1, "the default group's ranks, too, tell rank 0 alone"
    own = fresh.run(main, [*words, "--nproc", "2", "--out", str(tmp_path / "own")], env=ENV)
    assert (own.code, own.err) == (0, "")
    assert rows(tmp_path / "own") == rows(tmp_path / "torchrun")
    one, other = tensors(tmp_path / "own", 6), tensors(tmp_path / "torchrun", 6)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_lines_of_json_and_a_tokenizer_of_ones_own(
    fresh: Fresh, options: list[str], corpus: Path, tmp_path: Path
) -> None:
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=301, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    data = ["--data", str(tmp_path / "texts.jsonl"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    words = [*options, *data, *TWO_STEPS, "--out", str(tmp_path / "run")]
    env = {key: value for key, value in ENV.items() if key != "TOKENIZERS_PARALLELISM"}
    ended = fresh.run(main, words, env=env)
    assert (ended.code, ended.err) == (0, "")  # the library's warning of forks included
    assert f"vocabulary {bpe.get_vocab_size()}" in ended.out
    sampled = fresh.run(main, ["sample", "--checkpoint", str(tmp_path / "run"), "--prompt", "far away"], env=env)
    assert (sampled.code, sampled.err) == (0, "")
    assert sampled.out.startswith("far away")


def test_a_fault_on_one_rank_ends_all(fresh: Fresh, options: list[str], tmp_path: Path) -> None:
    """P15: within 15 s, that rank's traceback last, the checkpoint before it whole."""
    out = tmp_path / "run"
    words = [*options, "--nproc", "4", "--tp", "2", "--out", str(out)]
    ended = fresh.run(happens, "fail", 8, 3, words, env=ENV)
    assert ended.code == 1
    assert ended.err.endswith("ValueError: the fault of this rank\n")
    assert ended.err.count("Traceback") == 1
    assert "Rank 3 of 4" in ended.err
    assert ended.seconds < 15
    assert tensors(out, 5)


@pytest.mark.parametrize("words", [["--save-every", "0"], ["--save-every", "1"]])
def test_a_run_that_diverges_says_so_once(fresh: Fresh, options: list[str], tmp_path: Path, words: list[str]) -> None:
    out = tmp_path / "run"
    ended = fresh.run(main, [*options, "--nproc", "4", "--lr", "1e30", "--out", str(out), *words], env=ENV)
    assert ended.code == 1
    assert ended.err.count("diverged at step 2: loss ") == 1
    assert "Traceback" not in ended.err
    if words[-1] == "1":
        assert f"{out}/checkpoints/step-00000001 is from before it" in ended.err
    else:
        assert "no checkpoint was saved before it" in ended.err
    assert [row["step"] for row in rows(out) if "loss" in row] == [1]


def test_one_process_is_a_small_size(fresh: Fresh, options: list[str], tmp_path: Path) -> None:
    ended = fresh.run(main, [*options, "--nproc", "1", "--steps", "3", "--out", str(tmp_path / "run")], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    assert len(rows(tmp_path / "run")) == 4


def test_nothing_but_the_declared_is_said(options: list[str], tmp_path: Path) -> None:
    """P12. A real `stretto` in a new process in which each warning is an error."""
    words = ["-W", "error", "-m", "stretto", *options, "--nproc", "2", "--steps", "2", "--tensorboard"]
    ended = subprocess.run(
        [sys.executable, *words, "--out", str(tmp_path / "run")],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "The run" in ended.stdout
    assert os.listdir(tmp_path) == ["run"]  # noqa: PTH208


@pytest.mark.nightly
def test_a_run_goes_on_when_nobody_reads(options: list[str], tmp_path: Path) -> None:
    """Catches: `stretto train | head`, which ended the run without a save."""
    words = [sys.executable, "-m", "stretto", *options, "--nproc", "2", "--out", str(tmp_path / "run")]
    with subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert any("step  1/12" in line for line in iter(program.stdout.readline, ""))
        program.stdout.close()
        assert (program.wait(120), program.stderr.read()) == (0, "")
    assert rows(tmp_path / "run")[-1]["step"] == 12


def test_a_run_whose_terminal_closes_is_saved(fresh: Fresh, options: list[str], tmp_path: Path) -> None:
    """Catches: hours of training that are lost with a connection, by SIGHUP or by an error of a live display."""
    words = [*options, "--nproc", "2", "--progress", "live", "--out", str(tmp_path / "run")]
    ended = fresh.run(happens, "close_the_terminal", 3, 0, words, env=ENV)
    assert (ended.code, ended.err) == (0, "")
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name in ("step-00000003", "step-00000004")  # as soon as the signal has been passed on


def test_text_that_is_removed_ends_no_run(fresh: Fresh, options: list[str], corpus: Path, tmp_path: Path) -> None:
    """Catches: a closing table that reads the text once more, in a run that is finished and saved."""
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    words = [*options, "--data", str(text), "--steps", "4", "--out", str(tmp_path / "run")]
    ended = fresh.run(happens, "remove_the_text", 3, 0, words, env={**ENV, "TEXT": str(text)})
    assert (ended.code, ended.err) == (0, "")
    assert "bigram" in ended.out
    assert not text.exists()


@pytest.mark.nightly
def test_a_mix_with_validation_sets_is_the_same_run_in_another_layout(
    fresh: Fresh, options: list[str], corpus: Path, tmp_path: Path
) -> None:
    """Catches: a set that is evaluated in another order, or on other rows, by other ranks; a curve without its name."""
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"line {i} " * 9}) + "\n" for i in range(60)))
    mixed = [*options, "--data", f"{corpus}:0.7,{lines}:0.3", "--eval-data", f"again={lines}", "--eval-batches", "0"]
    mixed += ["--steps", "4"]
    found = []
    for i, layout in enumerate((["--nproc", "1"], ["--nproc", "4", "--dp", "2", "--pp", "2"])):
        ended = fresh.run(main, [*mixed, *layout, "--out", str(tmp_path / f"run{i}")], env=ENV)
        assert (ended.code, ended.err) == (0, "")
        for name in ("songbook", "lines", "again"):
            assert f"step 4: {name} loss" in ended.out
            assert f"{name} bits per byte" in ended.out
        assert "0.3 of the samples" in ended.out
        found.append(rows(tmp_path / f"run{i}"))
    keys = [[*row] for row in found[0]]
    assert keys == [[*row] for row in found[1]]
    assert sum("again_loss" in row for row in found[0]) == 1
    one, other = ([v for row in run for k, v in row.items() if "loss" in k or "bits" in k] for run in found)
    assert one == pytest.approx(other, rel=1e-4)


def test_a_tokenizer_that_loses_text_has_no_bits_per_byte(fresh: Fresh, tmp_path: Path) -> None:
    """Catches: 0.1 bits per byte after four steps, of bytes that no model saw; and nothing said about it."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"Ünïcödé {i} ab"}) + "\n" for i in range(60)))
    vocab = {"</s>": 0, **{chr(c): i for i, c in enumerate(range(32, 127), 1)}}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(tmp_path / "tokenizer.json"))
    words = (
        f"train --preset tiny --steps 4 --data {tmp_path}/a.jsonl --held-out 0.2 --cache {tmp_path} --no-tensorboard"
    )
    words += f" --tokenizer {tmp_path}/tokenizer.json --out {tmp_path}/run"
    ended = fresh.run(main, words.split(), env=ENV)
    assert ended.code == 2
    assert "of the text, above all" in ended.err
    ended = fresh.run(main, [*words.split(), "--max-lost", "1"], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    assert "bits per byte" not in ended.out.replace("no bits per byte", "")
    assert any(line.startswith("│ held-out loss") for line in ended.out.splitlines())
    assert not [row for row in rows(tmp_path / "run") if "held_out_bits_per_byte" in row]


def test_what_diverges_at_once_has_no_learning_rate_to_blame(tmp_path: Path) -> None:
    """Catches: weights of a published model with a NaN in them, and the advice of a lower rate."""
    begun = parse(["--preset", "tiny", "--init-from", "base", "--out", str(tmp_path)], files=False)
    said = after_divergence(begun.args, 1)
    assert said == "\n  no update was made before it: weights of base are not finite, or too large for fp32"
    assert "lower --lr" in after_divergence(begun.args, 2)
