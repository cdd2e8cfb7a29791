"""All rules that settings must obey together."""

from __future__ import annotations

from stretto.arguments import (
    compute_rules,
    context_rules,
    exact_rules,
    layout_rules,
    model_rules,
    tuning_rules,
    update_rules,
)
from stretto.arguments.rule import Rule, rules_in

RULES: tuple[Rule, ...] = rules_in(
    layout_rules, model_rules, context_rules, update_rules, compute_rules, tuning_rules, exact_rules
)
