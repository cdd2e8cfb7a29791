"""P6, P14: whatever tokens go where, nothing hangs and the gradients are those of one process; any ep loads any other.

Faults to catch: experts of other ranks left out of the norm; gradients of experts scaled by ep; a weight gradient of
this rank's own rows alone; an expert without tokens that keeps the gradient of the step before; counts of the last step
that a checkpoint forgets; counts that a recomputation adds again; a weight decay that an expert without tokens is
spared.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from experts_models import DEEPSEEK, MIXTRAL, arguments, layout_of
from torch import Tensor

from stretto.arguments.schema import Arguments
from stretto.checkpoint import load, save
from stretto.experts import SparseFeedForward, expert_axes
from stretto.layout import Layout
from stretto.parallel_state import ParallelState, default_axes
from stretto.params import Init, collect, fill
from stretto.tensor_parallel import Build, Pointwise, formulas
from stretto.testing import Pool
from stretto.verify import build, random_batch, random_weights
from stretto.world import World

pytestmark = pytest.mark.gloo

_INIT = Init(std=0.02)
SIGMOID: dict[str, Any] = {**DEEPSEEK, "router_groups": 1, "router_top_groups": 1, "router_group_score": "max"}


def _pushed(weights: dict[str, Tensor], towards: tuple[int, ...]) -> dict[str, Tensor]:
    """Biases that leave the routers no choice but among these experts."""
    found = dict(weights)
    for name, bias in weights.items():
        if name.endswith("correction_bias"):
            found[name] = torch.full_like(bias, -100.0)
            found[name][list(towards)] = 100.0
    return found


def _one(args: Arguments, towards: tuple[int, ...]) -> tuple[list[float], *tuple[dict[str, Tensor], ...]]:
    with build(args, Layout.of(), World.single()) as session:
        weights = _pushed(random_weights(session, 3), towards)
        session.load_full(weights)
        first = session.full_params()
        figures = [x for seed in (1, 2) for x in session.step(random_batch(args, seed))]
        return figures, session.full_grads(), session.full_params(), first


def _many(world: World, args: Arguments, towards: tuple[int, ...]) -> tuple[list[float], dict[str, Tensor], Any]:
    with build(args, layout_of(args), world) as session:
        weights = _pushed(random_weights(session, 3), towards)
        session.load_full(weights)
        figures = [x for seed in (1, 2) for x in session.step(random_batch(args, seed))]
        assert not session.unequal_replicas()
        return figures, session.full_grads(), session.full_params()


@pytest.mark.parametrize("towards", [(5,), (2, 3), (0, 1, 2, 3)], ids=["one expert", "one rank", "none to two ranks"])
def test_any_routing_is_right_and_ends(pool: Pool, towards: tuple[int, ...]) -> None:
    """An expert that nobody chose has a gradient of zeros, in the second step as in the first, and decays like all."""
    args = arguments({**SIGMOID, "top_k": len(towards)}, dp=4, ep=4, batch=4)
    figures, grads, params, first = _one(args, towards)
    for theirs in pool.run(4, _many, args, towards):
        assert theirs[0] == pytest.approx(figures, rel=1e-10)
        for mine, other in ((grads, theirs[1]), (params, theirs[2])):
            assert mine.keys() == other.keys()
            for name, full in mine.items():
                torch.testing.assert_close(other[name], full, rtol=1e-10, atol=1e-12, msg=name)
    idle = [n for n in grads if ".experts." in n and int(n.split(".experts.")[1].split(".")[0]) not in towards]
    assert idle
    assert all(not grads[name].any() for name in idle)
    left = (1 - args.optimizer.lr * args.optimizer.weight_decay) ** 2
    for name in idle:
        torch.testing.assert_close(params[name], left * first[name], rtol=1e-12, atol=0, msg=name)


def _saved(world: World, args: Arguments, directory: str) -> dict[str, Tensor]:
    with build(args, layout_of(args), world) as session:
        session.load_full(random_weights(session, 3))
        session.step(random_batch(args, 1))
        save(Path(directory), 1, session.built.optimizer.slices(), {}, world, group=session.world.group)
        return session.full_state()


def _loaded(world: World, args: Arguments, path: str) -> tuple[dict[str, Tensor], float]:
    with build(args, layout_of(args), world) as session:
        load(Path(path), session.built.optimizer.slices(), world, group=session.world.group)
        session.built.optimizer.loaded(1)
        return session.full_state(), session.step(random_batch(args, 2))[0]


def test_any_ep_loads_any_other_bitwise(pool: Pool, tmp_path: Path) -> None:
    """Weights, moments, biases and the counts that the next step's balance loss multiplies with."""
    model = {**DEEPSEEK, "balance_loss": 0.1}
    first = arguments(model, dp=4, ep=4, sharding="zero1", run={"recompute": "block"})
    state = pool.run(4, _saved, first, str(tmp_path))[0]
    counts = [int(t.sum()) for name, t in state.items() if name.startswith("counts/")]
    assert counts == [8 * 12 * 3] * 3  # sequences, tokens, experts of each; three layers
    assert any(name.endswith("correction_bias") for name in state)
    losses = []
    for sizes in ({}, {"dp": 2, "ep": 2, "pp": 2}, {"tp": 2, "dp": 2, "etp": 2, "sharding": "fsdp"}):
        args = arguments(model, **sizes)
        found, loss = pool.run(layout_of(args).world, _loaded, args, str(next(tmp_path.iterdir())))[0]
        losses.append(loss)
        assert found.keys() == state.keys()
        assert [name for name, t in state.items() if not torch.equal(found[name], t)] == []
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def _forward(world: World, ep: int) -> Tensor:
    """The output of one layer on this rank's own tokens, the same ones for every ep."""
    args = arguments(MIXTRAL, dp=4, ep=ep, dtype="fp32")
    config = replace(args.model, hidden=64, expert_ffn=96, top_k=3)
    layout = layout_of(args)
    with ParallelState.build(layout, world, axes=default_axes(layout, experts=True)) as state:
        place = Build(state.axis("tp"), False, torch.float32, experts=expert_axes(state))
        act = Pointwise.of(formulas.SWIGLU, place)
        layer = SparseFeedForward(config, place, act, lambda _: torch.nn.Identity(), out_init=_INIT)
        wrapped = torch.nn.ModuleDict({"mlp": layer})
        fill(collect(wrapped), 7, lambda p: p.data)
        x = torch.randn(33, 2, 64, generator=torch.Generator().manual_seed(world.rank))
        with torch.no_grad():
            return layer(x)


def test_the_bits_of_a_token_do_not_depend_on_ep(pool: Pool) -> None:
    """fp32 on the CPU: the rows of an expert that come from one rank are one product, wherever it is computed."""
    found = [pool.run(4, _forward, ep) for ep in (1, 2, 4)]
    for rank in range(4):
        assert torch.equal(found[0][rank], found[1][rank])
        assert torch.equal(found[0][rank], found[2][rank])


def test_microbatching_changes_no_balance() -> None:
    """One process, microbatches of 1, 2 and 8 sequences: the same three updates, balance and z losses included."""
    runs = []
    for size in (1, 2, 8):
        args = arguments({**MIXTRAL, "balance_loss": 0.5, "router_z_loss": 0.1, "expert_capacity": 1.0})
        args = replace(args, batch=replace(args.batch, micro_batch=size))
        with build(args, Layout.of(), World.single()) as session:
            session.load_full(random_weights(session, 3))
            for seed in (1, 2, 3):
                session.step(random_batch(args, seed))
            runs.append(session.full_params())
    for other in runs[1:]:
        for name, full in runs[0].items():
            torch.testing.assert_close(other[name], full, rtol=1e-9, atol=1e-11, msg=name)
