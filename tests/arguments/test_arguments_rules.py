"""What a rule is made of.

Faults to catch: a clash of settings of which one has a value that would do; clashes that are told where no part is
wrong; an order that is asked for where it does not apply; a rule held against a setting that it does not name.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import MethodType
from typing import Any

import pytest
from test_arguments_rejections import cases

from stretto.arguments import Arguments, parse, validate
from stretto.arguments.rule import Rule, RuleViolation, clash, clashes, divisible, ordered, require, told
from stretto.arguments.tree import settings

pytestmark = pytest.mark.pure


class Recording:
    """Arguments that note which settings are read; what a property makes of several is its own."""

    def __init__(self, real: object, section: str, seen: set[str]) -> None:
        self.real, self.section, self.seen = real, section, seen

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if not self.section and not isinstance(getattr(Arguments, name, None), property):
            return Recording(found, name, self.seen)
        if isinstance(found, MethodType):
            return MethodType(found.__func__, self)
        self.seen |= {f"{self.section}.{name}"} & settings().keys()
        return found


def test_a_rule_names_every_setting_that_it_reads(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a rule that is held against a value that is wrong itself, so that one mistake is told twice."""
    unnamed: dict[str, set[str]] = defaultdict(set)

    def watched(rule: Rule) -> Rule:
        def check(a: Any) -> RuleViolation | None:
            seen: set[str] = set()
            found = rule.check(Recording(a, "", seen))  # type: ignore[arg-type]
            unnamed[rule.name] |= seen - {*rule.fields}
            return found

        return replace(rule, check=check)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate, "RULES", tuple(map(watched, validate.RULES)))
    assert len([case for case in cases() if case.rejection() != "accepted"]) >= 80
    assert len(unnamed) == len(validate.RULES)
    assert {name: paths for name, paths in unnamed.items() if paths} == {}


def test_the_text_of_a_rule_has_the_numbers_of_its_equation() -> None:
    args = parse(["--hidden", "256", "--heads", "8", "--norm-eps", "1e-6"], env={}).args
    said = told("{hidden / heads}; {norm_eps}, {window}, {freeze}, {tied}", args)
    assert said == "hidden / heads = 256 / 8; norm_eps = 1e-06, window = unset, freeze = none, tied = false"
    with pytest.raises(KeyError, match="hiden"):
        clash("{hiden}")


def test_clauses_are_held_one_after_the_other_and_several_clashes_at_once() -> None:
    args = parse(["--tp", "1", "--nproc", "1"], env={}).args
    wrong = clash("{heads}", heads=[6]), clash("{layers}", layers=[2])
    assert require("m", divisible("heads", "tp"), *wrong).check(args) == RuleViolation(
        "heads = 8", {"model.heads": [6]}
    )
    both = clashes("{tp} with ...", *wrong, clash("{hidden}", hidden=[256]), tp=[2]).check(args)
    fixes = {"model.heads": [6], "model.layers": [2], "parallel.tp": [2]}
    assert both == RuleViolation("tp = 1 with heads = 8; layers = 4", fixes)
    assert clashes("{tp} with ...", *wrong, tp=[1]).check(args) is None
    assert clashes("{tp} with ...", clash("{hidden}", hidden=[256])).check(args) is None
    assert clash("{tp} {heads}", tp=[1], heads=[6]).check(args) is None
    assert ordered("heads < hidden").check(args) is None
    less = ordered("hidden <= heads", heads="hidden")
    assert less.check(args) == RuleViolation("hidden = 256, must be <= heads = 8", {"model.heads": (256,)})
    assert ordered("hidden <= heads", "tp > 1").check(args) is None
    total = ordered("heads + layers <= tp", "tp == 1 and norm == 'rms'")
    assert total.check(args) == RuleViolation("heads + layers = 8 + 4 = 12, must be <= tp = 1", {})
    assert total.fields == ("model.heads", "model.layers", "parallel.tp", "model.norm")
    assert ordered("hidden <= window").check(args) is None, "which is unset"
