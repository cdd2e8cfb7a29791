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

    def add(self, counts: Tensor, dropped: Tensor | None, chance: Tensor, z: Tensor) -> None:
        """What a microbatch has seen; None: nothing was dropped."""
        self.counts += counts
        if dropped is not None:
            self.dropped += dropped
        self.chance += chance
        self.z += z


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
        self._split, self._seen, self._best = build.fuse(three_parts), build.fuse(_seen), build.fuse(best)

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
            kept = within_capacity(experts, weights.detach(), sequence, c, self.build, structure)
        if torch.is_grad_enabled():
            weights = self._balanced(weights, logits, scores, Choice(experts, weights, kept), real)
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
        best_of: Tensor = self._best(ranked, c.top_k)
        return best_of

    def _balanced(self, weights: Tensor, logits: Tensor, scores: Tensor, choice: Choice, real: Tensor | None) -> Tensor:
        """The weights, whose backward adds the gradients of the losses. What was seen is counted in the forward: frozen
        layers may have no backward. Where a backward computes a block once more, it was."""
        c, state, experts, kept = self.config, self.state, choice.experts, choice.kept
        chance = scores / scores.sum(-1, keepdim=True) if c.router == "sigmoid" else scores
        times = torch.ones_like(experts)
        if real is not None:
            chance, times = chance * real[:, None], times * real[:, None]
        if not in_backward():
            lost = None if kept is None else _counts(experts, c.experts, times * ~kept)
            seen, z = self._seen(logits.detach(), chance.detach(), real)
            state.add(_counts(experts, c.experts, times), lost, seen, z)
        if c.balance_loss:
            assignments = state.before.sum().clamp(min=1)
            share = state.before.to(chance.dtype) / assignments
            weights = _attach(weights, (chance.sum(0) * share).sum() * (c.balance_loss * c.experts / self.tokens))
        if c.router_z_loss:
            weights = _attach(weights, _z(logits, real) * (c.router_z_loss / self.tokens))
        return weights


def best(scores: Tensor, k: int) -> Tensor:
    """[n, k] int64: of scores [n, E] which are the best, the best first."""
    return scores.topk(k, -1, sorted=True).indices


def _counts(experts: Tensor, number: int, times: Tensor) -> Tensor:
    """[E] int64: how often each expert was chosen. Unlike `bincount` no host waits for it."""
    counts = torch.zeros(number, dtype=torch.int64, device=experts.device)
    return counts.scatter_add_(0, experts.flatten(), times.flatten())


def _z(logits: Tensor, real: Tensor | None) -> Tensor:
    """[]: the sum over the tokens of logsumexp(logits)^2."""
    squares = torch.logsumexp(logits, -1).square()
    return (squares if real is None else squares * real).sum()


def _seen(logits: Tensor, chance: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over the tokens: of probabilities [E] and of logsumexp^2 [], in fp64."""
    return chance.sum(0, dtype=torch.float64), _z(logits, real).double()


def _attach(weights: Tensor, extra: Tensor) -> Tensor:
    """The weights; `extra` is added to the loss, whose value does not have it."""
    return _Attach.apply(weights, extra)  # type: ignore[no-any-return, no-untyped-call]


class _Attach(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, extra: Tensor) -> Tensor:
        ctx.save_for_backward(extra)
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor, Tensor]:
        (extra,) = ctx.saved_tensors
        return dweights, torch.ones_like(extra)
