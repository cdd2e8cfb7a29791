"""Rules over what of a model is trained, and what of it is saved."""

from __future__ import annotations

from stretto.arguments.rule import RuleViolation, clash, require, rule, told, violation
from stretto.arguments.schema import Arguments


@rule("save save_every sample_tokens exit_duration")
def checkpoints_are_there(a: Arguments) -> RuleViolation | None:
    """What needs checkpoints is not asked of a run that writes none."""
    said = {"save_every": a.checkpoint.save_every, "sample_tokens": a.run.sample_tokens}
    asked = [name for name, value in {**said, "exit_duration": a.run.exit_duration}.items() if value]
    if a.checkpoint.save or not asked:
        return None
    fixes = {name: (None if name == "exit_duration" else 0,) for name in asked} if len(asked) == 1 else {}
    what = ", ".join(told(f"{{{name}}}", a) for name in asked)
    return violation(f"no checkpoint is saved, but {what}", save=(True,), **fixes)


@rule(
    "lora_targets lora_rank activation kv_lora_rank q_lora_rank experts shared_ffn first_dense sparse_every "
    "dense_layers layers"
)
def adapters_have_matrices(a: Arguments) -> RuleViolation | None:
    """Adapters are of matrices that the model has, each named once; those of routed experts have none."""
    t, targets, m = a.tuning, a.tuning.lora_targets, a.model
    none = ("k", "v", *(("q",) if m.q_lora_rank else ())) if m.latent else ()
    routed = ("gate", "up", "down") if not m.shared_ffn and all(map(m.is_sparse, range(m.layers))) else ()
    lacking = {*none, *routed, *(() if m.gated else ("gate",))}
    usable = tuple(name for name in dict.fromkeys(targets) if name not in lacking)
    if not t.lora_rank or (usable == targets and targets):
        return None
    problem = "{lora_targets}: must name matrices of the model, each once"
    if "gate" in targets and not m.gated:
        problem += "; {activation} has no gate"
    if {*none} & {*targets}:
        problem += f"; {{kv_lora_rank}} makes {', '.join(none)} from latents"
    if {*routed} & {*targets}:
        problem += "; {experts}: every feed-forward is made of routed experts, which have no adapters"
    return violation(told(problem, a), lora_targets=(usable or (("o",) if m.latent else ("q", "v")),))


adapters_drop_of_whole_sequences = require(
    "What falls away depends on the place in the sequence, which a chunk of it does not know.",
    clash(
        "{lora_dropout} with adapters of the feed-forward, {ffn_chunks}, must be 1",
        "'gate' in lora_targets or 'up' in lora_targets or 'down' in lora_targets",
        ffn_chunks=[1],
        lora_dropout=[0.0],
    ),
)
