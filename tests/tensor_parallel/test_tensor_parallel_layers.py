"""P1 for the linear layers: column, then row, is the plain product, forwards and backwards.

Sizes do not divide, so that chunks are padded.
Faults to catch: copy_to without its sum; reduce_from that sums in its backward too; a row bias added on every rank
before the sum; partial gradients of norms and biases not declared; copies of key/value rows not declared as partial;
parts of a stack in another order.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tensor_parallel_full import compare, draw, full_grads, mine, set_full
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, ParamSpec
from stretto.tensor_parallel import (
    Build,
    ColumnParallelLinear,
    Projection,
    RowParallelLinear,
    copy_to,
    declare_norm,
    declare_on,
    gather_sequence,
    reduce_from,
    replicated,
    scatter_sequence,
)
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

S, B, IN, OUT = 12, 2, 7, 5
INIT = Init(std=1.0)


class Pair(nn.Module):
    """Norm, gated product of two stacked matrices, back: what a feed-forward is made of."""

    def __init__(self, inner: int, bias: bool, build: Build) -> None:
        super().__init__()
        self.norm = declare_norm(nn.LayerNorm(IN, dtype=build.dtype), sequence_parallel=build.sequence_parallel)
        self.up = ColumnParallelLinear(
            IN, [Projection("gate", inner), Projection("value", inner)], build, bias=bias, init=INIT
        )
        self.down = RowParallelLinear(inner, OUT, build, bias=bias, init=INIT)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        out: Tensor = self.down(torch.tanh(gate) * value)
        return out


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_column_then_row_is_the_plain_product(pool: Pool, tp: int) -> None:
    """Outputs, and gradients of inputs, weights and biases, with and without sequence parallelism."""
    pool.run(tp, _pairs)


@pytest.mark.parametrize("tp", [2, 4])
def test_rows_held_in_copies_get_the_sum_of_their_parts(pool: Pool, tp: int) -> None:
    """Two key heads and eight queries: on four ranks each head is held twice, each holder sees half of its queries."""
    pool.run(tp, _grouped)


@pytest.mark.parametrize("tp", [2, 3])
def test_borders_are_pairs_for_a_loss_that_all_ranks_repeat(pool: Pool, tp: int) -> None:
    """Each border's backward against the definition of the region that it leads into or out of; and twice over."""
    pool.run(tp, _borders)


def test_a_sequence_that_does_not_divide_is_rejected(pool: Pool) -> None:
    for message in pool.run(2, _odd_sequence):
        assert "dimension 0 of (5, 2, 3) is 5, not a multiple of 2" in message


def test_padding_of_a_pair_stays_zero_in_training(pool: Pool) -> None:
    """Ten columns on four ranks are stored as twelve; the two extra must not grow."""
    pool.run(4, _train_padding)


