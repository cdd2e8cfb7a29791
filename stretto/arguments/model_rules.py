"""Rules over the parts of a model, and which of its settings have no effect beside which others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stretto.arguments.model import ModelConfig
from stretto.arguments.nearby import sizes
from stretto.arguments.rule import Nearby, RuleViolation, rule
from stretto.arguments.schema import Arguments


@dataclass(frozen=True)
class Unused:
    """`names` of the model have no effect where `when` holds, which depends on `on`."""

    names: tuple[str, ...]
    on: tuple[str, ...]
    when: Callable[[ModelConfig], bool]
    reason: str


_SCALING = ("rope_factor", "rope_original_positions")
_LLAMA3 = ("rope_low_freq", "rope_high_freq")
_YARN = ("rope_beta_fast", "rope_beta_slow")
_EXPERTS = (
    *("top_k", "expert_ffn", "shared_ffn", "shared_gate", "first_dense", "sparse_every", "router"),
    *("router_renormalize", "router_scale", "router_groups", "router_top_groups", "router_group_score"),
    *("router_bias", "router_bias_rate", "balance_loss", "router_z_loss", "expert_capacity", "expert_drop"),
)
_LATENT = ("q_lora_rank", "rope_head_dim", "v_head_dim", "rope_interleaved")
_LONGROPE = ("rope_short_factors", "rope_long_factors")

UNUSED: tuple[Unused, ...] = (
    Unused(
        ("rope_base", "rope_local_base", "rope_share", "rope_scaling"),
        ("position",),
        lambda m: m.position == "learned",
        "position = learned has no wavelengths",
    ),
    Unused(("learned_positions",), ("position",), lambda m: m.position == "rope", "position = rope learns none"),
    Unused(
        _SCALING, ("rope_scaling",), lambda m: m.rope_scaling == "none", "rope_scaling = none leaves wavelengths alone"
    ),
    Unused(_LLAMA3, ("rope_scaling",), lambda m: m.rope_scaling != "llama3", "rope_scaling is not llama3"),
    Unused(_YARN, ("rope_scaling",), lambda m: m.rope_scaling != "yarn", "rope_scaling is not yarn"),
    Unused(_LONGROPE, ("rope_scaling",), lambda m: m.rope_scaling != "longrope", "rope_scaling is not longrope"),
    Unused(
        ("rope_whole_pairs",),
        ("rope_scaling",),
        lambda m: m.rope_scaling != "yarn",
        "rope_scaling is not yarn",
    ),
    Unused(
        ("rope_mscale", "rope_mscale_all"),
        ("rope_scaling", "kv_lora_rank"),
        lambda m: m.rope_scaling != "yarn" or not m.latent,
        "rope_scaling is not yarn, or attention has no latent",
    ),
    Unused(
        ("kv_heads",),
        ("kv_lora_rank", "heads"),
        lambda m: m.latent and m.num_kv_heads != m.heads,
        "attention with a latent has a key for each head",
    ),
    Unused(_LATENT, ("kv_lora_rank",), lambda m: not m.latent, "kv_lora_rank is unset: attention has no latent"),
    Unused(
        ("rope_share",), ("kv_lora_rank",), lambda m: m.latent, "rope_head_dim says what is rotated beside a latent"
    ),
    Unused(
        ("swiglu_limit", "swiglu_alpha"),
        ("activation",),
        lambda m: m.activation != "clamped-swiglu",
        "activation is not clamped-swiglu",
    ),
    Unused(
        ("rope_attention_factor",),
        ("rope_scaling",),
        lambda m: m.rope_scaling not in ("yarn", "longrope"),
        "rope_scaling is neither yarn nor longrope",
    ),
    Unused(("global_layers", "rope_local_base"), ("window",), lambda m: m.window is None, "no layer has a window"),
    Unused(("norm_zero_centered",), ("norm",), lambda m: m.norm == "layer", "norm = layer has a bias instead"),
    Unused(("qk_norm_width",), ("qk_norm",), lambda m: not m.qk_norm, "qk_norm = false normalizes neither"),
    Unused(_EXPERTS, ("experts",), lambda m: m.experts == 0, "experts = 0 has no router"),
    Unused(("shared_gate",), ("shared_ffn",), lambda m: m.shared_ffn == 0, "shared_ffn = 0 has nothing to gate"),
    Unused(
        ("router_top_groups", "router_group_score"),
        ("router_groups",),
        lambda m: m.router_groups == 1,
        "router_groups = 1 has none to choose",
    ),
    Unused(
        ("router_renormalize",),
        ("router",),
        lambda m: m.router == "softmax-top-k",
        "a softmax over the chosen sums to 1",
    ),
    Unused(("mtp_loss",), ("mtp_layers",), lambda m: not m.mtp_layers, "mtp_layers = 0 has no such loss"),
    Unused(("router_bias_rate",), ("router_bias",), lambda m: not m.router_bias, "router_bias = false has no biases"),
    Unused(("expert_drop",), ("expert_capacity",), lambda m: m.expert_capacity == 0, "expert_capacity = 0 drops none"),
    Unused(("qkv_bias",), ("bias",), lambda m: m.bias and m.qkv_bias, "bias = true has these, too"),
)


@rule("model.global_layers", "model.layers")
def global_layers_exist(a: Arguments) -> RuleViolation | None:
    """Layers without the window are layers of the model, each named once."""
    named, layers = a.model.global_layers, a.model.layers
    beyond = [n for n in named if n >= layers]
    if not beyond and len({*named}) == len(named):
        return None
    problem = (
        f"global_layers has {beyond[0]}, must be < layers = {layers}" if beyond else "global_layers names one twice"
    )
    return RuleViolation(problem, {"model.global_layers": (tuple(sorted({n for n in named if n < layers})),)})


@rule("model.learned_positions", "batch.seq_len", "model.position")
def positions_hold_a_sequence(a: Arguments) -> RuleViolation | None:
    """A learned embedding has a position for each token of a sequence."""
    learned, s = a.model.learned_positions, a.batch.seq_len
    if a.model.position != "learned" or learned is None or learned >= s:
        return None
    return RuleViolation(
        f"learned_positions = {learned}, must be >= seq_len = {s}",
        {"batch.seq_len": (learned,), "model.learned_positions": (s,)},
    )


@rule("model.rope_share", "model.head_dim", "model.position")
def rotated_share_has_pairs(a: Arguments) -> RuleViolation | None:
    """The rotated share of a head is a whole number of pairs."""
    m = a.model
    if m.position != "rope" or m.rope_share == 1 or (m.dim_rotary and m.dim_rotary % 2 == 0):
        return None
    return RuleViolation(
        f"rope_share * head_dim = {m.rope_share:g} * {m.dim_per_head} -> {m.dim_rotary}, must be even and at least 2",
        {"model.rope_share": (1.0, 0.5), "model.head_dim": sizes(m.dim_per_head, 8)},
    )


@rule("model.rope_scaling", "model.rope_original_positions")
def stretch_has_an_origin(a: Arguments) -> RuleViolation | None:
    """All but a linear stretch go by what a model was first trained with."""
    m = a.model
    if m.rope_scaling in ("none", "linear") or m.rope_original_positions is not None:
        return None
    nearby: Nearby = {"model.rope_original_positions": (a.batch.seq_len,), "model.rope_scaling": ("none",)}
    return RuleViolation(f"rope_scaling = {m.rope_scaling} without rope_original_positions", nearby)


@rule("model.rope_short_factors", "model.rope_long_factors", "model.rope_scaling", "model.head_dim", "model.rope_share")
def each_pair_has_its_factor(a: Arguments) -> RuleViolation | None:
    """With longrope each rotated pair of a head has a factor of its own."""
    m, pairs = a.model, a.model.dim_rotary // 2
    found = {name: len(getattr(m, name)) for name in _LONGROPE}
    if m.rope_scaling != "longrope" or {*found.values()} == {pairs}:
        return None
    said = ", ".join(f"{name} has {n}" for name, n in found.items())
    return RuleViolation(f"{said}, must be one for each of {pairs} pairs of a head", {"model.rope_scaling": ("none",)})


@rule("model.rope_low_freq", "model.rope_high_freq", "model.rope_scaling")
def stretch_has_a_ramp(a: Arguments) -> RuleViolation | None:
    """Between the wavelengths that are stretched and those that are not lies a range."""
    m = a.model
    if m.rope_scaling != "llama3" or m.rope_low_freq < m.rope_high_freq:
        return None
    return RuleViolation(
        f"rope_low_freq = {m.rope_low_freq:g}, must be < rope_high_freq = {m.rope_high_freq:g}",
        {"model.rope_low_freq": (m.rope_high_freq / 4,), "model.rope_high_freq": (m.rope_low_freq * 4,)},
    )


@rule("model.parallel_residual", "model.norm_placement")
def parallel_residual_has_norms_before(a: Arguments) -> RuleViolation | None:
    """Two branches that read the same residual have their norms in front."""
    if not a.model.parallel_residual or a.model.norm_placement == "pre":
        return None
    return RuleViolation(
        f"parallel_residual with norm_placement = {a.model.norm_placement}, must be pre",
        {"model.norm_placement": ("pre",), "model.parallel_residual": (False,)},
    )


@rule(
    *("model.kv_lora_rank", "model.head_dim", "model.rope_head_dim", "model.v_head_dim", "model.position"),
    *("model.bias", "model.qkv_bias", "model.qk_norm"),
)
def latent_has_its_heads(a: Arguments) -> RuleViolation | None:
    """Attention with a latent rotates a part of each head, and has no biases and no norms of heads."""
    m, wrong = a.model, []
    if not m.latent:
        return None
    nearby: Nearby = {}
    if m.position != "rope":
        wrong.append(f"position = {m.position}, must be rope")
        nearby["model.position"] = ("rope",)
    r, d = m.dim_rotary, m.dim_per_head
    if r % 2 or not 0 < r < d:
        wrong.append(f"rope_head_dim = {r}, must be even and below head_dim = {d}")
        nearby["model.rope_head_dim"] = tuple(n for n in (max(2, d // 4 * 2),) if n < d)
        nearby["model.head_dim"] = () if d > 2 else (4,)
    if m.dim_value > d:
        wrong.append(f"v_head_dim = {m.dim_value}, must be <= head_dim = {d}")
        nearby["model.v_head_dim"] = (d,)
    for name in ("bias", "qkv_bias", "qk_norm"):
        if getattr(m, name):
            wrong.append(f"{name} = true, must be false")
            nearby[f"model.{name}"] = (False,)
    if not wrong:
        return None
    if len(wrong) > 2:  # then it is the latent that does not belong there
        nearby = {"model.kv_lora_rank": (None,), **nearby}
    return RuleViolation(f"kv_lora_rank = {m.kv_lora_rank} with {'; '.join(wrong)}", nearby)
