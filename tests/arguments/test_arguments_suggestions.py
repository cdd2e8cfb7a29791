"""Every way out that a rejection offers is one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import Phase, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from stretto.arguments import ConfigError, Violation, parse
from stretto.arguments import validate as validation
from stretto.arguments.rule import rules_in
from stretto.arguments.setting import Value
from stretto.arguments.sources import COMMAND_LINE
from stretto.arguments.suggest import explain
from stretto.arguments.tree import get, settings
from stretto.arguments.validate import RULES, Said, validate
from stretto.layout import Layout

pytestmark = pytest.mark.pure

SIZES = st.integers(1, 9) | st.sampled_from([12, 16, 24, 32, 64])

# A search tries hundreds of configurations: no shrinking, which would take minutes.
SEARCHING = effort(deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


@st.composite
def commands(draw: st.DrawFn) -> dict[str, Said]:
    """Values for some settings, each legal by itself, most of them not together."""
    sized = {path: SIZES for path, s in settings().items() if s.kind is int}
    others: dict[str, st.SearchStrategy[Value]] = {
        "parallel.sequence_parallel": st.booleans(),
        "parallel.stage_layers": st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple),
        "model.position": st.sampled_from(["rope", "learned"]),
        "optimizer.lr_schedule": st.sampled_from(["cosine", "linear", "constant", "wsd"]),
        "optimizer.lr": st.sampled_from([1e-5, 1e-3]),
        "optimizer.min_lr": st.sampled_from([0.0, 1e-4, 1e-2]),
        "model.rope_base": st.sampled_from([1e4, 5e5]),
        "data.held_out": st.sampled_from([0.0, 0.1]),
    }
    values = draw(st.fixed_dictionaries({}, optional={**sized, **others}))
    legal = {p: v for p, v in values.items() if not isinstance(v, int) or v in settings()[p].bounds}
    return {path: Said(value, COMMAND_LINE) for path, value in legal.items()}


@SEARCHING
@given(commands())
def test_each_way_out_cures_its_rule_and_breaks_no_other(said: dict[str, Said]) -> None:
    found = validate(said)
    before = {f.key for f in found.findings}
    for v in explain(said, {}, found):
        for fix in v.fixes:
            after = {f.key for f in validate(changed(said, fix)).findings}
            assert (v.rule, v.fields) not in after
            assert after <= before


@SEARCHING
@given(commands())
def test_following_the_advice_leads_to_a_valid_run(said: dict[str, Said]) -> None:
    for _ in range(len(RULES) + 1):
        found = validate(said)
        advice = next((v for v in explain(said, {}, found) if v.fixes), None)
        if advice is None:
            break
        said = changed(said, advice.fixes[0])
    assert not found.findings


@effort(deadline=None)
@given(commands())
def test_what_passes_the_rules_fits_together(said: dict[str, Said]) -> None:
    """The arithmetic of a step, stated a second time and without the rules."""
    found = validate(said)
    if found.findings:
        return
    m, p, b = found.args.model, found.args.parallel, found.args.batch
    assert p.dp
    layout = Layout.of(tp=p.tp, cp=p.cp, pp=p.pp, dp=p.dp, ep=p.ep, etp=p.etp)
    assert layout.world == found.args.run.nproc
    assert p.tp * (m.heads // p.tp) == m.heads
    assert p.tp * (m.dim_ffn // p.tp) == m.dim_ffn
    assert p.dp * b.micro_batch * (b.global_batch // (p.dp * b.micro_batch)) == b.global_batch
    assert get(found.args, "optimizer.decay_steps") is not None


@pytest.mark.parametrize(
    "words",
    ["--nproc 1000 --tp 8 --pp 3 --heads 8", "--heads 7", "--hidden 100", "--ffn 333", "--tp 5 --nproc 10", "--tp 16"],
)
def test_suggested_sizes_are_those_that_people_choose(words: str) -> None:
    """Catches: all candidates searched at once, which suggests --pp 5 for 4 layers, --hidden 196 and --ffn 334."""
    with pytest.raises(ConfigError) as caught:
        parse(["--preset", "demo", "--layers", "4", *words.split()], env={})
    fixes = [fix for v in caught.value.violations for fix in v.fixes]
    assert fixes
    for fix in fixes:
        number = {path: value for path, value in fix.items() if isinstance(value, int)}
        assert all(number.get(path, 0) % 64 == 0 for path in ("model.hidden", "model.ffn", "batch.seq_len"))
        assert number.get("parallel.pp", 1) <= number.get("model.layers", 4)
        assert number.get("parallel.tp", 1) <= 8


def changed(said: dict[str, Said], fix: Mapping[str, Value]) -> dict[str, Said]:
    return {**said, **{path: Said(value, COMMAND_LINE) for path, value in fix.items()}}


def test_a_rejection_reads_as_the_commands_that_would_do() -> None:
    v = Violation("r", (), "a % b = 1", ("a = 3 (default)",), ({"parallel.tp": 2}, {"checkpoint.resume": False}))
    assert str(ConfigError([v])) == (
        "1 problem in the configuration\n\nr: a % b = 1\n    a = 3 (default)\n    try --tp 2, or --no-resume"
    )


def test_every_file_of_rules_is_read() -> None:
    """Catches: a file of rules that `validate.py` does not name, so that none of them is ever held against a run."""
    files = sorted(path.stem for path in Path(validation.__file__).parent.glob("*_rules.py"))
    assert len(files) >= 6
    declared = rules_in(*(import_module(f"stretto.arguments.{name}") for name in files))
    assert {each.name for each in declared} == {each.name for each in RULES}
    assert len(declared) == len(RULES) >= 65
