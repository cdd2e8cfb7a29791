"""`--exact`: the same bits for every tp, not merely close ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stretto.arguments import ConfigError, parse
from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from stretto.cli.verify import reference_of
from stretto.distributed.norm import exact_squares
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.verify import against_reference
from stretto.verify.comms import record_step
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

AWKWARD: dict[str, Any] = {
    "layers": 2,
    "hidden": 48,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 12,
    "ffn": 88,
    "vocab": 203,
}
"""Widths that are no multiples of a vector, fewer key heads than ranks, a vocabulary that does not divide."""

BIASED = {"norm": "layer", "activation": "gelu", "position": "learned", "bias": True, "tied": True, "dropout": 0.2}
FULL = {"qk_norm": True, "qk_norm_width": "full", "norm_placement": "post"}
HEADS = {"qk_norm": True, "qkv_bias": True, "logit_softcap": 20.0, "kv_heads": 1}

CASES = [
    pytest.param(8, 1, True, "bf16", "selective", FULL, id="tp8-sp-bf16-full-norms"),
    pytest.param(4, 1, False, "fp32", "none", BIASED, id="tp4-biases-dropout"),
    pytest.param(2, 2, True, "fp32", "block", HEADS, id="tp2-pp2", marks=pytest.mark.nightly),
    pytest.param(8, 1, False, "fp64", "none", FULL, id="tp8-fp64", marks=pytest.mark.nightly),
    pytest.param(4, 1, True, "bf16", "none", BIASED, id="tp4-sp-bf16-biases", marks=pytest.mark.nightly),
    pytest.param(2, 1, True, "fp32", "selective", HEADS, id="tp2-sp", marks=pytest.mark.nightly),
]


def exact(tp: int, pp: int, sp: bool, dtype: str, recompute: str, model: dict[str, Any]) -> Arguments:
    return Arguments(
        model=ModelConfig(**{**AWKWARD, **model}),
        parallel=ParallelConfig(tp=tp, pp=pp, sequence_parallel=sp, exact=8, bucket_mb=0.005),
        batch=BatchConfig(seq_len=16, micro_batch=1, global_batch=3),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.5),
        run=RunConfig(dtype=dtype, timeout=30.0, recompute=recompute),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("tp", "pp", "sp", "dtype", "recompute", "model"), CASES)
def test_every_tp_gives_the_bits_of_one_process(
    pool: Pool, tp: int, pp: int, sp: bool, dtype: str, recompute: str, model: dict[str, Any]
) -> None:
    args = exact(tp, pp, sp, dtype, recompute, model)
    assert set(pool.run(tp * pp, _different, args)) == {""}


def test_the_bits_are_those_of_the_same_dp_and_close_to_those_of_another(pool: Pool) -> None:
    """Catches: bits that are asked of a reference whose replicas add up otherwise."""
    words = "--layers 1 --hidden 16 --heads 4 --ffn 24 --vocab 53 --seq-len 8 --global-batch 6 --exact 2 --tp 2 --dp 3"
    run = parse(f"{words} --optimizer sgd --micro-batch 1".split(), world_size=6)
    same, other = reference_of("", run), reference_of("dp=1", run)
    assert same == Layout.of(dp=3)
    for bits, reference in ((True, same), (False, other)):
        assert pool.run(6, _compared, run.args, run.layout, reference)[0] == (bits, "")


def _compared(world: World, args: Arguments, layout: Layout, reference: Layout) -> tuple[bool, str]:
    found = against_reference(args, layout, world, reference=reference)
    bits = all(d.limit == 0 for d in found.differences if d.quantity.kind == "gradient")
    return bits, ", ".join(map(str, (*found.failures[:3], *found.unequal[:3])))


def test_its_sums_are_told_by_who_asks_for_them(pool: Pool) -> None:
    """Catches: sites of calls that name the tree in the place of the layer."""
    args = exact(2, 1, True, "fp32", "none", {})
    calls = pool.run(2, _calls, args)[0]
    assert calls
    assert not [site for site in calls if "stretto/ordered.py" in site or "stretto/world.py" in site]


def test_without_it_the_bits_are_others(pool: Pool) -> None:
    """The comparison tells: what is only close is called different."""
    args = exact(2, 1, True, "fp32", "none", {})
    assert pool.run(2, _within_nothing, args)[0]


def _calls(world: World, args: Arguments) -> list[str]:
    records = record_step(args, Layout.of(tp=2), world)
    return [call.site for calls in records.values() for call in calls]


def _different(world: World, args: Arguments) -> str:
    found = against_reference(args, Layout.of(tp=args.parallel.tp, pp=args.parallel.pp), world)
    kinds = {d.quantity.kind for d in found.differences if d.limit == 0}
    assert kinds >= {"initial weight", "loss", "gradient", "gradient norm", "update", "evaluation"}
    return ", ".join(map(str, (*found.failures[:3], *found.unequal[:3])))


def _within_nothing(world: World, args: Arguments) -> bool:
    usual = replace(args, parallel=replace(args.parallel, exact=None))
    found = against_reference(usual, Layout.of(tp=args.parallel.tp), world)
    assert found.equal
    return any(d.error > 0 for d in found.of("gradient"))


@pytest.mark.pure
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]), st.floats(-60, 60))
def test_the_sum_of_squares_has_no_order(seed: int, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, generator=generator, dtype=dtype) * torch.logspace(-6, 0, 1000).to(dtype) * 2.0**size
    mixed = x[torch.randperm(1000, generator=generator)]
    zero, alone = torch.zeros((), dtype=torch.float64), Axis.single("tp")
    whole = exact_squares([x], alone, zero)
    assert torch.equal(exact_squares([mixed[:300].view(3, 100), mixed[300:301], mixed[301:]], alone, zero), whole)
    torch.testing.assert_close(whole, x.double().square().sum(), rtol=1e-13, atol=0)


@pytest.mark.pure
def test_the_sum_of_squares_of_what_is_not_finite_is_no_number() -> None:
    zero, alone = torch.zeros((), dtype=torch.float64), Axis.single("tp")
    for bad in (float("nan"), float("inf")):
        assert exact_squares([torch.tensor([1.0, bad])], alone, zero).isnan()
    assert exact_squares([torch.zeros(3)], alone, zero) == 0
    assert exact_squares([], alone, zero) == 0


@pytest.mark.pure
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--exact 6", "exact = 6 must be a power of two"),
        ("--exact 8 --heads 4 --hidden 64", "exact = 8 must divide heads = 4"),
        ("--exact 2 --tp 4 --nproc 4", "exact = 2 must be a multiple of tp = 4"),
        ("--exact 2 --ffn-chunks 2", "exact = 2 with ffn_chunks = 2"),
        ("--exact 2 --compile", "compile = true"),
        ("--exact 2 --lora-rank 4", "lora_rank = 4"),
        ("--exact 2 --threads 2", "threads = 2"),
    ],
)
def test_what_has_no_slices_is_rejected(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(words.split(), env={}, files=False, world_size=None)
    assert said in str(raised.value)
