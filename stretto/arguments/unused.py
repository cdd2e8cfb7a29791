"""Settings that have no effect beside others, and give way to those where they are said by a weaker source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stretto.arguments.rule import Expression, Nearby, fields_of, named_in, told, violation
from stretto.arguments.schema import Arguments, ModelConfig
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
    others a rule has the words. `ways` are ways out beside the setting's default.
    """

    path: str
    inputs: tuple[str, ...]
    equation: Equation
    meaning: str = ""
    ineffective: bool = False
    ways: Nearby = field(default_factory=dict)


def _unused(
    names: str, where: str, why: str, *, ineffective: bool = True, **to: Sequence[Value]
) -> Iterator[Derivation]:
    """Settings by name that have no effect where an expression holds, and why; `to` are other ways out."""
    holds, ways = Expression(where), violation("", **to).nearby
    for path in fields_of(*names.split()):

        def equation(a: Arguments, path: str = path) -> tuple[Value, str] | None:
            default = settings()[path].default
            return (default, told(why, a)) if holds(a) and get(a, path) != default else None

        inputs = tuple(each for each in dict.fromkeys((*named_in(why), *holds.fields)) if each != path)
        yield Derivation(path, inputs, equation, ineffective=ineffective, ways=ways)


_EXPERTS = (
    "top_k expert_ffn shared_ffn shared_gate first_dense sparse_every dense_layers router router_renormalize "
    "router_scale router_groups router_top_groups router_group_score router_bias router_bias_rate balance_loss "
    "router_z_loss expert_capacity expert_drop"
)

