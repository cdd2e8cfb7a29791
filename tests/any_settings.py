"""Runs that nobody chose: every setting of `stretto train` has values here, and few of them are drawn at a time.

Settings that only mean something together are drawn together. What the rules find in a draw is mended at random among
the values that they offer, so that each run is one that a user could have come to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from stretto.arguments import Resolved, resolve
from stretto.arguments.layers import Layer
from stretto.arguments.rule import RuleViolation
from stretto.arguments.setting import Value
from stretto.arguments.sources import COMMAND_LINE
from stretto.arguments.tree import settings
from stretto.arguments.validate import Said, validate

Settings = dict[str, Value]

BASE: Settings = {
    "model.layers": 4,
    "model.hidden": 32,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.ffn": 48,
    "batch.seq_len": 16,
    "batch.micro_batch": 1,
    "batch.global_batch": 8,
    "optimizer.warmup_steps": 1,
    "optimizer.lr": 0.01,
    "optimizer.eps": 1e-3,  # with a smaller one the first updates are signs, and rounding flips signs
    "data.held_out": 0.2,
    "checkpoint.async_save": False,
    "run.steps": 4,
    "run.eval_batches": 1,
    "run.dtype": "fp64",
    "run.timeout": 60.0,
    "run.threads": 1,
}
"""A run of a second."""

TOGETHER: dict[str, dict[str, Sequence[Any]]] = {
    "tensor": {
        "parallel.tp": [2, 2, 4],
        "parallel.sequence_parallel": [True],
        "parallel.exact": [1, 2, 4],
    },
    "context": {
        "parallel.cp": [2, 2, 4],
        "parallel.cp_comm": [
            ("all-gather",),
            ("needed",),
            ("ring",),
            ("ulysses",),
            ("hybrid",),
            ("ring", "ulysses") * 2,
        ],
        "parallel.cp_a2a": [2],
        "data.packing": [True],
    },
    "pipeline": {
        "parallel.pp": [2, 2, 3, 4],
        "parallel.schedule": list(settings()["parallel.schedule"].choices),
        "parallel.vpp": [1, 2, 3],
        "parallel.vpp_shape": ["loop", "v"],
        "parallel.stage_layers": [(1, 3), (0.5, 3.5), (1.5, 0, 1, 1.5), (1, 1, 1, 1)],
        "parallel.partition": ["searched"],
        "parallel.schedule_memory": [2.0, 3.5],
    },
    "shards": {
        "parallel.sharding": ["zero1", "zero2", "fsdp", "fsdp"],
        "parallel.dp": [2, 3, 4],
        "parallel.dp_shard": [1, 2],
        "parallel.keep_units": [1, 2, 9],
        "parallel.bucket_mb": [1e-6, 0.005, 0.02],
    },
    "experts": {
        "model.experts": [4, 6, 8],
        "model.top_k": [1, 2, 3],
        "model.expert_ffn": [8, 12],
        "model.shared_ffn": [16, 24],
        "model.shared_gate": [True],
        "model.router": ["softmax", "softmax-top-k", "sigmoid"],
        "model.router_groups": [2],
        "model.router_bias": [True],
        "model.router_bias_rate": [0.05],
        "model.balance_loss": [0.1],
        "model.router_z_loss": [0.05],
        "model.expert_capacity": [0.5, 1.0, 2.0],
        "model.expert_drop": ["lowest"],
        "model.first_dense": [1, 2],
        "model.sparse_every": [2],
        "model.dense_layers": [(1,), (2, 0)],
        "parallel.ep": [2, 4],
        "parallel.etp": [2],
        "parallel.ep_comm_overlap": [True],
    },
    "latent": {
        "model.kv_lora_rank": [8, 12],
        "model.q_lora_rank": [8, 10],
        "model.rope_head_dim": [2, 4],
        "model.v_head_dim": [4, 6],
        "model.rope_interleaved": [False],
    },
    "further": {"model.mtp_layers": [1, 2], "model.mtp_loss": [0.0, 0.5]},
    "adapters": {
        "tuning.lora_rank": [2, 4],
        "tuning.lora_targets": [("q", "v"), ("q", "k", "v", "o", "gate", "up", "down"), ("up", "down"), ("o",)],
        "tuning.lora_dropout": [0.3],
    },
    "frozen": {"tuning.freeze": [("model.embed_tokens.*",), ("*.layers.0.*",), ("*mlp*",), ("*norm*",), ("*proj*",)]},
    "windows": {
        "model.window": [1, 3, 8],
        "model.global_layers": [(1,), (0, 2)],
        "model.rope_local_base": [50.0],
    },
    "wavelengths": {
        "model.rope_scaling": ["linear", "dynamic", "llama3", "yarn", "longrope"],
        "model.rope_factor": [2.0, 4.0],
        "model.rope_original_positions": [8, 64],
        "model.rope_share": [0.5],
        "model.rope_short_factors": [(1.0, 1.0, 1.5, 2.0)],
        "model.rope_long_factors": [(1.0, 2.0, 2.5, 3.0)],
        "model.position": ["learned"],
    },
    "heads": {
        "model.kv_heads": [1, 4],
        "model.head_dim": [4, 6],
        "model.qk_norm": [True],
        "model.qk_norm_width": ["full"],
        "model.attention_sinks": [True],
        "model.qkv_clip": [0.1, 1.0],
        "model.attention_softcap": [2.0],
        "model.bias": [True],
    },
    "blocks": {
        "model.norm": ["layer"],
        "model.norm_placement": ["post", "sandwich"],
        "model.parallel_residual": [True],
        "model.activation": list(settings()["model.activation"].choices),
        "model.dropout": [0.2],
    },
    "ends": {
        "model.tied": [True],
        "model.scale_embedding": [True],
        "model.logit_softcap": [3.0],
        "loss.label_smoothing": [0.1],
        "loss.z_loss": [0.01],
    },
    "memory": {
        "run.recompute": ["selective", "block", "offload"],
        "run.recompute_parts": [("norms",), ("activation", "attention"), ("norms", "attention", "projections")],
        "run.recompute_layers": [1, 2],
        "run.activation_budget": ["100KB", "1MB"],
        "run.ffn_chunks": [2, 3],
        "optimizer.optimizer_cpu_offload": [True],
    },
    "updates": {
        "optimizer.optimizer": ["sgd", "lion", "muon"],
        "optimizer.moments": ["bf16"],
        "optimizer.masters": ["remainder"],
        "optimizer.clip_grad": [0.0, 0.05],
        "optimizer.post_validate": [True],
        "optimizer.param_groups": ["*norm*|*.bias: weight_decay=0; *embed*: lr=0.5"],
        "run.on_nonfinite": ["trace", "skip"],
        "run.check_replicas": [1],
        "checkpoint.async_save": [True],
    },
    "rates": {
        "optimizer.lr_schedule": ["linear", "constant", "wsd"],
        "optimizer.warmup_steps": [0, 2],
        "optimizer.decay_steps": [3, 8],
        "optimizer.cooldown_steps": [1],
    },
    "waits": {"groups.timeouts": [(("dp", 60),), (("tp", 60), ("pp", 60))], "run.check_collectives": [True]},
    "rows": {
        "batch.seq_len": [8, 12, 17],
        "batch.micro_batch": [2, 3],
        "batch.global_batch": [4, 12, 16],
        "run.dtype": ["fp32", "bf16"],
        "run.eval_every": [1, 3],
        "parallel.order": ["pp-dp-ep-cp-tp", "dp-tp-cp-ep-pp"],
        "parallel.reduce_dtype": ["bf16"],
    },
}


def said_of(rng: Random) -> Settings:
    """A few groups of settings, of each about half; nothing holds them against the rules yet."""
    said = dict(BASE)
    for name in rng.sample(sorted(TOGETHER), rng.randint(2, 6)):
        first, *others = TOGETHER[name]
        for path in (first, *(p for p in others if rng.random() < 0.5)):
            said[path] = rng.choice(TOGETHER[name][path])
    return said


def run_of(said: Mapping[str, Value]) -> Resolved:
    """The run of these settings. Raises ConfigError."""
    return resolve([Layer(COMMAND_LINE, {path: value for path, value in said.items() if value is not None})])


def mended(said: Settings, rng: Random, tries: int = 60) -> Settings | None:
    """Settings that the rules accept, near to these; None where many changes lead to none."""
    said = dict(said)
    for _ in range(tries):
        findings = validate({path: Said(v, COMMAND_LINE) for path, v in said.items() if v is not None}).findings
        if not findings:
            return said
        _mend(said, rng.choice(findings), rng)
    return None


def _mend(said: Settings, wrong: RuleViolation, rng: Random) -> None:
    """Change one setting of a finding: back to that of the base, or to one of the values that its rule offers."""
    drawn = [path for path in wrong.fields if path in said and said[path] != BASE.get(path)]
    offered = [path for path, values in wrong.nearby.items() if values]
    if drawn and (wrong.rule == "has_effect" or not offered or rng.random() < 0.2):
        path = drawn[0] if wrong.rule == "has_effect" else rng.choice(drawn)
        said.pop(path)
        said |= {path: BASE[path]} if path in BASE else {}
    elif offered:
        path = rng.choice(offered)
        said[path] = rng.choice(list(wrong.nearby[path])[:6])


def any_run(seed: int, most_ranks: int) -> tuple[Settings, Resolved]:
    """The first run from a seed on that has at most so many ranks and layers."""
    rng = Random(seed)
    while True:
        said = mended(said_of(rng), rng)
        if said is not None and (run := run_of(said)).layout.world <= most_ranks and run.args.model.layers <= 8:
            return said, run
