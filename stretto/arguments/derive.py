"""Values that follow from others: derived where nothing was said, or given way to something stronger.

Both tables are read in order, by `validate.py`. Each entry states its equation with the numbers, which
becomes the source of the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from stretto.arguments.graph_rules import READS, without_graphs
from stretto.arguments.model_rules import UNUSED, Unused
from stretto.arguments.override import Equation, Override, unused
from stretto.arguments.pipeline import shape_of, vpp_of
from stretto.arguments.schema import TOKENIZERS, Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, settings


@dataclass(frozen=True)
class Derivation:
    """The value of a setting that nobody set, from `inputs`; `meaning` is the equation in names."""

    path: str
    inputs: tuple[str, ...]
    meaning: str
    equation: Equation


def _no_overlap(a: Arguments) -> tuple[Value, str] | None:
    if not a.parallel.tp_comm_overlap:
        return None
    if a.run.device == "cpu":
        return False, "device = cpu has no copy engines"
    return None if a.parallel.sequence_parallel else (False, "sequence_parallel = false gathers and scatters nothing")


def _of_model(a: Arguments, why: Unused) -> bool:
    return why.when(a.model)


def _of_checkpoints(a: Arguments, path: str) -> tuple[Value, str] | None:
    none = settings()[path].default
    return None if a.checkpoint.save or get(a, path) == none else (none, "no checkpoint is saved")


def _has_none(a: Arguments) -> str:
    return f"optimizer = {a.optimizer.optimizer} has none"


def _no_use(a: Arguments) -> str:
    return f"sharding = {a.parallel.sharding} has no use for it"


def _nproc_of_dp(a: Arguments) -> tuple[Value, str] | None:
    p = a.parallel
    if p.dp is None or (world := p.tp * p.cp * p.pp * p.dp) == a.run.nproc:
        return None
    return world, f"tp*cp*pp*dp = {p.tp}*{p.cp}*{p.pp}*{p.dp}"


def _warmup(a: Arguments) -> tuple[Value, str] | None:
    end = a.optimizer.decay_steps or a.run.steps
    return (end // 10, f"decay_steps // 10 = {end} // 10") if a.optimizer.warmup_steps >= end else None


def _micro_batch(a: Arguments) -> tuple[Value, str] | None:
    p, b = a.parallel, a.batch
    dp = p.dp or (a.run.nproc or 1) // (p.tp * p.cp * p.pp)
    if dp < 1 or b.global_batch % dp or b.global_batch % (b.micro_batch * dp) == 0:
        return None
    share = b.global_batch // dp
    micro = max(size for size in range(1, b.micro_batch + 1) if share % size == 0)
    return micro, f"divides global_batch / dp = {b.global_batch} / {dp}"


def _min_lr(a: Arguments) -> tuple[Value, str] | None:
    o = a.optimizer
    if o.lr_schedule == "constant" or o.min_lr <= o.lr:
        return None
    return float(f"{o.lr / 10:g}"), f"lr / 10 = {o.lr:g} / 10"


_RULE, _DECAY, _SHARDS = "optimizer.optimizer", "optimizer.lr_schedule", "parallel.sharding"

OVERRIDES: tuple[Override, ...] = (
    *unused("parallel", "sequence_parallel", "parallel.tp", lambda a: a.parallel.tp == 1, "tp = 1, nothing to cut"),
    Override(
        "parallel.tp_comm_overlap",
        ("parallel.tp", "parallel.sequence_parallel", "run.device"),
        _no_overlap,
        ineffective=True,
    ),
    *unused(
        *("parallel", "ep_comm_overlap ep_copy_engines", "parallel.ep parallel.etp model.experts"),
        lambda a: not a.model.experts or a.parallel.ep * a.parallel.etp == 1,
        "ranks exchange no tokens",
    ),
    *unused("parallel", "ep_copy_engines", "run.device", lambda a: a.run.device == "cpu", "device = cpu has none"),
    *(
        each
        for why in UNUSED
        for each in unused(
            "model",
            " ".join(why.names),
            " ".join(f"model.{n}" for n in why.on),
            partial(_of_model, why=why),
            why.reason,
        )
    ),
    *unused(
        *("optimizer", "min_lr decay_steps", _DECAY),
        lambda a: a.optimizer.lr_schedule == "constant",
        "lr_schedule = constant never decays",
    ),
    *unused(
        *("optimizer", "cooldown_steps", _DECAY),
        lambda a: a.optimizer.lr_schedule != "wsd",
        lambda a: f"lr_schedule = {a.optimizer.lr_schedule} has no cooldown",
    ),
    *unused("groups", "gloo", "run.device", lambda a: a.run.device == "cpu", "device = cpu has no NCCL"),
    *unused(
        *("nccl", "high_priority min_ctas max_ctas", "run.device"),
        lambda a: a.run.device == "cpu",
        "device = cpu has no NCCL",
    ),
    *unused(*("optimizer", "beta1 beta2", _RULE), lambda a: a.optimizer.optimizer == "sgd", _has_none),
    *unused(*("optimizer", "eps", _RULE), lambda a: a.optimizer.optimizer not in ("adamw", "muon"), _has_none),
    *unused(*("optimizer", "momentum", _RULE), lambda a: a.optimizer.optimizer not in ("sgd", "muon"), _has_none),
    *unused(
        "parallel",
        "schedule_memory",
        "parallel.schedule",
        lambda a: a.parallel.schedule != "auto",
        lambda a: f"schedule = {a.parallel.schedule} searches no order",
    ),
    *unused(
        "parallel",
        "partition",
        "parallel.stage_layers",
        lambda a: a.parallel.stage_layers is not None,
        "stage_layers says the layers of each stage",
    ),
    *unused(
        *("parallel", "schedule_costs", "parallel.schedule parallel.partition"),
        lambda a: a.parallel.schedule != "auto" and a.parallel.partition != "searched",
        lambda a: f"schedule = {a.parallel.schedule} and partition = {a.parallel.partition} ask for no times",
    ),
    *unused("data", "text_key", "data.format", lambda a: a.data.format == "chat", "format = chat reads whole records"),
    *(
        Override(path, ("checkpoint.save",), partial(_of_checkpoints, path=path))
        for path in ("checkpoint.save_every", "run.sample_tokens")
    ),
    *unused("run", "sample_prompt", "run.sample_tokens", lambda a: not a.run.sample_tokens, "no token is sampled"),
    *unused(
        *("checkpoint", "keep keep_every async_save", "checkpoint.save"),
        lambda a: not a.checkpoint.save,
        "no checkpoint is saved",
    ),
    *unused(
        *("checkpoint", "checkpoint_dir", "checkpoint.save checkpoint.resume checkpoint.auto_resume"),
        lambda a: not (a.checkpoint.save or a.checkpoint.resume or a.checkpoint.auto_resume),
        "no checkpoint is saved, and none is gone on from",
    ),
    *unused("parallel", "dp_shard", _SHARDS, lambda a: a.parallel.sharding == "none", _no_use),
    *unused("parallel", "keep_units", _SHARDS, lambda a: a.parallel.sharding != "fsdp", _no_use),
    *unused(
        "parallel", "cp_comm cp_a2a", "parallel.cp", lambda a: a.parallel.cp == 1, "cp = 1, each rank has whole rows"
    ),
    Override("run.nproc", ("parallel.dp",), _nproc_of_dp),
    Override(
        "batch.micro_batch", ("run.nproc", "parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp"), _micro_batch
    ),
    Override("optimizer.warmup_steps", ("run.steps", "optimizer.decay_steps"), _warmup),
    Override("optimizer.min_lr", ("optimizer.lr",), _min_lr),
)


def _nproc(a: Arguments) -> tuple[Value, str] | None:
    p = a.parallel
    dp = p.dp or 1
    return p.tp * p.cp * p.pp * dp, f"tp*cp*pp*dp = {p.tp}*{p.cp}*{p.pp}*{dp}"


def _dp(a: Arguments) -> tuple[Value, str] | None:
    p, world = a.parallel, a.run.nproc or 1
    dp, rest = divmod(world, p.tp * p.cp * p.pp)
    return None if rest else (dp, f"nproc / (tp*cp*pp) = {world} / ({p.tp}*{p.cp}*{p.pp})")


def _head_dim(a: Arguments) -> tuple[Value, str] | None:
    m = a.model
    return None if m.hidden % m.heads else (m.dim_per_head, f"hidden / heads = {m.hidden} / {m.heads}")


def _rope_head_dim(a: Arguments) -> tuple[Value, str] | None:
    m = a.model
    return (m.dim_rotary, f"head_dim // 2 = {m.dim_per_head} // 2") if m.latent and m.dim_rotary > 1 else None


def _v_head_dim(a: Arguments) -> tuple[Value, str] | None:
    m = a.model
    found = m.dim_value
    return (found, f"head_dim - rope_head_dim = {m.dim_per_head} - {m.dim_rotary}") if m.latent and found > 0 else None


def _vocab(a: Arguments) -> tuple[Value, str] | None:
    name = a.data.tokenizer
    return (TOKENIZERS[name], f"that of the tokenizer {name}") if name in TOKENIZERS else None


def _cooldown_steps(a: Arguments) -> tuple[Value, str] | None:
    o, end = a.optimizer, a.optimizer.decay_steps or a.run.steps
    if o.lr_schedule != "wsd":
        return None
    return max(1, (end - o.warmup_steps) // 5), f"(decay_steps - warmup_steps) // 5 = ({end} - {o.warmup_steps}) // 5"


def _cuda_graphs(a: Arguments) -> tuple[Value, str] | None:
    reason = without_graphs(a)
    return not reason, reason or "every microbatch launches the same"


_SIZES = ("parallel.tp", "parallel.cp", "parallel.pp")

DERIVATIONS: tuple[Derivation, ...] = (
    Derivation("run.nproc", (*_SIZES, "parallel.dp"), "tp*cp*pp*dp, with dp = 1 unless set", _nproc),
    Derivation("parallel.dp", (*_SIZES, "run.nproc"), "nproc / (tp*cp*pp)", _dp),
    Derivation(
        *("parallel.vpp", ("parallel.schedule",), "what the schedule has: 1 or 2"),
        lambda a: (vpp_of(a.parallel), f"schedule = {a.parallel.schedule}"),
    ),
    Derivation(
        *("parallel.vpp_shape", ("parallel.schedule", "parallel.vpp"), "what the schedule has: loop or v"),
        lambda a: (shape_of(a.parallel), f"schedule = {a.parallel.schedule}, vpp = {vpp_of(a.parallel)}"),
    ),
    Derivation(
        *("parallel.gpus_per_node", ("run.device", "run.nproc"), "8 (cuda), nproc (cpu)"),
        lambda a: (8, "usual") if a.run.device == "cuda" else (a.run.nproc, "nproc: one machine"),
    ),
    Derivation(
        *("run.compile", ("run.device", "parallel.exact"), "true (cuda, without exact), else false"),
        lambda a: (
            a.run.device == "cuda" and a.parallel.exact is None,
            f"device = {a.run.device}" if a.parallel.exact is None else f"exact = {a.parallel.exact}",
        ),
    ),
    Derivation(
        *("parallel.tp_comm_overlap", ("run.device", "parallel.sequence_parallel")),
        "true (cuda, sequence parallel), else false",
        lambda a: (
            a.run.device == "cuda" and a.parallel.sequence_parallel,
            f"device = {a.run.device}, {'' if a.parallel.sequence_parallel else 'not '}sequence parallel",
        ),
    ),
    Derivation("run.cuda_graphs", READS, "true where they can be recorded (cuda), else false", _cuda_graphs),
    Derivation("model.kv_heads", ("model.heads",), "heads", lambda a: (a.model.num_kv_heads, "heads")),
    Derivation("model.head_dim", ("model.hidden", "model.heads"), "hidden / heads", _head_dim),
    Derivation("model.rope_head_dim", ("model.head_dim", "model.kv_lora_rank"), "head_dim // 2", _rope_head_dim),
    Derivation(
        *("model.v_head_dim", ("model.head_dim", "model.rope_head_dim", "model.kv_lora_rank")),
        "head_dim - rope_head_dim",
        _v_head_dim,
    ),
    Derivation(
        *("model.ffn", ("model.hidden", "model.activation")),
        "4*hidden, 8*hidden/3 up to a multiple of 64 (gated: swiglu, geglu, geglu-tanh)",
        lambda a: (
            a.model.dim_ffn,
            f"8*hidden/3 = 8*{a.model.hidden}/3, up to a multiple of 64"
            if a.model.gated
            else f"4*hidden = 4*{a.model.hidden}",
        ),
    ),
    Derivation(
        *("model.expert_ffn", ("model.ffn", "model.experts"), "ffn (with experts)"),
        lambda a: (a.model.dim_ffn, "ffn") if a.model.experts else None,
    ),
    Derivation("model.vocab", ("data.tokenizer",), "the tokenizer's", _vocab),
    Derivation(
        *("optimizer.decay_steps", ("run.steps", _DECAY), "steps, unless the rate is constant"),
        lambda a: None if a.optimizer.lr_schedule == "constant" else (a.run.steps, "steps"),
    ),
    Derivation(
        *("optimizer.cooldown_steps", ("optimizer.decay_steps", "optimizer.warmup_steps", _DECAY)),
        "(decay_steps - warmup_steps) // 5 for wsd",
        _cooldown_steps,
    ),
)
