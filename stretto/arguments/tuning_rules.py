"""Rules over what of a model is trained."""

from __future__ import annotations

from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments, TuningConfig


@rule(
    *("tuning.lora_targets", "tuning.lora_rank", "model.activation", "model.kv_lora_rank", "model.q_lora_rank"),
    *("model.experts", "model.shared_ffn", "model.first_dense", "model.sparse_every", "model.layers"),
)
def adapters_have_matrices(a: Arguments) -> RuleViolation | None:
    """Adapters are of matrices that the model has, each named once; those of routed experts have none."""
    t, targets, m = a.tuning, a.tuning.lora_targets, a.model
    if not t.lora_rank:
        return None
    none = ("k", "v", *(("q",) if m.q_lora_rank else ())) if m.latent else ()
    routed = ("gate", "up", "down") if not m.shared_ffn and all(map(m.is_sparse, range(m.layers))) else ()
    lacking = {*none, *routed, *(() if m.gated else ("gate",))}
    usable = tuple(name for name in dict.fromkeys(targets) if name not in lacking)
    if usable == targets and targets:
        return None
    problem = f"lora_targets = {','.join(targets) or 'none'}: must name matrices of the model, each once"
    if "gate" in targets and not m.gated:
        problem += f"; activation = {m.activation} has no gate"
    if {*none} & {*targets}:
        problem += f"; kv_lora_rank = {m.kv_lora_rank} makes {', '.join(none)} from latents"
    if {*routed} & {*targets}:
        problem += f"; experts = {m.experts}: every feed-forward is made of routed experts, which have no adapters"
    return RuleViolation(problem, {"tuning.lora_targets": (usable or (("o",) if m.latent else ("q", "v")),)})


@rule("tuning.freeze", "tuning.lora_rank")
def adapters_freeze_the_rest(a: Arguments) -> RuleViolation | None:
    """Beside adapters nothing is trained, so nothing else is to be frozen."""
    if not (a.tuning.freeze and a.tuning.lora_rank):
        return None
    return RuleViolation(
        f"freeze = {','.join(a.tuning.freeze)} has no effect beside lora_rank = {a.tuning.lora_rank}",
        {"tuning.freeze": ((),), "tuning.lora_rank": (0,)},
    )


@rule("tuning.lora_alpha", "tuning.lora_dropout", "tuning.lora_targets", "tuning.lora_rank")
def adapters_have_a_rank(a: Arguments) -> RuleViolation | None:
    """What is said of adapters needs a rank."""
    t, usual = a.tuning, TuningConfig()
    said = (t.lora_alpha, t.lora_dropout, t.lora_targets)
    if t.lora_rank or said == (usual.lora_alpha, usual.lora_dropout, usual.lora_targets):
        return None
    return RuleViolation(
        "lora_rank = 0, must be above 0 for lora_alpha, lora_dropout and lora_targets to have an effect",
        {"tuning.lora_rank": (8,)},
    )


@rule("tuning.lora_dropout", "tuning.lora_targets", "run.ffn_chunks")
def adapters_drop_of_whole_sequences(a: Arguments) -> RuleViolation | None:
    """What falls away depends on the place in the sequence, which a chunk of it does not know."""
    t, chunks = a.tuning, a.run.ffn_chunks
    if not t.lora_dropout or chunks == 1 or not {"gate", "up", "down"} & {*t.lora_targets}:
        return None
    return RuleViolation(
        f"lora_dropout = {t.lora_dropout:g} with adapters of the feed-forward, ffn_chunks = {chunks}, must be 1",
        {"run.ffn_chunks": (1,), "tuning.lora_dropout": (0.0,)},
    )
