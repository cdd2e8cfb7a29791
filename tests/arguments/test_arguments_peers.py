"""What other programs call a thing leads to ours, or to the word that there is none."""

from __future__ import annotations

import re

import pytest

from stretto.arguments import ConfigError, parse
from stretto.arguments.command_line import flags
from stretto.arguments.peers import CHOICES, FLAGS, flag_of
from stretto.arguments.tree import settings

pytestmark = pytest.mark.pure


def rejection(words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(words.split(), env={}, files=False)
    return caught.value.violations[0].problem


@pytest.mark.parametrize(
    ("words", "ends"),
    [
        ("--tensor-model-parallel-size 2", "did you mean --tp?"),
        ("--pipeline-parallel-degree 2", "did you mean --pp?"),
        ("--context-parallel-size 2", "did you mean --cp?"),
        ("--bf16", "did you mean --dtype bf16?"),
        ("--num_layers 2", "did you mean --layers?"),
        ("--fsdp", "did you mean --sharding fsdp?"),
        ("--num-experts 8", "did you mean --experts?"),
        ("--deepspeed ds.json", "did you mean --sharding zero1?"),
        ("--zero-stage 3", "did you mean --sharding zero1 (stage 3 is fsdp)?"),
        ("--zero3", "did you mean --sharding fsdp?"),
        ("--batch-size 8", "did you mean --global-batch (of an update) or --micro-batch (of a rank)?"),
        ("--whitespeed 1", "--help lists all flags"),
        ("--cp-comm-type p2p", "did you mean --cp-comm?"),
        ("--set parallel.tensor_model_parallel_size=2", "did you mean parallel.tp?"),
        ("--set moe.num_experts=2", "did you mean model.experts?"),
    ],
)
def test_a_flag_of_another_program_leads_on(words: str, ends: str) -> None:
    """Catches: the table not read, where --fsdp leads to --fp8 and --num-experts to --help by their looks;
    dashes that count as letters, where --whitespeed leads to --seed."""
    assert rejection(words).endswith(ends)


def test_a_command_without_the_setting_does_not_call_it_unavailable() -> None:
    """Catches: flags of a script behind `stretto convert args` without --, of which each was `not available yet`."""
    assert flag_of("use-distributed-optimizer", ()) == "; in training it is --sharding zero1"


def test_fp16_is_not_fp32_by_its_looks() -> None:
    """Catches: the table not read, where fp16 leads to fp32."""
    with pytest.raises(ConfigError) as caught:
        parse(["--dtype", "fp16"], env={})
    (violation,) = caught.value.violations
    assert "not available yet" in violation.problem
    assert violation.fixes == ({"run.dtype": "bf16"},)


def test_every_row_leads_somewhere_and_none_denies_a_setting_of_ours() -> None:
    """Catches: a row of a renamed setting, and `not available yet` of a feature that has become available."""
    ours = {flag.removeprefix("--") for flag in flags()}
    for row in FLAGS:
        assert row.feature or (row.ours is not None and row.ours.split()[0] in flags()), row
        if row.ours is None:
            assert not [name for name in ours if re.fullmatch(row.names, name)], row
    named = {s.name: s.choices for s in settings().values()}
    for choice in CHOICES:
        assert choice.feature or choice.ours, choice
        assert choice.ours is None or choice.ours in named[choice.setting], choice
        assert not [word for word in named[choice.setting] if re.fullmatch(choice.names, word)], choice
