"""Small models with experts, each a run that the tests put into many layouts."""

from __future__ import annotations

from typing import Any

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import Comparison, against_reference
from stretto.world import World

MIXTRAL: dict[str, Any] = {"balance_loss": 0.05, "router_z_loss": 0.01}
DEEPSEEK: dict[str, Any] = {
    "router": "sigmoid",
    "router_bias": True,
    "router_bias_rate": 0.05,
    "router_groups": 4,
    "router_top_groups": 2,
    "router_group_score": "top2",
    "router_scale": 2.5,
    "top_k": 3,
    "shared_ffn": 8,
    "first_dense": 1,
}
QWEN2: dict[str, Any] = {
    "router_renormalize": False,
    "shared_ffn": 8,
    "shared_gate": True,
    "balance_loss": 0.1,
    "sparse_every": 2,
}
OSS: dict[str, Any] = {
    "router": "softmax-top-k",
    "top_k": 4,
    "router_z_loss": 0.02,
    "activation": "gelu",
    "qkv_clip": 0.05,
}
GPT_OSS: dict[str, Any] = {
    "router": "softmax-top-k",
    "top_k": 3,
    "activation": "clamped-swiglu",
    "swiglu_limit": 0.02,
    "bias": True,
    "attention_sinks": True,
    "window": 4,
    "global_layers": (1, 3),
}
LATENT: dict[str, Any] = {
    **DEEPSEEK,
    "kv_heads": None,
    "head_dim": 10,
    "kv_lora_rank": 14,
    "q_lora_rank": 18,
    "rope_head_dim": 4,
    "v_head_dim": 8,
}
LATENT_V2: dict[str, Any] = {
    **{name: value for name, value in LATENT.items() if not name.startswith("router_bias")},
    "q_lora_rank": None,
    "v_head_dim": 4,
    "router": "softmax",
}
SMALL: dict[str, Any] = {"expert_capacity": 0.75, "expert_drop": "lowest", "balance_loss": 0.05}
LAST: dict[str, Any] = {"expert_capacity": 1.0, "top_k": 1, "router_renormalize": False}


def arguments(
    model: dict[str, Any], *, dtype: str = "fp64", batch: int = 8, seq_len: int = 12, run: Any = None, **parallel: Any
) -> Arguments:
    """Eight experts in four layers, of 24 channels; a vocabulary that does not divide."""
    run = run or {}
    sizes: dict[str, Any] = {
        "layers": 4,
        "hidden": 24,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "ffn": 32,
        "vocab": 53,
    }
    config = ModelConfig(**(sizes | {"experts": 8, "expert_ffn": 16} | model))
    return Arguments(
        model=config,
        parallel=ParallelConfig(bucket_mb=0.01, **parallel),
        batch=BatchConfig(seq_len=seq_len, micro_batch=1 + parallel.get("ep_comm_overlap", False), global_batch=batch),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-4, clip_grad=0.5),
        run=RunConfig(dtype=dtype, timeout=30.0, **run),  # type: ignore[arg-type]
    )


def layout_of(args: Arguments) -> Layout:
    """The layout of its sizes."""
    p = args.parallel
    return Layout.of(tp=p.tp, cp=p.cp, pp=p.pp, dp=p.dp or 1, ep=p.ep, etp=p.etp)


def _compared(world: World, args: Arguments, steps: int) -> Comparison:
    return against_reference(args, layout_of(args), world, steps=steps)


def prove(pool: Pool, args: Arguments, *, steps: int = 2) -> None:
    """Run the layout and one process, and fail with what differs."""
    for rank, found in enumerate(pool.run(layout_of(args).world, _compared, args, steps)):
        assert not found.unequal, f"rank {rank}: replicas differ: {found.unequal}"
        assert not found.failures, f"rank {rank}: {[f'{d.name}: {d.error:.1e}' for d in found.failures[:8]]}"
