"""Layers of any shape over axes of any size equal their unsharded form in fp64; what does not divide is padded inside,
or rejected, and never cut off.

Faults to catch: an input that is taken for contiguous; a frozen weight that gets a gradient; a width whose rest is left
out; a weight used twice whose second gradient is lost.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_parallel_full import compare, draw, full_grads, mine, set_full
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.arguments import ConfigError
from stretto.arguments.elsewhere import validated_in
from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig
from stretto.distributed import MainGradients
from stretto.estimate.sizes import local_tokens
from stretto.layout import Layout
from stretto.models import StageSpec, Transformer
from stretto.parallel_state import ParallelState
from stretto.params import Init, collect
from stretto.tensor_parallel import (
    Build,
    ColumnParallelLinear,
    Projection,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_spec,
)
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

INIT = Init(std=1.0)
CASES = 12


class Drawn(MainGradients):
    """Accumulators that hand their sums to `.grad`."""

    def add(self, weight: nn.Parameter, write: Any) -> None:
        with torch.no_grad():
            first = weight.grad is None
            if weight.grad is None:
                weight.grad = torch.empty_like(weight)
            write(weight.grad, first)

    defer = add

    def flush(self) -> None:
        pass


class Net(nn.Module):
    """Words into a pair of products, through which everything goes `times` times."""

    def __init__(self, sizes: dict[str, int], build: Build, *, bias: bool, times: int) -> None:
        super().__init__()
        h, inner = sizes["h"], sizes["inner"]
        self.embed = VocabParallelEmbedding(vocab_spec(sizes["vocab"], h, INIT, tied=False), build)
        parts = [Projection("one", inner), Projection("other", inner)]
        self.up = ColumnParallelLinear(h, parts, build, bias=bias, init=INIT)
        self.down = RowParallelLinear(inner, h, build, bias=bias, init=INIT)
        self.times = times

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        x = x + self.embed(tokens)
        for _ in range(self.times):
            one, other = self.up(x.transpose(0, 1).contiguous().transpose(0, 1)).chunk(2, -1)  # not contiguous
            x = x + self.down(torch.tanh(one) * other)
        return x


def plain(net: Net, w: dict[str, Tensor], tokens: Tensor, x: Tensor) -> Tensor:
    x = x + w["embed.weight"][tokens.t()]
    for _ in range(net.times):
        one, other = (F.linear(x, w[f"{n}.weight"], w.get(f"{n}.bias")) for n in ("one", "other"))
        x = x + F.linear(torch.tanh(one) * other, w["down.weight"], w.get("down.bias"))
    return x


@pytest.mark.parametrize("world", [3, 4])
def test_drawn_shapes_equal_their_unsharded_form(pool: Pool, world: int) -> None:
    """Over 3, and over 4, 2 and 1 ranks: frozen weights, inputs without a gradient, weights used twice."""
    pool.run(world, _drawn)


def _drawn(world: World) -> None:
    layouts = [Layout.of(tp=3)] if world.size == 3 else [Layout.of(tp=4), Layout.of(tp=2, dp=2), Layout.of(dp=4)]
    for number, layout in enumerate(layouts):
        with ParallelState.build(layout, world) as state:
            for n in range(CASES):
                _case(state.axis("tp"), random.Random(100 * number + n))


def _case(tp: Axis, chance: random.Random) -> None:
    sp, bias, times = chance.random() < 0.5, chance.random() < 0.5, chance.choice((1, 1, 2))
    sizes = {"h": chance.randint(1, 9), "inner": chance.randint(1, 11), "vocab": chance.randint(1, 40)}
    s, b = (tp.size * chance.randint(1, 3) if sp else chance.randint(1, 7)), chance.randint(1, 3)
    frozen = [name for name in ("embed", "up", "down") if chance.random() < 0.25]
    wants, sums = chance.random() < 0.7, Drawn() if chance.random() < 0.5 else None
    what = f"{tp.size} {sizes} {s=} {b=} {sp=} {bias=} {times=} {frozen=} {wants=} {sums is not None=}"
    net = Net(sizes, Build(tp, sp, torch.float64, accumulators=sums), bias=bias, times=times)
    set_full(net)
    for name in frozen:
        net.get_submodule(name).requires_grad_(False)
    shapes = {part.name: part.spec.shape for item in collect(net) for part in item.logical}
    w = {name: draw(shape, name) for name, shape in shapes.items()}
    own = {"one": "up", "other": "up"}
    trained = [n for n in w if own.get(n.split(".")[0], n.split(".")[0]) not in frozen]
    for name in trained:
        w[name].requires_grad_()
    tokens = torch.tensor([[chance.randrange(sizes["vocab"]) for _ in range(s)] for _ in range(b)])
    x, dy = draw((s, b, sizes["h"]), "x"), draw((s, b, sizes["h"]), "dy")
    x.requires_grad_(wants)
    local = mine(x.detach(), tp, sp).clone().requires_grad_(wants)
    want = plain(net, w, tokens, x)
    found = net(tokens, local)
    compare(what, {"y": found.detach()}, {"y": mine(want.detach(), tp, sp)})
    if not (trained or wants):
        return
    want.backward(dy)
    found.backward(mine(dy, tp, sp))
    if wants:
        assert local.grad is not None
        assert x.grad is not None
        compare(what, {"x": local.grad}, {"x": mine(x.grad, tp, sp)})
    for item in collect(net):
        if not item.param.requires_grad:
            assert item.param.grad is None, f"{what}: {item.name} is frozen"
            item.param.grad = torch.zeros_like(item.param)
    compare(what, {n: g for n, g in full_grads(net, tp).items() if n in trained}, {n: w[n].grad for n in trained})


@given(
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 33),
    st.integers(1, 60),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_sizes_are_covered_whole_or_rejected(
    tp: int, kv_heads: int, groups: int, ffn: int, seq_len: int, vocab: int, sequence_parallel: bool
) -> None:
    """What is accepted is held whole by the ranks together, each element by as many as there are copies; what is
    rejected does not divide."""
    heads = kv_heads * groups
    model = ModelConfig(layers=1, hidden=12, heads=heads, kv_heads=kv_heads, head_dim=4, ffn=ffn, vocab=vocab)
    parallel = ParallelConfig(sequence_parallel=sequence_parallel and tp > 1)
    args = Arguments(model=model, parallel=parallel, batch=BatchConfig(seq_len=seq_len, micro_batch=1, global_batch=1))
    try:
        validated_in(args, Layout.of(tp=tp))
    except ConfigError:
        shared = max(kv_heads, tp) % min(kv_heads, tp) == 0
        assert heads % tp or ffn % tp or not shared or (parallel.sequence_parallel and seq_len % tp)
        return
    held: dict[str, Tensor] = {}
    for rank in range(tp):
        build = Build(Axis("tp", rank, tuple(range(tp))), parallel.sequence_parallel, torch.float32, "meta")
        for item in collect(Transformer(model, StageSpec.whole(model), build, seq_len=seq_len)):
            for part in item.logical:
                count = held.setdefault(part.name, torch.zeros(part.spec.shape, dtype=torch.int))
                block = part.block
                count[tuple(slice(o, o + n) for o, n in zip(block.offsets, block.shape, strict=True))] += 1
                assert all(stored >= n for stored, n in zip(block.stored, block.shape, strict=True))
    for name, count in held.items():
        assert int(count.min()) == int(count.max()) >= 1, f"{name} is held {count.min()} to {count.max()} times"
    args = replace(args, parallel=replace(parallel, tp=tp))
    tokens = local_tokens(args)
    assert tokens == seq_len
    assert not parallel.sequence_parallel or tokens // tp * tp == seq_len
