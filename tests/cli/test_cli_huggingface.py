"""A Hugging Face model in, trained in a layout, and out: by the commands that a user has.

Faults to catch: weights of the directory that are drawn anew instead; an export that does not read the checkpoint; a
setting that contradicts the model taken.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_programs import ENV, rows
from safetensors.torch import load_file

from stretto.arguments import from_dict
from stretto.checkpoint.marker import read_extra
from stretto.cli import export, main, training  # noqa: F401  # loaded before the fork, not after it in each program
from stretto.data.evaluation import held_out_batches
from stretto.data.text import Text
from stretto.testing import Fresh

pytestmark = pytest.mark.gloo

TOKENIZER = Path(training.__file__).parents[1] / "data" / "tokenizers" / "python" / "tokenizer.json"
LAYOUT = [
    "--nproc",
    "4",
    "--tp",
    "2",
    "--pp",
    "2",
    "--sequence-parallel",
    "--seq-len",
    "16",
    "--micro-batch",
    "1",
    "--global-batch",
    "4",
    "--steps",
    "2",
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with tied heads, in bf16 and in several files, with a tokenizer."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    directory = tmp_path_factory.mktemp("qwen")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 4099}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(3)
    config = Qwen3Config(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory, max_shard_size="100KB")
    shutil.copyfile(TOKENIZER, directory / "tokenizer.json")
    return directory


def train(fresh: Fresh, qwen: Path, options: list[str], out: Path, *more: str) -> Any:
    where = [*options[options.index("--data") :], "--out", str(out), "--no-tensorboard", "--held-out", "0.2"]
    return fresh.run(main, ["train", "--init-from", str(qwen), *LAYOUT, *where, *more], env=ENV)


@pytest.fixture(scope="module")
def still(fresh: Fresh, qwen: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rate is too small to change any weight."""
    out = tmp_path_factory.mktemp("still") / "run"
    ended = train(fresh, qwen, options, out, "--lr", "1e-30", "--eval-batches", "1")
    assert (ended.code, ended.err) == (0, "")
    return out


