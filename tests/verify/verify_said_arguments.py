"""As `verify_said`: what rules over settings are made of."""

from __future__ import annotations

from verify_fault import Fault, Said

CLAUSES = Said(
    "tests/arguments/test_arguments_rules.py",
    Fault(
        "a clash of settings of which one has a value that would do",
        "arguments/rule.py",
        "wrong = holds(a) and not any(get(a, path) in values",
        "wrong = holds(a) and not all(get(a, path) in values",
    ),
    Fault(
        "clashes that are told where no part is wrong",
        "arguments/rule.py",
        "if found is None or not wrong:",
        "if found is None:",
    ),
    Fault(
        "an order that is asked for where it does not apply",
        "arguments/rule.py",
        "or holds(a) or not asked(a):",
        "or holds(a):",
    ),
    Fault(
        "a rule held against a setting that it does not name",
        "arguments/model_rules.py",
        '@rule("rope_scaling rope_original_positions seq_len")',
        '@rule("rope_scaling rope_original_positions")',
    ),
)
