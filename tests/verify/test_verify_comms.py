"""A training step sends what the textbook says, over every axis, and all ranks of a group do the same.

Faults to catch: an all-reduce in place of a reduce-scatter; a gradient reduced twice; a sum of partial gradients left
out; a border of tensor parallelism that communicates in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from test_verify_layouts import arguments

from stretto.arguments import parse
from stretto.arguments.schema import Arguments
from stretto.collective_trace import CollectiveCall
from stretto.layout import Layout
from stretto.report.communication import communication_table
from stretto.testing import Pool
from stretto.verify.comms import Communication, communication, record_step
from stretto.world import World

pytestmark = pytest.mark.gloo

SIZES = [(2, 2, 2), (1, 3, 2), (4, 1, 1), (4, 2, 1), (1, 1, 3), (3, 1, 2), (1, 4, 1), (1, 1, 1)]
VARIANTS = [0b00000000, 0b01000001, 0b10000001, 0b01110010, 0b11001100]
"""Tied, with biases, GELU, sequence parallel, GPipe and more, in turn: see `arguments`."""


def _record(world: World, args: Arguments) -> dict[int, list[CollectiveCall]]:
    p = args.parallel
    return record_step(args, Layout.of(tp=p.tp, pp=p.pp, dp=p.dp or 1), world)


def record(pool: Pool, args: Arguments) -> tuple[Layout, dict[int, list[CollectiveCall]]]:
    layout = Layout.of(tp=args.parallel.tp, pp=args.parallel.pp, dp=args.parallel.dp or 1)
    return layout, pool.run(layout.world, _record, args)[0]


def shown(found: Communication) -> str:
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as capture:
        console.print(communication_table(found, "a step"))
    return capture.get()


def cases() -> Iterator[object]:
    """For each of the sizes two or three variants, of which a commit has one."""
    for number, (tp, pp, dp) in enumerate(SIZES):
        some = VARIANTS[number % 2 :: 2]
        for k, variant in enumerate(some):
            at_night = [pytest.mark.nightly] * (k != number // 2 % len(some))
            yield pytest.param(number, (tp, pp, dp), variant, marks=at_night, id=f"tp{tp}-pp{pp}-dp{dp}-{k}")


@pytest.mark.parametrize(("number", "sizes", "variant"), list(cases()))
def test_a_step_sends_what_the_textbook_says(
    pool: Pool, number: int, sizes: tuple[int, int, int], variant: int
) -> None:
    args = arguments(*sizes, variant=variant, dtype=("fp64", "fp32", "bf16")[number % 3])
    layout, calls = record(pool, args)
    found = communication(args, layout, calls)
    assert found.right, shown(found)


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_scales_of_fp8_are_agreed_on_as_often_as_the_textbook_says(pool: Pool, recipe: str, recompute: str) -> None:
    sizes = (
        "--preset demo --layers 3 --hidden 32 --heads 4 --head-dim 16 --ffn 32 --vocab 53 --seq-len 16 --global-batch 4"
    )
    layout = "--micro-batch 2 --tp 2 --pp 2 --nproc 4 --sequence-parallel"
    args = parse(f"{sizes} {layout} --dtype bf16 --fp8 {recipe} --recompute {recompute}".split(), env={}).args
    found = communication(args, *record(pool, args))
    assert found.right, shown(found)


@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize(("sp", "dropout"), [(False, 0.0), (False, 0.2), (True, 0.0), (True, 0.2)])
def test_a_recomputation_sends_what_the_textbook_says(pool: Pool, sp: bool, dropout: float, recompute: str) -> None:
    args = arguments(2, 2, 1, variant=sp << 6)
    args = replace(args, model=replace(args.model, dropout=dropout), run=replace(args.run, recompute=recompute))
    layout, calls = record(pool, args)
    found = communication(args, layout, calls)
    assert found.right, shown(found)


def test_sequence_parallelism_gathers_and_scatters_twice_per_layer_and_direction(pool: Pool) -> None:
    """Korthikanti et al. (2022), figure 5: two g and two g-bar in the forward of a layer, and their conjugates."""
    args = arguments(2, 1, 1, variant=0b01000000)
    _, calls = record(pool, args)
    layers, microbatches = args.model.layers, args.batch.global_batch // args.batch.micro_batch
    for op in ("all_gather", "reduce_scatter"):
        # 2 in the forward and 2 in the backward of each layer; the embedding and the head together 2
        assert sum(call.op == op for call in calls[0]) == (4 * layers + 2) * microbatches


def test_one_call_more_on_one_rank_is_found_and_shown(pool: Pool) -> None:
    args = arguments(2, 1, 2, variant=0)
    layout, calls = record(pool, args)
    last = [call for call in calls[1] if call.axis == "tp" and call.op == "all_reduce"][-1]
    last = replace(last, number=max(call.number for call in calls[1] if call.channel == last.channel))
    calls[1].append(replace(last, number=last.number + 1, site="extra.py:7"))
    found = communication(args, layout, calls)
    assert not found.right
    assert [(d.channel, d.number) for d in found.divergences] == [(last.channel, last.number + 1)]
    assert [(s.axis, s.off) for s in found.sent if s.off] == [("tp", (1,))]
    assert [dict(s.sites)["extra.py:7"] for s in found.sent if s.off] == [1]
    assert "tp all_reduce of rank 1: " in shown(found)
    assert "extra.py:7" in shown(found)
    assert "not equal on 1" in shown(found)