def test_the_run_begins_with_what_transformers_computes(still: Path, qwen: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    args = from_dict(read_extra(still / "checkpoints" / "step-00000002")["record"]["arguments"])
    assert args.data.tokenizer == str(qwen)
    total = count = 0.0
    store = Text.open(args).eval_sets[0].store
    sizes = {"seq_len": 16, "global_batch": 4, "dp_rank": 0, "dp_size": 1, "micro_batch": 4, "limit": 1}
    for (batch,) in held_out_batches(store, **sizes):
        with torch.no_grad():
            logits = model(batch.tokens).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        total += float((losses * batch.loss_mask).sum())
        count += float(batch.loss_mask.sum())
    measured = [row["held_out_loss"] for row in rows(still) if "held_out_loss" in row]
    assert total / count == pytest.approx(measured[-1], rel=1e-6)


def test_it_comes_back_byte_by_byte(still: Path, qwen: Path, tmp_path: Path, fresh: Fresh) -> None:
    ended = fresh.run(main, ["export", "--checkpoint", str(still), "--to", str(tmp_path / "out")], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    assert "Qwen3ForCausalLM, 1 file" in ended.out
    assert "tokenizer.json" in ended.out
    before = {name: x for file in qwen.glob("*.safetensors") for name, x in load_file(file).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype
        assert torch.equal(x.view(torch.int16), after[name].view(torch.int16)), name


def test_what_was_trained_goes_out_and_on(fresh: Fresh, qwen: Path, options: list[str], tmp_path: Path) -> None:
    """Stopped and resumed, written without the original, and read again: the same loss where it left off."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    ended = train(fresh, qwen, options, out, "--lr", "1e-2", "--warmup-steps", "0")
    assert (ended.code, ended.err) == (0, "")
    ended = train(fresh, qwen, options, out, "--lr", "1e-2", "--warmup-steps", "0", "--steps", "4", "--resume")
    assert (ended.code, ended.err) == (0, "")
    words = ["export", "--checkpoint", str(out), "--to", str(tmp_path / "hf"), "--family", "qwen3", "--dtype", "fp32"]
    ended = fresh.run(main, words, env=ENV)
    assert (ended.code, ended.err) == (0, "")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    first = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    assert not torch.equal(again.model.norm.weight, first.model.norm.weight)
    shutil.copyfile(TOKENIZER, tmp_path / "hf" / "tokenizer.json")
    ended = train(fresh, tmp_path / "hf", options, tmp_path / "on", "--lr", "1e-30", "--eval-batches", "8")
    assert (ended.code, ended.err) == (0, "")
    losses = [[row["held_out_loss"] for row in rows(at) if "held_out_loss" in row][-1] for at in (out, tmp_path / "on")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_adapters_are_trained_alone_and_go_out_both_ways(
    fresh: Fresh, qwen: Path, options: list[str], tmp_path: Path
) -> None:
    """Stopped and resumed; written by the run itself, from its checkpoint, and as peft reads it."""
    import warnings

    from transformers import AutoModelForCausalLM

    out, tuned = (
        tmp_path / "run",
        ["--lr", "1e-2", "--warmup-steps", "0", "--lora-rank", "4", "--lora-targets", "q,v,o"],
    )
    ended = train(fresh, qwen, options, out, *tuned)
    assert (ended.code, ended.err) == (0, "")
    ended = train(fresh, qwen, options, out, *tuned, "--steps", "4", "--resume", "--export-hf", str(tmp_path / "live"))
    assert (ended.code, ended.err) == (0, "")
    for to, more in (("merged", ["--dtype", "fp32"]), ("same", []), ("adapter", ["--adapter"])):
        words = ["export", "--checkpoint", str(out), "--to", str(tmp_path / to), *more]
        ended = fresh.run(main, words, env=ENV)
        assert (ended.code, ended.err) == (0, "")
    live, same = (load_file(tmp_path / at / "model.safetensors") for at in ("live", "same"))
    assert live.keys() == same.keys()
    assert all(torch.equal(x, same[name]) for name, x in live.items())
    assert (tmp_path / "live" / "tokenizer.json").exists()
    before = {name: x for file in qwen.glob("*.safetensors") for name, x in load_file(file).items()}
    moved = {name for name, x in before.items() if not torch.equal(x, live[name])}
    assert moved == {f"model.layers.{n}.self_attn.{m}_proj.weight" for n in range(3) for m in "qvo"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-5)


def test_what_contradicts_the_model_is_rejected(fresh: Fresh, qwen: Path, tmp_path: Path) -> None:
    ended = fresh.run(main, ["train", "--init-from", str(qwen), "--layers", "5"], env=ENV)
    assert ended.code == 2
    assert f"model.layers = 5 (command line), but {qwen} has 3" in ended.err
    config = json.loads((qwen / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 4000}))
    ended = fresh.run(main, ["explain", "--init-from", str(tmp_path), "--tokenizer", "python"], env=ENV)
    assert "has 4096 entries\n    use the tokenizer of the model" in ended.err
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_sinks": True}))
    ended = fresh.run(main, ["explain", "--init-from", str(tmp_path)], env=ENV)
    assert ended.code == 2
    assert "'attention_sinks' = True: unknown" in ended.err


def test_explain_lists_what_a_model_says_beside_the_defaults(fresh: Fresh, qwen: Path) -> None:
    """Catches: every field of a config.json as if it were chosen; a default that somebody did choose left out."""
    ended = fresh.run(main, ["explain", "--init-from", str(qwen), "--beta1", "0.9"], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    listed = {line.split()[0] for line in ended.out.partition("\nsettings")[2].splitlines() if line.strip()}
    assert {"model.layers", "model.vocab", "model.qk_norm", "optimizer.beta1"} <= listed
    assert not {"model.rope_beta_fast", "model.experts", "model.position"} & listed


def test_export_is_rejected_whole(fresh: Fresh, still: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = fresh.run(main, ["export", "--checkpoint", str(still), "--to", str(tmp_path)], env=ENV)
    assert ended.code == 2
    assert "is not empty" in ended.err
    words = ["export", "--checkpoint", str(still), "--to", str(tmp_path / "out"), "--family", "llama"]
    ended = fresh.run(main, words, env=ENV)
    assert (ended.code, ended.out) == (2, "")
    assert "llama: qk_norm = True, not False" in ended.err
