"""All rules that settings must obey together."""

from __future__ import annotations

from stretto.arguments import (
    bound_rules,
    context_rules,
    exact_rules,
    expert_rules,
    graph_rules,
    group_rules,
    layout_rules,
    model_rules,
    precision_rules,
    recompute_rules,
    save_rules,
    tuning_rules,
    update_rules,
)
from stretto.arguments.rule import Rule, rules_in

RULES: tuple[Rule, ...] = rules_in(
    *(layout_rules, group_rules, model_rules, expert_rules, context_rules, bound_rules, update_rules, precision_rules),
    *(graph_rules, recompute_rules, save_rules, tuning_rules, exact_rules),
)
