"""What a sparse layer keeps for its backward, counted; and that what is not kept changes no bit.

Faults to catch: outputs of experts that are kept; the activation's output kept beside what it is made from; rows kept
beside the tokens that they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig
from stretto.estimate.kept import plan_bytes, router_bytes, sparse_feed_forward
from stretto.experts import SparseFeedForward
from stretto.params import Init, collect, fill
from stretto.tensor_parallel import Build, Pointwise, formulas
from stretto.world import Axis

pytestmark = pytest.mark.gloo

SHAPES = {"qwen3-30b-a3b": (64, 24), "olmoe-7b": (64, 32), "deepseek-v2-lite": (64, 44)}
"""Hidden and inner size, a 32nd of the published ones; eight experts for each token."""
TOKENS, EXPERTS, TOP_K = 96, 16, 8


def step(hidden: int, inner: int, *, recompute: bool) -> tuple[int, list[Tensor]]:
    """Bytes that one layer keeps besides parameters, and all gradients."""
    config = ModelConfig(hidden=hidden, expert_ffn=inner, experts=EXPERTS, top_k=TOP_K)
    place = Build(Axis.single("tp"), False, torch.float32, recompute=recompute)
    made: Any = SparseFeedForward(
        config, place, Pointwise.of(formulas.SWIGLU, place), lambda _: torch.nn.Identity(), out_init=Init(std=0.02)
    )
    fill(collect(torch.nn.ModuleDict({"mlp": made})), 7, lambda p: p.data)
    x = torch.randn(TOKENS, 1, hidden, generator=torch.Generator().manual_seed(1), requires_grad=True)
    known = {p.untyped_storage().data_ptr() for p in made.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        y = made(x)
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    y.square().sum().backward()
    return found, [x.grad, *(p.grad for p in made.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("name", SHAPES)
def test_selective_recomputation_keeps_half_of_the_plain_form_and_changes_no_bit(name: str) -> None:
    """The plain form keeps of each assignment what its expert takes, what enters its activation and leaves it, and what
    it gives: 2h + 3f numbers."""
    hidden, inner = SHAPES[name]
    plain = TOKENS * (hidden + TOP_K * (2 * hidden + 3 * inner)) * 4
    whole, gradients = step(hidden, inner, recompute=False)
    less, others = step(hidden, inner, recompute=True)
    assert less <= 0.55 * plain
    assert less < whole < plain
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    model = ModelConfig(hidden=hidden, expert_ffn=inner, experts=EXPERTS, top_k=TOP_K)
    args = Arguments(model=model, batch=BatchConfig(seq_len=TOKENS, micro_batch=1))
    of_router = (router_bytes(args) + plan_bytes(args)) / 4
    assert abs(less / 4 - sparse_feed_forward(args, selective=True) - of_router) <= 4 * TOKENS * TOP_K
    assert (
        abs(whole / 4 - sparse_feed_forward(args, selective=False) - TOKENS * hidden - of_router) <= 4 * TOKENS * TOP_K
    )
