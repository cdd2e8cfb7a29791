"""P19: the ledger says of weights, gradients and optimizer what lives, to the byte, in every mode of sharding.

Faults to catch: padding of shards left out; a tied embedding counted twice; one whose both ends are on a rank counted
twice; masters of wide weights counted; state of another rule; moments in bf16 counted wide; gradients that are sharded
counted whole; gradients or masters of what is frozen counted; a norm of a cut block counted on both of its stages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stretto import peer_buffer, peer_memory
from stretto.arguments.schema import (
    Arguments,
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TuningConfig,
)
from stretto.distributed.memory import here
from stretto.estimate import fitting, ledger, rank_ledger, workspace
from stretto.estimate.host import node_memory
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import link
from stretto.train.build import build
from stretto.train.groups import axes_of

pytestmark = pytest.mark.gloo


@st.composite
def runs(draw: st.DrawFn) -> Arguments:
    bit = {name: draw(st.booleans()) for name in ("bias", "qkv", "tied", "qk_norm", "swiglu", "rope", "rms")}
    tp, pp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    etp = draw(st.sampled_from([e for e in (1, 2, 4) if tp * dp % e == 0]))
    ep = draw(st.sampled_from([e for e in (1, 2, 4, 5) if tp * dp // etp % e == 0]))
    sparse = draw(st.booleans())
    experts: dict[str, Any] = {
        "experts": ep * draw(st.integers(1, 3)),
        "top_k": 1,
        "expert_ffn": 4 * draw(st.integers(1, 3)),
        "shared_ffn": 4 * draw(st.integers(0, 1)),
        "shared_gate": draw(st.booleans()),
        "sparse_every": draw(st.integers(1, 2)),
    }
    latent: dict[str, Any] = {
        "kv_lora_rank": draw(st.integers(1, 9)),
        "q_lora_rank": draw(st.sampled_from([None, 5])),
        "rope_head_dim": 2,
        "v_head_dim": draw(st.integers(1, 4)),
    }
    latent = latent if draw(st.booleans()) else {}
    if latent:
        bit |= {"bias": False, "qkv": False, "qk_norm": False, "rope": True}
    ep, etp = (ep, etp) if sparse else (1, 1)
    model = ModelConfig(
        **(experts if sparse else {}),
        **latent,
        layers=draw(st.integers(1, 5)),
        hidden=8 * draw(st.integers(1, 3)),
        heads=4,
        kv_heads=4 if latent else draw(st.sampled_from([1, 2, 4])),
        head_dim=4,
        ffn=4 * draw(st.integers(1, 5)),
        vocab=draw(st.integers(5, 90)),
        norm="rms" if bit["rms"] else "layer",
        position="rope" if bit["rope"] else "learned",
        activation="swiglu" if bit["swiglu"] else "gelu",
        bias=bit["bias"],
        qkv_bias=bit["qkv"],
        tied=bit["tied"],
        qk_norm=bit["qk_norm"],
        norm_placement=draw(st.sampled_from(["pre", "post", "sandwich"])),
        mtp_layers=draw(st.sampled_from([0, 0, 1, 2])),
    )
    matrices = ["o", "up", "down", *([] if latent else ["q", "k", "v"])]
    adapted = st.lists(st.sampled_from(matrices), min_size=1, unique=True)
    lora = TuningConfig(lora_rank=draw(st.integers(1, 5)), lora_targets=tuple(draw(adapted)))
    frozen = TuningConfig(freeze=("model.embed_tokens.*", "*.mlp.*", "*.0.input_layernorm.*"))
    mode, dtype = (
        draw(st.sampled_from(["none", "zero1", "zero2", "fsdp"])),
        draw(st.sampled_from(["fp32", "bf16", "fp64"])),
    )
    return Arguments(
        model=model,
        parallel=ParallelConfig(
            tp=tp,
            pp=pp,
            dp=dp,
            sharding=mode,
            ep=ep,
            etp=etp,
            bucket_mb=draw(st.sampled_from([1e-6, 0.01, 25])),
            schedule=draw(st.sampled_from(["1f1b", "interleaved", "zbv"])) if pp > 1 else "1f1b",
        ),
        batch=BatchConfig(seq_len=4, micro_batch=1, global_batch=2 * dp),
        optimizer=OptimizerConfig(
            optimizer=draw(st.sampled_from(["adamw", "sgd", "lion"])),
            moments=draw(st.sampled_from(["fp32", "bf16"])),
            masters=draw(st.sampled_from(["fp32", "remainder"])) if dtype == "bf16" else "fp32",
            optimizer_cpu_offload=draw(st.booleans()),
        ),
        run=RunConfig(dtype=dtype),  # type: ignore[arg-type]
        tuning=draw(st.sampled_from([TuningConfig(), lora, frozen])) if model.norm_placement != "post" else lora,
    )


@given(runs(), st.data())
def test_the_ledger_is_what_lives(args: Arguments, data: st.DataObject) -> None:
    compare(args, data.draw(st.integers(0, args.parallel.layout.world - 1)))


def test_both_ends_of_a_tied_embedding_on_a_rank_are_one() -> None:
    """The first and the last of four stages lie on rank 0."""
    model = ModelConfig(layers=4, hidden=16, heads=2, vocab=40, tied=True)
    batch = BatchConfig(seq_len=4, micro_batch=1, global_batch=4)
    compare(Arguments(model=model, parallel=ParallelConfig(pp=2, dp=1, schedule="zbv"), batch=batch), 0)


def compare(args: Arguments, rank: int) -> None:
    """What the ledger says of a rank, and what lives there."""
    layout = args.parallel.layout
    with ParallelState.inspect(layout, rank, axes=axes_of(args, layout)) as state:
        built = build(args, state)
        buckets, optimizer = built.weights.all_buckets, built.optimizer
        optimizer = getattr(optimizer, "inner", optimizer)
        live = {t.untyped_storage().data_ptr(): t for b in buckets for t in (b.weights, b.shard) if here(t)}
        weights = sum(t.untyped_storage().nbytes() for t in live.values())
        held = {t.untyped_storage().data_ptr(): t for b in buckets for t in (b.grads, b.grad) if here(t)}
        gradients = sum(t.untyped_storage().nbytes() for t in held.values())
        masters = sum(m.nbytes for m, b in zip(optimizer.masters, buckets, strict=True) if m is not b.shard)
        moments = sum(t.nbytes for each in optimizer.state.values() for t in each)
        owned = [piece for piece in optimizer.slices() if piece.owner]
        written = sum(piece.tensor.nbytes for piece in owned)
        built.weights.close()
        found = rank_ledger(args, state.coords["pp"])
    kept = (0, 0, masters + moments) if args.optimizer.optimizer_cpu_offload else (masters, moments, 0)
    assert (found.weights, found.gradients) == (weights, gradients)
    assert (found.masters, found.optimizer, found.host) == kept
    host = node_memory(args, [rank])
    # Storage is padded, and what ranks of tp have alike one of them writes.
    assert written <= host.staging
    if args.parallel.tp == args.parallel.etp == 1:
        assert host.staging <= written + 64 * (len(owned) + 2 * len(buckets) + 1) * 24
    assert host.optimizer == found.host


def test_what_messages_wait_in_is_as_large_as_the_code_that_makes_it_says() -> None:
    """The ledger has these numbers without torch."""
    assert (workspace.AHEAD, workspace.CHUNK, workspace.SLOTS) == (link.AHEAD, peer_memory.CHUNK, peer_buffer.SLOTS)


def test_sharding_makes_what_it_shards_smaller() -> None:
    """Of 4 ranks; and a limit tells the modes apart."""
    model = ModelConfig(layers=8, hidden=64, heads=4, vocab=64)
    args = Arguments(
        model=model,
        parallel=ParallelConfig(dp=4, bucket_mb=0.05),
        batch=BatchConfig(seq_len=8, micro_batch=1, global_batch=4),
        run=RunConfig(dtype="bf16"),
    )
    of = {
        mode: ledger(replace(args, parallel=replace(args.parallel, sharding=mode)), 0)
        for mode in ("none", "zero1", "zero2", "fsdp")
    }
    assert of["zero1"].optimizer == pytest.approx(of["none"].optimizer / 4, rel=0.01)
    assert of["zero1"].gradients == pytest.approx(of["none"].gradients, rel=0.01)
    assert of["zero2"].gradients == pytest.approx(of["none"].gradients / 4, rel=0.01)
    assert of["fsdp"].weights == pytest.approx(of["none"].weights / 4, rel=0.01)
    assert of["none"].gathered == of["zero2"].gathered == of["zero1"].reducing == 0
    totals = [of[mode].total for mode in ("none", "zero1", "zero2", "fsdp")]
    assert totals == sorted(totals, reverse=True)
    assert [fits for _, fits in fitting(args, totals[1]).values()] == [False, True, True, True]
    assert torch.finfo(torch.bfloat16).bits == 16


def test_a_mode_without_graphs_has_no_workspace_of_theirs() -> None:
    """Gradients that are sharded have no address of their own, so nothing is recorded there."""
    model = ModelConfig(layers=2, hidden=64, heads=4, vocab=64)
    batch = BatchConfig(seq_len=8, micro_batch=1, global_batch=4)
    run = RunConfig(dtype="bf16", device="cuda", cuda_graphs=True)
    args = Arguments(model=model, parallel=ParallelConfig(dp=2), batch=batch, run=run)
    sharded = replace(args, parallel=replace(args.parallel, sharding="fsdp"), run=replace(run, cuda_graphs=False))
    found = fitting(args, 0)
    assert found["fsdp"][0] == ledger(sharded, 0).total
    assert found["none"][0] == ledger(args, 0).total
