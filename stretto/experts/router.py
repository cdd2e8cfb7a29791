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
from stretto.experts.capacity import within_capacity
from stretto.params import Init, ParamSpec
from stretto.tensor_parallel import Build
from stretto.tensor_parallel.layers import declare_on, expect
from stretto.tensor_parallel.linear import accumulate_matmul


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
    the first. Of the step under way: `counts` [E] and `dropped` [E] int64, `chance` [E] fp64 the sum over the tokens of
    their probabilities, `z` [] fp64 of logsumexp^2.
    """

    experts: int
    device: torch.device | str
    wide: torch.dtype
    bias: Tensor = field(init=False)
    before: Tensor = field(init=False)
    counts: Tensor = field(init=False)
    dropped: Tensor = field(init=False)
    chance: Tensor = field(init=False)
    z: Tensor = field(init=False)

    def __post_init__(self) -> None:
        for name, dtype in (("bias", self.wide), ("before", torch.int64), ("counts", torch.int64)):
            setattr(self, name, torch.zeros(self.experts, dtype=dtype, device=self.device))
        self.dropped = torch.zeros_like(self.counts)
        self.chance = torch.zeros(self.experts, dtype=torch.float64, device=self.device)
        self.z = torch.zeros((), dtype=torch.float64, device=self.device)


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

    def forward(self, x: Tensor, sequence: tuple[int, int]) -> Choice:
        """`sequence`: tokens of each sample in x, and samples: rows are [s, b]."""
        c = self.config
        logits: Tensor = _Scores.apply(x, self.weight, self.build)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            logits = logits + self.bias
        scores = logits.sigmoid() if c.router == "sigmoid" else logits.softmax(-1)
        experts = self.chosen(scores.detach())
        if c.router == "softmax-top-k":
            weights = logits.gather(1, experts).softmax(-1)
        else:
            weights = scores.gather(1, experts)
            if c.router_renormalize:
                total = weights.sum(-1, keepdim=True)
                weights = weights / (total + 1e-20 if c.router == "sigmoid" else total)
        if c.router_scale != 1:
            weights = weights * c.router_scale
        kept = None
        if c.expert_capacity:
            kept = within_capacity(experts, weights.detach(), sequence, c, self.build)
        if torch.is_grad_enabled():
            weights = self._balanced(weights, logits, scores, experts, kept)
        return Choice(experts, weights, kept)

    def chosen(self, scores: Tensor) -> Tensor:
        """The K experts [n, K] of scores [n, E], the best first; of groups, of the best groups alone."""
        c = self.config
        ranked = scores + self.state.bias if c.router_bias else scores
        if c.router_groups > 1:
            grouped = ranked.view(len(ranked), c.router_groups, c.experts // c.router_groups)
            best = grouped.amax(-1) if c.router_group_score == "max" else grouped.topk(2, -1).values.sum(-1)
            allowed = torch.zeros_like(best, dtype=torch.bool)
            allowed.scatter_(1, best.topk(c.router_top_groups, -1).indices, True)
            ranked = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        return ranked.topk(c.top_k, -1, sorted=True).indices

    def _balanced(
        self, weights: Tensor, logits: Tensor, scores: Tensor, experts: Tensor, kept: Tensor | None
    ) -> Tensor:
        """The weights; their backward adds the gradients of the losses, and the counts, once for a microbatch."""
        c, state = self.config, self.state
        extra = logits.new_zeros(())
        chance = scores / scores.sum(-1, keepdim=True) if c.router == "sigmoid" else scores
        if c.balance_loss:
            assignments = state.before.sum().clamp(min=1)
            share = state.before.to(chance.dtype) / assignments
            extra = extra + (chance.sum(0) * share).sum() * (c.balance_loss * c.experts / self.tokens)
        z = torch.logsumexp(logits, -1).square().sum()
        if c.router_z_loss:
            extra = extra + z * (c.router_z_loss / self.tokens)
        counts = torch.bincount(experts.flatten(), minlength=c.experts)
        lost = torch.zeros_like(counts) if kept is None else torch.bincount(experts[~kept], minlength=c.experts)
        seen = (counts, lost, chance.detach().double().sum(0), z.detach().double())
        return _Attach.apply(weights, extra, state, *seen)  # type: ignore[no-any-return, no-untyped-call]


class _Attach(Function):
    """A backward runs once for a microbatch, also where its forward runs twice: there counts are added."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, extra: Tensor, state: RouterState, *seen: Tensor) -> Tensor:
        ctx.state = state
        ctx.save_for_backward(extra, *seen)
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        extra, counts, dropped, chance, z = ctx.saved_tensors
        state = ctx.state
        state.counts += counts
        state.dropped += dropped
        state.chance += chance
        state.z += z
        return dweights, torch.ones_like(extra), None, None, None, None, None


class _Scores(Function):
    """x W^T with fp32 sums and an fp32 result, or wider: of bf16 factors no bit of a product is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, build: Build) -> Tensor:
        ctx.param, ctx.build = weight, build
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.is_cuda and x.dtype != wide:
            product: Tensor = torch.ops.aten.mm.dtype(x, weight.t(), wide)
            return product
        return x.to(wide) @ weight.detach().to(wide).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, build = ctx.saved_tensors[0], ctx.build
        dx = (dy @ ctx.param.detach().to(dy.dtype)).to(x.dtype)

        def write(total: Tensor, first_microbatch: bool) -> None:
            accumulate_matmul(total, first_microbatch, dy.to(total.dtype), x.to(total.dtype))

        if build.accumulators is None:
            dw = torch.empty_like(ctx.param)
            write(dw, True)
            return dx, dw, None
        build.accumulators.add(ctx.param, write)
        return dx, None, None
