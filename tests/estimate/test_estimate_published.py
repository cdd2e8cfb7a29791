"""Presets named after published models have their numbers of parameters: one field wrong, and the sum is another."""

from __future__ import annotations

import pytest

from stretto.arguments import parse
from stretto.estimate import count_parameters

pytestmark = pytest.mark.pure

PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma2-2b": 2_614_341_888,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "olmo2-7b": 7_298_617_344,
    "phi3-mini": 3_821_079_552,
    "pythia-160m": 162_322_944,
    "gpt2-small": 124_439_808,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-7b": 6_919_161_856,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
"""Of the weights that their authors put out: those of a tied matrix once."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_parameters_of_the_published_model(name: str) -> None:
    args = parse(["--preset", name], env={}, files=False).args
    assert count_parameters(args.model, args.batch.seq_len).total == PUBLISHED[name]
