"""The router: which experts each token goes to, with which weights.

Scores are in fp32 or wider: they come from a product with fp32 sums, whatever the dtype of its factors. Counts are
integers. The losses that keep experts in balance are sums over the tokens of the whole global batch, so a rank adds its
tokens' part of them, whatever the layout and the microbatches:

    balance   c E sum_e f_e P_e    P_e: mean over the tokens of the probability of expert e;
                                   f_e: share of the assignments that went to e in the step before (Fedus et al., 2021,
                                   have those of the same batch, which no microbatch knows)
    z         c mean of logsumexp(logits)^2                                          (Zoph et al., "ST-MoE", 2022)

They have no value in the loss that is reported, only a gradient; metrics have them with the counts of the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stretto.arguments.schema import ModelConfig
from stretto.autograd.engine import in_backward
from stretto.experts import gates
from stretto.experts.capacity import within_capacity
from stretto.experts.scores import scores as scores_of
from stretto.experts.scores import three_parts
from stretto.params import Init, ParamSpec
from stretto.structure import Structure
from stretto.tensor_parallel import Build
from stretto.tensor_parallel.layers import declare_on, expect


@dataclass(frozen=True)
class Choice:
    """Of each token [n]: its experts [n, K] int64, the best first, and their weights [n, K] in fp32 or wider.

    `kept` [n, K] says which assignments are within the capacity of their expert; None: all.
    """

    experts: Tensor
    weights: Tensor
    kept: Tensor | None = None


@dataclass
class RouterState:
    """What a router remembers from step to step, the same on all ranks; and what this rank's tokens of a step added.

    `bias` [E] fp32 or wider moves the choice. `before` [E] int64 counts the assignments of the last step, all zero in
    the first. Of the step under way: `assignments` [2, E] int64, those of each expert and of these the dropped ones;
    `sums` [E + 1] fp64 over the tokens, of probabilities and of logsumexp^2.
    """

    experts: int
    device: torch.device | str
    wide: torch.dtype
    bias: Tensor = field(init=False)
    before: Tensor = field(init=False)
    assignments: Tensor = field(init=False)
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.bias = torch.zeros(self.experts, dtype=self.wide, device=self.device)
        self.assignments = torch.zeros((2, self.experts), dtype=torch.int64, device=self.device)
        self.before = torch.zeros_like(self.assignments[0])
        self.sums = torch.zeros(self.experts + 1, dtype=torch.float64, device=self.device)

    def add(self, assignments: Tensor, sums: Tensor) -> None:
        """What a microbatch has seen, in one call for each."""
        self.assignments += assignments
        self.sums += sums

    @property
    def counts(self) -> Tensor:
        """[E], a view."""
        return self.assignments[0]


class Router(nn.Module):
    """Tokens [n, h] to a `Choice`; every tensor-parallel rank holds all of it, and sees a part of the tokens."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.config, self.build, self.tokens = config, build, build.tokens
        spec = ParamSpec((config.experts, config.hidden), Init(std=config.init_std), sum_grad=("tp",))
        self.weight = declare_on(self, "weight", spec, build)
        wide = torch.promote_types(build.dtype, torch.float32)
        self.state = RouterState(config.experts, build.device, wide)
        self.bias: nn.Parameter | None = None
        if config.bias:
            own = ParamSpec((config.experts,), Init(), sum_grad=("tp",), weight_decay=False)
            self.bias = declare_on(self, "bias", own, build)
        expect(self.weight, build)
        coefficients = [each / self.tokens for each in (config.balance_loss * config.experts, config.router_z_loss)]
        self.gates = gates.Gates(config.router, config.router_renormalize, config.router_scale, *coefficients)
        self._split, self._best = build.fuse(three_parts), build.fuse(best)
        self._ranked, self._weights = build.fuse(gates.ranked), build.fuse(gates.weights)
        self.gradient = build.fuse(gates.gradient)

    def forward(
        self,
        x: Tensor,
        sequence: tuple[int, int],
        real: Tensor | None = None,
        structure: Structure | None = None,
    ) -> Choice:
        """`sequence`: tokens of each sample in x, and samples: rows are [s, b], which stand as `structure` says. `real`
        [n] says which rows are tokens (None: all): the others go to experts, too, but nothing is counted of them."""
        c = self.config
        logits = scores_of(x, self.weight, self.build, self._split)
        if self.bias is not None:
            logits = logits + self.bias
        with torch.no_grad():
            experts = self.chosen(logits)
        weights = self._weights(logits.detach(), experts, self.gates)
        kept = None
        if c.expert_capacity:
            kept = within_capacity(experts, weights, sequence, c, self.build, structure)
        if torch.is_grad_enabled() and logits.requires_grad:
            weights = _Choose.apply(self, weights, logits, experts, real, kept)  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled() and not in_backward():  # frozen layers have no backward that counts
            self.state.add(*gates.seen(logits, experts, real, kept, self.gates))
        return Choice(experts, weights, kept)

    def chosen(self, logits: Tensor) -> Tensor:
        """The K experts [n, K] of logits [n, E], the best first; of groups, of the best groups alone."""
        c = self.config
        ranked = logits  # scores have their order
        if c.router_bias or c.router_groups > 1:
            ranked = self._ranked(logits, self.state.bias if c.router_bias else None, self.gates)
        if c.router_groups > 1:
            grouped = ranked.view(len(ranked), c.router_groups, c.experts // c.router_groups)
            best = grouped.amax(-1) if c.router_group_score == "max" else grouped.topk(2, -1).values.sum(-1)
            allowed = torch.zeros_like(best, dtype=torch.bool)
            allowed.scatter_(1, best.topk(c.router_top_groups, -1).indices, True)
            ranked = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        best_of: Tensor = self._best(ranked, c.top_k)
        return best_of


def best(scores: Tensor, k: int) -> Tensor:
    """[n, k] int64: of scores [n, E] which are the best, the best first."""
    return scores.topk(k, -1, sorted=True).indices


class _Choose(Function):
    @staticmethod
    def forward(
        ctx: Any,
        router: Router,
        weights: Tensor,
        logits: Tensor,
        experts: Tensor,
        real: Tensor | None,
        kept: Tensor | None,
    ) -> Tensor:
        ctx.router = router
        ctx.save_for_backward(logits, experts, real, kept)
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        router, (logits, experts, real, kept) = ctx.router, ctx.saved_tensors
        state: RouterState = router.state
        dlogits, counts, sums = router.gradient(dweights, logits, experts, state.before, real, kept, router.gates)
        state.add(counts, sums)
        return None, None, dlogits, None, None, None