_ROWS = (
    ("sequence_parallel", "tp == 1", "{tp}, nothing to cut"),
    ("tp_comm_overlap", "tp_comm_overlap and device == 'cpu'", "device = cpu has no copy engines"),
    (
        "tp_comm_overlap",
        "tp_comm_overlap and device != 'cpu' and not sequence_parallel",
        "sequence_parallel = false gathers and scatters nothing",
    ),
    ("ep_comm_overlap ep_copy_engines", "ep * etp == 1 or not experts", "ranks exchange no tokens"),
    ("pp_copy_engines", "pp == 1", "{pp} has no messages between stages"),
    ("ep_copy_engines pp_copy_engines", "device != 'cuda'", "{device} has none"),
    ("rope_base rope_local_base rope_share rope_scaling", "position != 'rope'", "{position} has no wavelengths"),
    ("learned_positions", "position != 'learned'", "{position} learns none"),
    ("rope_factor rope_original_positions", "rope_scaling == 'none'", "{rope_scaling} leaves wavelengths alone"),
    ("rope_low_freq rope_high_freq", "rope_scaling != 'llama3'", "rope_scaling is not llama3"),
    ("rope_beta_fast rope_beta_slow rope_whole_pairs", "rope_scaling != 'yarn'", "rope_scaling is not yarn"),
    ("rope_short_factors rope_long_factors", "rope_scaling != 'longrope'", "rope_scaling is not longrope"),
    (
        "rope_mscale rope_mscale_all",
        "rope_scaling != 'yarn' or not kv_lora_rank",
        "rope_scaling is not yarn, or attention has no latent",
    ),
    ("kv_heads", "kv_lora_rank and kv_heads != heads", "attention with a latent has a key for each head"),
    (
        "q_lora_rank rope_head_dim v_head_dim rope_interleaved",
        "not kv_lora_rank",
        "kv_lora_rank is unset: attention has no latent",
    ),
    ("rope_share", "kv_lora_rank", "rope_head_dim says what is rotated beside a latent"),
    ("swiglu_limit swiglu_alpha", "activation != 'clamped-swiglu'", "activation is not clamped-swiglu"),
    ("rope_attention_factor", "rope_scaling not in ('yarn', 'longrope')", "rope_scaling is neither yarn nor longrope"),
    ("global_layers rope_local_base", "not window", "no layer has a window"),
    ("norm_zero_centered", "norm != 'rms'", "{norm} has a bias instead"),
    ("qk_norm_width", "not qk_norm", "{qk_norm} normalizes neither"),
    (_EXPERTS, "experts == 0", "{experts} has no router"),
    ("shared_gate", "shared_ffn == 0", "{shared_ffn} has nothing to gate"),
    ("router_top_groups router_group_score", "router_groups == 1", "{router_groups} has none to choose"),
    ("router_renormalize", "router == 'softmax-top-k'", "a softmax over the chosen sums to 1"),
    ("mtp_loss", "mtp_layers == 0", "{mtp_layers} has no such loss"),
    ("router_bias_rate", "not router_bias", "{router_bias} has no biases"),
    ("expert_drop", "expert_capacity == 0", "{expert_capacity} drops none"),
    ("qkv_bias", "bias", "{bias} has these, too"),
    ("min_lr decay_steps", "lr_schedule == 'constant'", "{lr_schedule} never decays"),
    ("cooldown_steps", "lr_schedule != 'wsd'", "{lr_schedule} has no cooldown"),
    ("gloo high_priority min_ctas max_ctas", "device != 'cuda'", "{device} has no NCCL"),
    ("beta1 beta2", "optimizer == 'sgd'", "{optimizer} has none"),
    ("eps", "optimizer not in ('adamw', 'muon')", "{optimizer} has none"),
    ("momentum", "optimizer not in ('sgd', 'muon')", "{optimizer} has none"),
    ("schedule_memory", "schedule != 'auto'", "{schedule} searches no order"),
    ("partition", "stage_layers is not None", "stage_layers says the layers of each stage"),
    ("schedule_costs", "schedule != 'auto' and partition != 'searched'", "{schedule} and {partition} ask for no times"),
    ("text_key", "format != 'text'", "{format} reads whole records"),
    ("sample_prompt", "sample_tokens == 0", "no token is sampled"),
    ("keep keep_every async_save", "not save", "no checkpoint is saved"),
    (
        "checkpoint_dir",
        "not save and not resume and not auto_resume",
        "no checkpoint is saved, and none is gone on from",
    ),
    ("dp_shard", "sharding == 'none' or sharding is None and device != 'cuda'", "{sharding} has no use for it"),
    ("keep_units", "sharding != 'fsdp'", "{sharding} has no use for it"),
    ("cp_comm cp_a2a", "cp == 1", "{cp}, each rank has whole rows"),
)
"""Settings by name, where they have no effect, and why."""

UNUSED: tuple[Derivation, ...] = (
    *(each for row in _ROWS for each in _unused(*row)),
    *_unused("ep etp", "not experts", "{experts} has nothing to spread", experts=[8]),
    *_unused("cp_a2a", "'hybrid' not in cp_comm", "no layer has cp_comm = hybrid"),
    *_unused("recompute_parts", "recompute != 'selective'", "{recompute} has no parts", recompute=["selective"]),
    *_unused(
        "recompute_layers",
        "recompute not in ('selective', 'block')",
        "{recompute} is alike for all layers",
        recompute=["block"],
    ),
    *_unused("lora_alpha lora_dropout lora_targets", "lora_rank == 0", "{lora_rank} has no adapters", lora_rank=[8]),
    *_unused("freeze", "lora_rank", "{lora_rank} trains adapters alone", lora_rank=[0]),
    *_unused("save_every sample_tokens", "not save", "no checkpoint is saved", ineffective=False),
)


def with_effect(model: ModelConfig) -> ModelConfig:
    """Without what is said of a family of models and this one makes no use of: how groups of experts are ranked, where
    there is one. A run would be rejected for that."""
    said = Arguments(model=model)
    unused = {each.path: each.equation(said) for each in UNUSED if each.path.startswith("model.")}
    plain: dict[str, Any] = {path.partition(".")[2]: found[0] for path, found in unused.items() if found}
    return replace(model, **plain)