def _plain_pair(inner: int, bias: bool, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    shapes = {"norm.weight": (IN,), "norm.bias": (IN,), "gate.weight": (inner, IN), "value.weight": (inner, IN)}
    shapes |= {"down.weight": (OUT, inner)}
    if bias:
        shapes |= {"gate.bias": (inner,), "value.bias": (inner,), "down.bias": (OUT,)}
    w = {name: draw(shape, name).requires_grad_() for name, shape in shapes.items()}
    x = x.clone().requires_grad_()
    h = F.layer_norm(x, (IN,), w["norm.weight"], w["norm.bias"])
    gate, value = (F.linear(h, w[f"{part}.weight"], w.get(f"{part}.bias")) for part in ("gate", "value"))
    y = F.linear(torch.tanh(gate) * value, w["down.weight"], w.get("down.bias"))
    grads = torch.autograd.grad(y, [x, *w.values()], dy)
    return y.detach(), dict(zip(["x", *w], grads, strict=True))


def _pairs(world: World) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        tp = state.axis("tp")
        x, dy = draw((S, B, IN), "x"), draw((S, B, OUT), "dy")
        for inner, bias, sp in product((2, 10, 12), (False, True), (False, True)):
            wanted_y, wanted = _plain_pair(inner, bias, x, dy)
            model = Pair(inner, bias, Build(tp, sp, torch.float64))
            set_full(model)
            local = mine(x, tp, sp).clone().requires_grad_()
            y = model(local)
            y.backward(mine(dy, tp, sp))
            what = f"inner={inner} bias={bias} sp={sp}"
            compare(what, {"y": y.detach()}, {"y": mine(wanted_y, tp, sp)})
            compare(what, {"x": local.grad}, {"x": mine(wanted.pop("x"), tp, sp)})
            compare(what, full_grads(model, tp), wanted)


class Grouped(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        copies = max(1, build.tp.size // 2)
        self.qk = ColumnParallelLinear(
            IN, [Projection("q", 8), Projection("k", 2, copies)], build, bias=True, init=INIT
        )
        self.out = RowParallelLinear(8, OUT, build, bias=False, init=INIT)
        self.queries = 8 // build.tp.size

    def forward(self, x: Tensor) -> Tensor:
        y = self.qk(x)
        q, k = y[..., : self.queries], y[..., self.queries :]
        out: Tensor = self.out(torch.tanh(q) * k.repeat_interleave(self.queries // k.shape[-1], -1))
        return out


def _grouped(world: World) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        tp = state.axis("tp")
        x, dy = draw((S, B, IN), "x"), draw((S, B, OUT), "dy")
        shapes = {"q.weight": (8, IN), "k.weight": (2, IN), "q.bias": (8,), "k.bias": (2,), "out.weight": (OUT, 8)}
        w = {name: draw(shape, name).requires_grad_() for name, shape in shapes.items()}
        q, k = (F.linear(x, w[f"{n}.weight"], w[f"{n}.bias"]) for n in "qk")
        plain = F.linear(torch.tanh(q) * k.repeat_interleave(4, -1), w["out.weight"])
        wanted = dict(zip(w, torch.autograd.grad(plain, list(w.values()), dy), strict=True))
        for sp in (False, True):
            model = Grouped(Build(tp, sp, torch.float64))
            set_full(model)
            y = model(mine(x, tp, sp))
            y.backward(mine(dy, tp, sp))
            compare(f"sp={sp}", {"y": y.detach()}, {"y": mine(plain.detach(), tp, sp)})
            compare(f"sp={sp}", full_grads(model, tp), wanted)


def _borders(world: World) -> None:
    """f enters, each rank multiplies by its own factor, g leaves: y = sum_r factor_r * x, and dx = sum_r factor_r * dy.

    The region is linear in dy as well, so the same holds once more for the second derivative.
    """
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        tp = state.axis("tp")
        total = sum(range(1, world.size + 1))
        x, dy = draw((S, B, IN), "x"), draw((S, B, IN), "dy")
        for sp, enter, leave in ((False, copy_to, reduce_from), (True, gather_sequence, scatter_sequence)):
            local = mine(x, tp, sp).clone().requires_grad_()
            upper = mine(dy, tp, sp).clone().requires_grad_()
            y = leave(enter(local, tp) * (world.rank + 1), tp)
            (dx,) = torch.autograd.grad(y, local, upper, create_graph=True)
            (recompute,) = torch.autograd.grad(dx, upper, mine(x, tp, sp))
            compare(f"sp={sp}", {"y": y.detach()}, {"y": total * mine(x, tp, sp)})
            compare(f"sp={sp}", {"dx": dx.detach()}, {"dx": total * mine(dy, tp, sp)})
            compare(f"sp={sp}", {"again": recompute}, {"again": total * mine(x, tp, sp)})
        one = Axis.single("tp")
        for border in (copy_to, reduce_from, gather_sequence, scatter_sequence):
            assert border(x, one) is x


def _odd_sequence(world: World) -> str:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        layer = RowParallelLinear(4, 3, Build(state.axis("tp"), True, torch.float32), bias=False, init=INIT)
        with pytest.raises(ValueError, match="not a multiple") as error:
            layer(torch.ones(5, 2, 2))
        return str(error.value)


def _train_padding(world: World) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        tp = state.axis("tp")
        model = Pair(10, True, Build(tp, False, torch.float64))
        set_full(model)
        adam = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            adam.zero_grad()
            model(draw((S, B, IN), "x")).square().sum().backward()
            full_grads(model, tp)  # asserts that padding has none
            adam.step()


def test_a_replicated_parameter_says_whether_its_gradient_is_a_part() -> None:
    assert replicated((3,), INIT, sequence_parallel=True).sum_grad == ("tp",)
    assert replicated((3,), INIT, sequence_parallel=False).sum_grad == ()
    made = declare_on(nn.Module(), "w", ParamSpec((3,), INIT), Build(Axis.single("tp"), False, torch.bfloat16))
    assert (made.dtype, tuple(made.shape)) == (torch.bfloat16, (3,))
