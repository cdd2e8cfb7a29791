"""A block in regions is the block of separate nodes, to the bit: outputs, gradients, and what is sent when.

Faults to catch: the residual left out; an adapter passed over; hooks that hear nothing.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stretto.arguments import ConfigError, parse
from stretto.estimate.recompute import policy_of
from stretto.estimate.regions import in_regions
from stretto.layout import Layout
from stretto.models import block as blocks
from stretto.models.block import Block
from stretto.schedule.blocks import StageBlock
from stretto.verify import Session, build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

WORDS = "--preset demo --hidden 32 --heads 4 --kv-heads 2 --head-dim 8 --ffn 48 --layers 2 --vocab 64 --seq-len 16 "
WORDS += "--global-batch 4 --micro-batch 2 --device cpu --no-compile --pp 1 --no-tied"


def trained(words: str, layout: Layout, world: World, *, apart: bool) -> tuple[dict[str, Tensor], bool]:
    """Losses, gradients and weights of two steps; and whether all blocks are in regions."""
    args = parse(f"{WORDS} {words} --nproc {world.size}".split(), env={}, files=False, world_size=world.size).args
    regions_of = (lambda *_, **__: None) if apart else blocks.regions_of
    with patch.object(blocks, "regions_of", regions_of), build(args, layout, world) as session:
        session.load_full(random_weights(session, seed=0))
        losses = [torch.tensor(session.step(random_batch(args, seed))) for seed in range(2)]
        found = {"losses": torch.stack(losses), **session.full_state()}
        found |= {f"gradient of {name}": grad for name, grad in session.full_grads().items()}
        here = blocks_of(session)
        return found, bool(here) and all(block._regions is not None for block in here)


def blocks_of(session: Session) -> list[Block]:
    return [part for stage in session.built.stages.values() for part in stage.modules() if isinstance(part, Block)]


def same(words: str, layout: Layout, world: World) -> bool:
    (one, regions), (other, apart) = (trained(words, layout, world, apart=apart) for apart in (False, True))
    assert not apart
    for name, x in one.items():
        if isinstance(x, Tensor):
            assert torch.equal(x, other[name]), name
    return regions


PLAIN = "--activation swiglu --norm rms --position rope"
CASES = {
    "llama": PLAIN,
    "bf16, selective": f"{PLAIN} --dtype bf16 --recompute selective",
    "norms alone": f"{PLAIN} --recompute selective --recompute-parts norms",
    "block": f"{PLAIN} --recompute block",
    "qwen": f"{PLAIN} --qkv-bias --qk-norm",
    "olmo": f"{PLAIN} --norm-placement post",
    "gemma": "--activation geglu-tanh --norm rms --norm-placement sandwich",
    "learned": "--activation gelu --norm layer --position learned",
    "frozen": f"{PLAIN} --freeze *layers.0*,*norm*",
    "fp8": f"{PLAIN} --dtype bf16 --fp8 tensorwise",
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_they_are_its_nodes_one_by_one(words: str) -> None:
    assert same(f"{words} --tp 1", Layout.of(), World.single())


@pytest.mark.parametrize("sharding", ["", "--sharding fsdp"])
def test_over_ranks_too(pool: Any, sharding: str) -> None:
    words = f"{PLAIN} --tp 2 --sequence-parallel --dp 2 {sharding}"
    assert all(pool.run(4, over_ranks, words))


def over_ranks(world: World, words: str) -> bool:
    return same(words, Layout.of(tp=2, dp=2), world)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "--norm-placement": st.sampled_from(["pre", "post", "sandwich"]),
            "--recompute": st.sampled_from(["none", "selective", "block"]),
            "--recompute-parts": st.sampled_from(["norms", "activation", "attention", "projections"]),
            "--ffn-chunks": st.just("2"),
            "--lora-rank": st.just("2"),
            "--dropout": st.just("0.1"),
            "--position": st.sampled_from(["rope", "learned"]),
            "--experts": st.just("4"),
            "--bias": st.just(""),
            "--qk-norm": st.just(""),
            "--parallel-residual": st.just(""),
        },
    )
)
@example({"--lora-rank": "2", "--lora-targets": "o"})
@example({"--lora-rank": "2", "--lora-targets": "gate"})
@example({"--bias": ""})
@example({"--parallel-residual": ""})
@settings(deadline=None)
def test_the_ledger_knows_which_blocks_they_are(words: dict[str, str]) -> None:
    said = f"{WORDS} {PLAIN} --tp 1 --nproc 1 " + " ".join(f"{flag} {value}" for flag, value in words.items())
    try:
        args = parse(said.split(), env={}, files=False, world_size=1).args
    except ConfigError:  # not every choice goes with every other
        return
    with build(args, Layout.of(), World.single()) as session:
        policy = policy_of(args, 0)
        for block in blocks_of(session):
            parts = policy[block.layer]
            if parts != frozenset({"block"}):  # decided where it is called
                assert in_regions(args, StageBlock(block.layer), parts) is (block._regions is not None)


def test_hooks_inside_of_a_block_are_called() -> None:
    args = parse(f"{WORDS} {PLAIN} --nproc 1 --tp 1".split(), env={}, files=False, world_size=1).args
    with build(args, Layout.of(), World.single()) as session:
        seen: list[str] = []
        first = blocks_of(session)[0]
        assert first.mlp is not None
        handle = first.mlp.register_forward_hook(lambda *_: seen.append("mlp"))
        session.step(random_batch(args, 0))
        assert seen == ["mlp", "mlp"]
        handle.remove()
        session.step(random_batch(args, 0))
        assert seen == ["mlp", "mlp"]
