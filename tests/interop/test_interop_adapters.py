"""Adapters are those of `peft`: the same loss and gradients, its files, and merged the same model.

Faults to catch: a scale that is not alpha / rank; a merge that leaves it out; a rectangle of the wrong rank.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import interop_oracle as oracle
import pytest
import torch
from test_interop_files import whole
from torch import Tensor

from stretto.arguments import parse
from stretto.arguments.schema import Arguments, BatchConfig, OptimizerConfig, RunConfig, TuningConfig
from stretto.batch import Batch
from stretto.cli.adopt import adopted
from stretto.interop.adapter import export_adapter
from stretto.interop.config import read_config
from stretto.interop.errors import InteropError
from stretto.interop.export import export, tensors
from stretto.interop.live import Live
from stretto.interop.outgoing import Outgoing
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify.session import build
from stretto.world import World

pytestmark = pytest.mark.gloo

TUNING = TuningConfig(lora_rank=3, lora_alpha=5.0, lora_targets=("q", "v", "o", "down"))


def settings(directory: Path, tuning: TuningConfig = TUNING, dtype: str = "fp64") -> Arguments:
    return Arguments(
        model=read_config(directory).model,
        batch=BatchConfig(seq_len=oracle.SEQ, micro_batch=1, global_batch=4),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-3, clip_grad=0.0),
        run=RunConfig(dtype=dtype, timeout=60.0),  # type: ignore[arg-type]
        tuning=tuning,
    )


def adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random ones: the B of a beginning hides all of A's gradient."""
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in weights.items() if "lora" in n}


def test_loss_gradients_and_files_are_those_of_peft(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
    model = oracle.build("llama")
    oracle.save(model, tmp_path / "base", torch.float64)
    args = replace(settings(tmp_path / "base"), batch=BatchConfig(seq_len=oracle.SEQ, micro_batch=3, global_batch=3))
    tokens, labels, mask = oracle.rows()
    with build(args, Layout.of(), World.single()) as session:
        weights = session.full_params()
        base = {n: x.double() for n, x in whole64(tmp_path / "base").items()}
        session.load_full({**base, **adapters(weights)})
        before = session.full_params()
        live = Live(session.built.optimizer.slices(), session.world)
        outgoing = Outgoing.of(args, family="llama")
        to = tmp_path / "adapter"
        export_adapter(to, outgoing.config, outgoing.shapes, outgoing.adapters, args.tuning, str(tmp_path), live)
        export(tmp_path / "merged", outgoing.raw, outgoing.named, outgoing.merged(live), limit=10**9)
        loss, _ = session.step(Batch(tokens, labels, mask, torch.arange(3)))
        grads = session.full_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model, str(to), is_trainable=True)
        for name, param in theirs.named_parameters():
            if "lora" in name:  # the files have fp32
                ours = name.removeprefix("base_model.model.").replace(".default.weight", "")
                torch.testing.assert_close(param.data, before[ours].to(param.dtype), rtol=1e-6, atol=1e-6)
                param.data = before[ours].clone()
    logits, theirs_loss, found = oracle.run(theirs)
    assert loss == pytest.approx(theirs_loss.item(), rel=1e-12)
    wanted = {n.removeprefix("base_model.model.").replace(".default.weight", ""): g for n, g in found.items()}
    wanted = {n: g for n, g in wanted.items() if g is not None and "lora" in n}
    assert wanted.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-10 * wanted[name].abs().max().item() + 1e-14)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    with oracle.in_fp64(), torch.no_grad():
        again = merged(tokens, use_cache=False).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)


def whole64(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


CASES = [
    ("gemma3", 4, 1, 2, "fsdp"),
    ("gpt_neox", 2, 2, 2, "zero1"),
    pytest.param("gemma3", 2, 2, 2, "zero1", marks=pytest.mark.nightly),
    pytest.param("gemma3", 1, 2, 1, "none", marks=pytest.mark.nightly),
    pytest.param("gpt_neox", 1, 2, 1, "none", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("name", "tp", "pp", "dp", "sharding"), CASES)
def test_a_live_run_gives_its_tensors_from_any_layout(
    pool: Pool, tmp_path: Path, name: str, tp: int, pp: int, dp: int, sharding: str
) -> None:
    """Bit for bit those that came in, on every rank, and after an update those that the optimizer holds."""
    oracle.save(oracle.build(name), tmp_path, torch.bfloat16)
    pool.run(tp * pp * dp, _live, tmp_path, tp, pp, dp, sharding)


def _live(world: World, directory: Path, tp: int, pp: int, dp: int, sharding: str) -> None:
    from safetensors.torch import load_file

    args = settings(directory, TuningConfig(), "fp32")
    parallel = replace(args.parallel, tp=tp, pp=pp, dp=dp, sharding=sharding, bucket_mb=0.01)  # type: ignore[arg-type]
    args = replace(args, parallel=parallel)
    files = {n: x for file in directory.glob("*.safetensors") for n, x in load_file(file).items()}
    with build(args, Layout.of(tp=tp, pp=pp, dp=dp), world) as session:
        session.load_full(whole(directory))
        live = Live(session.built.optimizer.slices(), session.world)
        outgoing = Outgoing.of(args, like=directory)
        found = dict(tensors(outgoing.named, live))
        assert found.keys() == files.keys()
        for n, x in files.items():
            assert x.dtype == found[n].dtype
            assert torch.equal(x.view(torch.int16), found[n].view(torch.int16)), n
        tokens = torch.arange(48).view(4, 12) % 53
        session.step(Batch(tokens, tokens, torch.ones(4, 12, dtype=torch.bool), torch.arange(4)))
        full = session.full_params()
        assert all(torch.equal(live({n: tuple(x.shape)})[n], x) for n, x in full.items())


def test_adapters_of_stacked_matrices_are_merged_alone(tmp_path: Path) -> None:
    oracle.save(oracle.build("phi3"), tmp_path / "base")
    args = settings(tmp_path / "base")
    outgoing = Outgoing.of(args, like=tmp_path / "base")
    with pytest.raises(InteropError, match="export without --adapter"):
        export_adapter(
            tmp_path / "to", outgoing.config, outgoing.shapes, outgoing.adapters, args.tuning, None, lambda _: {}
        )


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_a_run_goes_out_like_the_model_that_it_began_with(tmp_path: Path, name: str) -> None:
    """Catches: what a run derives (kv_heads) held against what config.json leaves unset, as another shape."""
    oracle.save(oracle.build(name), tmp_path, torch.bfloat16)
    words = ["--init-from", str(tmp_path), "--tokenizer", "byte", "--seq-len", str(oracle.SEQ)]
    args = parse(words, adopt=adopted, files=False, env={}).args
    assert args.model.kv_heads == args.model.heads != read_config(tmp_path).model.kv_heads
    assert Outgoing.of(args).like == tmp_path
    with pytest.raises(InteropError, match="another shape") as raised:
        Outgoing.of(replace(args, model=replace(args.model, norm_eps=0.5)), like=tmp_path)
    assert raised.value.reasons[0].startswith("norm_eps = 0.5, there ")
