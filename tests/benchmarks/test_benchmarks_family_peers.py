"""torchtitan is asked for the models that it has, with the widths that they have."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.family_torchtitan import LLAMA3, QWEN3, known
from benchmarks.train.peers import RunRejectedError
from benchmarks.train.peers.torchtitan_trainer import ffn_args
from stretto.arguments import parse
from stretto.arguments.schema import ModelConfig

pytestmark = pytest.mark.gloo


def model(words: str) -> ModelConfig:
    return parse(["--preset", *words.split()], env={}, files=False).args.model


@pytest.mark.parametrize(
    ("words", "family"),
    [("qwen3-0.6b", QWEN3), ("qwen3-8b", QWEN3), ("llama3.2-1b", LLAMA3), ("llama3-8b", LLAMA3)],
)
def test_a_model_has_its_family(words, family):
    """Catches a setting that the family can say and is held against the preset's."""
    assert known(model(words)) is family


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        ("gemma3-1b", "its dense Qwen3 lacks norm_zero_centered = True, norm_placement = sandwich"),
        ("mistral-7b", "its dense Llama 3 lacks window = 4096"),
        ("qwen2.5-0.5b", "its dense Llama 3 lacks qkv_bias = True"),
        ("qwen3-30b-a3b", "its dense Qwen3 lacks experts = 128"),
        ("llama3.2-1b --head-dim 128", "its dense Llama 3 lacks head_dim = 128"),
        ("llama3.2-1b --rope-scaling linear", "its dense Llama 3 lacks rope_scaling = linear"),
        ("qwen3-0.6b --rope-scaling linear --rope-factor 2", "its dense Qwen3 lacks rope_scaling = linear"),
    ],
)
def test_what_a_family_lacks_is_said(words, lacks):
    """Catches a model that would be timed without some of its operations."""
    with pytest.raises(RunRejectedError, match=re.escape(lacks)):
        known(model(words))


@given(st.integers(2, 1 << 15), st.integers(1, 1 << 17))
def test_widths_are_met(hidden, ffn):
    """As its FeedForward computes them. Catches a quotient that is rounded down to one less."""
    said = ffn_args(hidden, ffn)
    width = int(said["ffn_dim_multiplier"] * int(2 * (4 * hidden) / 3))
    assert said["multiple_of"] * ((width + said["multiple_of"] - 1) // said["multiple_of"]) == ffn
