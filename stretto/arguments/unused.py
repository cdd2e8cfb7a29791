"""Settings that have no effect beside others, and give way to those where they are said by a weaker source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stretto.arguments.rule import Rule, clash, fields_of
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.arguments.tree import get, settings

Equation = Callable[[Arguments], tuple[Value, str] | None]
"""The value and how it came about, or None where it does not apply."""


@dataclass(frozen=True)
class Derivation:
    """The value of a setting from `inputs`, of which `meaning` is the equation in names.

    Either of one that nobody set; or of one that gives way where a stronger source sets one of the inputs to something
    that it does not go with: `--tp 1` over a preset with sequence parallelism means: without. Where it is said by a
    source at least as strong as those, it is wrong instead: `ineffective` says that it then has no effect; for the
    others a rule of `rules.py` has the words.
    """

    path: str
    inputs: tuple[str, ...]
    equation: Equation
    meaning: str = ""
    ineffective: bool = False


def _unused(names: str, *reasons: Rule, ineffective: bool = True) -> Iterator[Derivation]:
    """Settings by name that have no effect where one of the reasons, each a clash of others, holds."""
    for path in fields_of(*names.split()):
        for reason in reasons:

            def equation(a: Arguments, path: str = path, reason: Rule = reason) -> tuple[Value, str] | None:
                default, found = settings()[path].default, reason.check(a)
                return (default, found.problem) if found is not None and get(a, path) != default else None

            yield Derivation(path, reason.fields, equation, ineffective=ineffective)


_EXPERTS = (
    "top_k expert_ffn shared_ffn shared_gate first_dense sparse_every router router_renormalize router_scale "
    "router_groups router_top_groups router_group_score router_bias router_bias_rate balance_loss router_z_loss "
    "expert_capacity expert_drop"
)

UNUSED: tuple[Derivation, ...] = (
    *_unused("sequence_parallel", clash("{tp}, nothing to cut", lambda a: a.parallel.tp == 1)),
    Derivation(
        *("parallel.tp_comm_overlap", fields_of("tp", "sequence_parallel", "device")),
        lambda a: _no_overlap(a) if a.parallel.tp_comm_overlap else None,
        ineffective=True,
    ),
    *_unused(
        "ep_comm_overlap ep_copy_engines",
        clash(
            "ranks exchange no tokens",
            lambda a: not a.model.experts or a.parallel.ep * a.parallel.etp == 1,
            reads="ep etp experts",
        ),
    ),
    *_unused("ep_copy_engines", clash("{device} has none", device=["cuda"])),
    *_unused(
        "rope_base rope_local_base rope_share rope_scaling", clash("{position} has no wavelengths", position=["rope"])
    ),
    *_unused("learned_positions", clash("{position} learns none", position=["learned"])),
    *_unused(
        "rope_factor rope_original_positions",
        clash("{rope_scaling} leaves wavelengths alone", lambda a: a.model.rope_scaling == "none"),
    ),
    *_unused("rope_low_freq rope_high_freq", clash("rope_scaling is not llama3", rope_scaling=["llama3"])),
    *_unused("rope_beta_fast rope_beta_slow", clash("rope_scaling is not yarn", rope_scaling=["yarn"])),
    *_unused("rope_short_factors rope_long_factors", clash("rope_scaling is not longrope", rope_scaling=["longrope"])),
    *_unused("rope_whole_pairs", clash("rope_scaling is not yarn", rope_scaling=["yarn"])),
    *_unused(
        "rope_mscale rope_mscale_all",
        clash(
            "rope_scaling is not yarn, or attention has no latent",
            lambda a: a.model.rope_scaling != "yarn" or not a.model.latent,
            reads="rope_scaling kv_lora_rank",
        ),
    ),
    *_unused(
        "kv_heads",
        clash(
            "attention with a latent has a key for each head",
            lambda a: a.model.latent and a.model.num_kv_heads != a.model.heads,
            reads="kv_lora_rank heads",
        ),
    ),
    *_unused(
        "q_lora_rank rope_head_dim v_head_dim rope_interleaved",
        clash("kv_lora_rank is unset: attention has no latent", lambda a: not a.model.latent, reads="kv_lora_rank"),
    ),
    *_unused("rope_share", clash("rope_head_dim says what is rotated beside a latent", kv_lora_rank=[None])),
    *_unused("swiglu_limit swiglu_alpha", clash("activation is not clamped-swiglu", activation=["clamped-swiglu"])),
    *_unused(
        "rope_attention_factor", clash("rope_scaling is neither yarn nor longrope", rope_scaling=["yarn", "longrope"])
    ),
    *_unused(
        "global_layers rope_local_base",
        clash("no layer has a window", lambda a: a.model.window is None, reads="window"),
    ),
    *_unused("norm_zero_centered", clash("{norm} has a bias instead", norm=["rms"])),
    *_unused("qk_norm_width", clash("{qk_norm} normalizes neither", qk_norm=[True])),
    *_unused(_EXPERTS, clash("{experts} has no router", lambda a: a.model.experts == 0)),
    *_unused("shared_gate", clash("{shared_ffn} has nothing to gate", lambda a: a.model.shared_ffn == 0)),
    *_unused(
        "router_top_groups router_group_score",
        clash("{router_groups} has none to choose", lambda a: a.model.router_groups == 1),
    ),
    *_unused("router_renormalize", clash("a softmax over the chosen sums to 1", router=["softmax", "sigmoid"])),
    *_unused("mtp_loss", clash("{mtp_layers} has no such loss", lambda a: a.model.mtp_layers == 0)),
    *_unused("router_bias_rate", clash("{router_bias} has no biases", router_bias=[True])),
    *_unused("expert_drop", clash("{expert_capacity} drops none", lambda a: a.model.expert_capacity == 0)),
    *_unused("qkv_bias", clash("{bias} has these, too", bias=[False])),
    *_unused("min_lr decay_steps", clash("{lr_schedule} never decays", lr_schedule=["cosine", "linear", "wsd"])),
    *_unused("cooldown_steps", clash("{lr_schedule} has no cooldown", lr_schedule=["wsd"])),
    *_unused("gloo high_priority min_ctas max_ctas", clash("{device} has no NCCL", device=["cuda"])),
    *_unused("beta1 beta2", clash("{optimizer} has none", optimizer=["adamw", "lion", "muon"])),
    *_unused("eps", clash("{optimizer} has none", optimizer=["adamw", "muon"])),
    *_unused("momentum", clash("{optimizer} has none", optimizer=["sgd", "muon"])),
    *_unused("schedule_memory", clash("{schedule} searches no order", schedule=["auto"])),
    *_unused("partition", clash("stage_layers says the layers of each stage", stage_layers=[None])),
    *_unused(
        "schedule_costs",
        clash("{schedule} and {partition} ask for no times", schedule=["auto"], partition=["searched"]),
    ),
    *_unused("text_key", clash("{format} reads whole records", format=["text"])),
    *_unused("save_every sample_tokens", clash("no checkpoint is saved", save=[True]), ineffective=False),
    *_unused("sample_prompt", clash("no token is sampled", lambda a: not a.run.sample_tokens, reads="sample_tokens")),
    *_unused("keep keep_every async_save", clash("no checkpoint is saved", save=[True])),
    *_unused(
        "checkpoint_dir",
        clash("no checkpoint is saved, and none is gone on from", save=[True], resume=[True], auto_resume=[True]),
    ),
    *_unused("dp_shard", clash("{sharding} has no use for it", lambda a: a.parallel.sharding == "none")),
    *_unused("keep_units", clash("{sharding} has no use for it", sharding=["fsdp"])),
    *_unused("cp_comm cp_a2a", clash("{cp}, each rank has whole rows", lambda a: a.parallel.cp == 1)),
)


def _no_overlap(a: Arguments) -> tuple[Value, str] | None:
    if a.run.device == "cpu":
        return False, "device = cpu has no copy engines"
    return None if a.parallel.sequence_parallel else (False, "sequence_parallel = false gathers and scatters nothing")
