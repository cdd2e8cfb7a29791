"""Rules over what is computed once more."""

from __future__ import annotations

from stretto.arguments.recomputation import USUAL, bytes_of
from stretto.arguments.rule import RuleViolation, rule
from stretto.arguments.schema import Arguments


@rule("run.recompute_parts", "run.recompute")
def parts_are_chosen_once(a: Arguments) -> RuleViolation | None:
    """Parts of a block are named for selective recomputation, each once."""
    parts, how = a.run.recompute_parts, a.run.recompute
    if how != "selective" and parts != USUAL:
        return RuleViolation(
            f"recompute_parts = {','.join(parts) or 'none'} has no effect with recompute = {how}",
            {"run.recompute": ("selective",), "run.recompute_parts": (USUAL,)},
        )
    if parts and len({*parts}) == len(parts):
        return None
    return RuleViolation(
        f"recompute_parts = {','.join(parts) or 'none'}: must name parts, each once",
        {"run.recompute_parts": (tuple(dict.fromkeys(parts)) or USUAL,)},
    )


@rule("run.recompute_parts", "model.experts", "run.ffn_chunks")
def projections_are_of_dense_layers(a: Arguments) -> RuleViolation | None:
    """Inner features of experts, and of a sequence in chunks, are not made once more by the projections."""
    if a.run.recompute != "selective" or "projections" not in a.run.recompute_parts or not a.model.experts:
        return None
    rest = tuple(part for part in a.run.recompute_parts if part != "projections") or USUAL
    return RuleViolation(
        f"recompute_parts = {','.join(a.run.recompute_parts)} with experts = {a.model.experts}: projections are those "
        "of dense layers",
        {"run.recompute_parts": (rest,)},
    )


@rule("run.recompute_layers", "run.recompute", "model.layers")
def so_many_layers_are_recomputed(a: Arguments) -> RuleViolation | None:
    """A number of layers needs a way to recompute them, and that many."""
    n, how = a.run.recompute_layers, a.run.recompute
    if n is None:
        return None
    if how not in ("selective", "block"):
        return RuleViolation(
            f"recompute_layers = {n} with recompute = {how}, must be selective or block",
            {"run.recompute": ("block",), "run.recompute_layers": (None,)},
        )
    if n <= a.model.layers:
        return None
    return RuleViolation(
        f"recompute_layers = {n}, must be <= layers = {a.model.layers}", {"run.recompute_layers": (a.model.layers,)}
    )


@rule("run.activation_budget", "run.recompute", "run.ffn_chunks")
def a_budget_chooses(a: Arguments) -> RuleViolation | None:
    """A budget is a size, and chooses what is recomputed by itself."""
    budget = a.run.activation_budget
    if budget is None:
        return None
    try:
        bytes_of(budget)
    except ValueError as error:
        return RuleViolation(f"activation_budget: {error}", {"run.activation_budget": ("20GB",)})
    if a.run.recompute != "none":
        return RuleViolation(
            f"activation_budget = {budget} with recompute = {a.run.recompute}: a budget chooses what is recomputed",
            {"run.recompute": ("none",), "run.activation_budget": (None,)},
        )
    if a.run.ffn_chunks == 1:
        return None
    return RuleViolation(
        f"activation_budget = {budget} with ffn_chunks = {a.run.ffn_chunks}: a budget takes the sequence as a whole",
        {"run.ffn_chunks": (1,), "run.activation_budget": (None,)},
    )
