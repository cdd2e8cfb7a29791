"""The router and the combination of its choices against a few lines of plain torch.

Faults to catch: a router whose gradient is detached; groups that are ranked by their best score alone; counts in bf16;
outputs added in the order in which they arrived; a bias that weighs; tokens beyond the capacity that are kept; a drop
that rounding decides; a drop for what another document chose.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from experts_models import DEEPSEEK, LAST, MIXTRAL, OSS, QWEN2, SMALL, arguments
from torch import Tensor

from stretto.batch import Batch
from stretto.experts import Balance, Router, Routing, SparseFeedForward
from stretto.experts.capacity import within_capacity
from stretto.experts.plan import Sorting
from stretto.experts.rows import combine_rows
from stretto.experts.scores import by_parts, plainly, three_parts
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init
from stretto.structure import SequenceCut
from stretto.tensor_parallel import Build, Pointwise, formulas
from stretto.world import Axis, ExpertAxes, World

pytestmark = pytest.mark.gloo


def layer_of(model: dict[str, Any], dtype: torch.dtype) -> SparseFeedForward:
    config = arguments({**model, "shared_ffn": 0, "shared_gate": False, "activation": "swiglu"}).model
    build = Build(Axis.single("tp"), False, dtype, tokens=40)
    act = Pointwise.of(formulas.SWIGLU, build)
    layer = SparseFeedForward(config, build, act, lambda _: torch.nn.Identity(), out_init=Init(std=0.3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=generator))
        if config.router_bias:
            layer.gate.state.bias.copy_(torch.randn(config.experts, generator=generator))
    return layer


def by_slots(layer: SparseFeedForward, x: Tensor) -> Tensor:
    """Token by token, slot by slot."""
    c, gate = layer.config, layer.gate
    logits = x.flatten(0, 1) @ gate.weight.t()
    scores = logits.sigmoid() if c.router == "sigmoid" else logits.softmax(-1)
    ranked = scores + gate.state.bias if c.router_bias else scores
    if c.router_groups > 1:
        of = ranked.view(len(ranked), c.router_groups, -1)
        best = of.sort(-1, descending=True).values[..., :2].sum(-1).topk(c.router_top_groups).indices
        allowed = torch.zeros(len(ranked), c.router_groups, dtype=torch.bool).scatter(1, best, True)
        ranked = ranked.masked_fill(~allowed.repeat_interleave(c.experts // c.router_groups, 1), -torch.inf)
    chosen = ranked.topk(c.top_k).indices
    if c.router == "softmax-top-k":
        weights = logits.gather(1, chosen).softmax(-1)
    else:
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) if c.router_renormalize else weights
    weights = weights * c.router_scale
    up = layer.experts.gate_up_proj.weight.view(c.experts, -1, c.hidden)
    down = layer.experts.down_proj.weight.view(c.experts, c.hidden, -1)
    rows = []
    for t, token in enumerate(x.flatten(0, 1)):
        total = torch.zeros_like(token)
        for k in range(c.top_k):
            e = int(chosen[t, k])
            total = total + weights[t, k] * (down[e] @ formulas.swiglu((up[e] @ token)[None])[0])
        rows.append(total)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("model", [MIXTRAL, DEEPSEEK, QWEN2, OSS], ids=["mixtral", "deepseek", "qwen2", "gpt-oss"])
def test_a_layer_is_what_plain_torch_computes(model: dict[str, Any]) -> None:
    """Output, and gradients of input, router and experts, in fp64."""
    layer = layer_of({**model, "balance_loss": 0.0, "router_z_loss": 0.0}, torch.float64)
    x = torch.randn(10, 4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for compute in (layer, lambda x: by_slots(layer, x)):
        inward = x.clone().requires_grad_()
        layer.zero_grad()
        y = compute(inward)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append([y.detach(), inward.grad, *(p.grad.clone() for p in layer.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_slots_are_added_in_their_order() -> None:
    """Bitwise: the best expert first, whatever its number. In the order of the experts the sum would be 0."""
    plan = Sorting(torch.tensor([[5, 0, 3], [1, 4, 2]]), 6, ExpertAxes.single()).plan()
    by_expert = torch.tensor([[-1e8], [1.0], [2.0], [3.0], [4.0], [1e8]])
    assert combine_rows(by_expert, None, torch.ones(2, 3), plan.back).tolist() == [[3.0], [7.0]]


def test_a_capacity_drops_the_last_of_a_sequence() -> None:
    """Two sequences whose tokens all want one expert: of each the first so many are kept."""
    config = arguments({**LAST, "expert_capacity": 2.0}).model
    chosen = torch.zeros(8 * 2, 1, dtype=torch.int64)
    kept = within_capacity(chosen, torch.rand(16, 1), (8, 2), config, Build(Axis.single("tp"), False, torch.float32))
    assert kept.view(8, 2).t().tolist() == [[True, True] + [False] * 6] * 2  # 2 * 8 * 1 / 8 = 2 of each


@pytest.mark.parametrize("drop", ["last", "lowest"])
def test_no_document_takes_the_capacity_of_another(drop: str) -> None:
    """Of five, eight and three tokens, all for one expert: each document has a limit of its own, rounded up."""
    config = arguments({**LAST, "experts": 4, "expert_capacity": 2.0, "expert_drop": drop}).model
    starts = torch.tensor([[0] * 5 + [5] * 8 + [13] * 3, [0] * 16])
    none = torch.zeros(2, 16, dtype=torch.int64)
    _, structure = SequenceCut().of(Batch(none, none, none.bool(), torch.arange(2), starts))
    weights = torch.linspace(0.9, 0.1, 16).repeat_interleave(2)[:, None]  # the first tokens have the most
    chosen, build = torch.zeros(32, 1, dtype=torch.int64), Build(Axis.single("tp"), False, torch.float32)
    kept = within_capacity(chosen, weights, (16, 2), config, build, structure).view(16, 2).t()
    assert kept.sum(1).tolist() == [3 + 4 + 2, 8]
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2, 5, 6, 7, 8, 13, 14]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_tokens_the_last_is_dropped_however_their_weights_were_rounded(dtype: torch.dtype) -> None:
    """Two tokens of the same word at the start of a sequence: another layout may round either of them up."""
    config = arguments({**SMALL, "top_k": 1, "experts": 4, "expert_capacity": 2.0}).model
    build, chosen = Build(Axis.single("tp"), False, dtype), torch.zeros(4, 1, dtype=torch.int64)
    least = torch.finfo(dtype).eps
    for first, second in ((1, 1), (1 + least, 1), (1, 1 + least)):
        weights = 0.3 * torch.tensor([first, second, 0.9, 1.1], dtype=dtype)[:, None]
        assert within_capacity(chosen, weights, (4, 1), config, build).flatten().tolist() == [True, False, False, True]


def test_biases_move_by_integer_counts() -> None:
    """40,841 against a mean of 40,840: one assignment decides the sign, which bf16 would not see."""
    config = arguments({**DEEPSEEK, "experts": 4, "router_groups": 1, "router_top_groups": 1}).model
    router = Router(config, Build(Axis.single("tp"), False, torch.float32))
    with ParallelState.build(Layout.of(), World.single()) as state:
        balance = Balance({1: router}, config, state, 40_840)
        router.state.counts.copy_(torch.tensor([40_841, 40_839, 40_840, 40_840]))
        balance.step()
    rate = config.router_bias_rate
    assert router.state.bias.tolist() == pytest.approx([-rate, rate, 0.0, 0.0])
    assert router.state.before.tolist() == [40_841, 40_839, 40_840, 40_840]
    assert not router.state.counts.any()


def test_three_parts_are_the_whole_gradient() -> None:
    """No bit of an fp32 number is lost, whatever its size, and the products are those of all of it."""
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(50, 6, generator=generator) * 10.0 ** torch.randint(-12, 6, (50, 6), generator=generator)
    parts = three_parts(dy)
    assert parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().view(50, 3, 6).sum(1), dy.double())
    x, weight = torch.randn(50, 24, generator=generator).bfloat16(), torch.randn(6, 24, generator=generator).bfloat16()
    dx, _ = by_parts(dy, x, weight, three_parts)
    torch.testing.assert_close(dx, plainly(dy, x, weight)[0], rtol=2**-7, atol=0.1)
    total, other = torch.ones(6, 24, dtype=torch.float64), torch.ones(6, 24, dtype=torch.float64)
    for first in (True, False):
        by_parts(dy.double(), x.double(), weight.double(), lambda dy: three_parts(dy.float()).double())[1](total, first)
        plainly(dy.double(), x.double(), weight)[1](other, first)
    torch.testing.assert_close(total, other, rtol=1e-12, atol=1e-12)


def test_what_is_told_of_a_step() -> None:
    """Load, entropy and balance at both ends: equal loads, and one expert alone."""
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]])
    chance = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    routing = Routing((0, 1), counts, torch.zeros_like(counts), chance, torch.zeros(2), torch.zeros(2, 4))
    assert routing.load().tolist() == [1.0, 4.0]
    assert routing.entropy().tolist() == pytest.approx([1.0, 0.0])
    assert routing.loss().tolist() == pytest.approx([1.0, 4.0])
