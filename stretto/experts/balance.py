"""Balance of the experts: once a step, from the integer counts of the whole global batch.

A bias that takes part in the choice alone moves by its rate towards the mean load (Wang et al., "Auxiliary-loss-free
load balancing", 2024): b_e += rate * sign(mean count - count of e), in integers until the last product. The counts of
this step are those that the balance loss of the next one multiplies with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.collectives import all_reduce_
from stretto.experts.router import Router
from stretto.parallel_state import ParallelState
from stretto.params import Slice


def bias_of(layer: int) -> str:
    """The name of a router's bias, as that of a weight."""
    return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class Routing:
    """One step of all sparse layers [L], over the whole global batch; tensors on the device.

    `counts` and `dropped` [L, E] int64, `chance` [L, E] the mean probabilities, `z` [L] mean of logsumexp^2, `bias`
    [L, E] after the step.
    """

    layers: tuple[int, ...]
    counts: Tensor
    dropped: Tensor
    chance: Tensor
    z: Tensor
    bias: Tensor

    def load(self) -> Tensor:
        """[L]: the largest count of an expert over the mean."""
        return self.counts.amax(1) / self.counts.double().mean(1).clamp(min=1e-300)

    def entropy(self) -> Tensor:
        """[L]: of the shares of the assignments, over that of equal ones: 1 is balance, 0 one expert alone."""
        share = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        most = torch.log(torch.tensor(float(max(2, self.counts.shape[1])), dtype=torch.float64))
        bits: Tensor = torch.special.entr(share).sum(1)
        return bits / most.to(share.device)

    def lost(self) -> Tensor:
        """[L]: share of the assignments that were dropped."""
        return self.dropped.sum(1) / self.counts.sum(1).clamp(min=1)

    def loss(self) -> Tensor:
        """[L]: E sum of share times mean probability, 1 in balance; with the counts of this very step."""
        share = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        return (share * self.chance).sum(1) * self.counts.shape[1]


class Balance:
    """The routers of this rank's stages, by layer of the whole model; `tokens` are those of a global batch."""

    def __init__(self, routers: Mapping[int, Router], model: ModelConfig, state: ParallelState, tokens: int) -> None:
        self.routers, self.layers, self.state, self.tokens = dict(routers), model.sparse_layers, state, tokens
        self.experts = model.experts
        self.rate = model.router_bias_rate if model.router_bias else 0.0
        at = state.layout.position(state.world.rank)
        self._counts = not any(at[axis] for axis in at if axis.partition(".")[0] in ("tp", "cp", "dp"))
        self.routing: Routing | None = None
        """Of the last step."""

    def step(self) -> None:
        """Sum the counts over the world, move the biases, begin a new step. All ranks call it together."""
        experts = self.experts
        device = self.state.world.device
        counts = torch.zeros((2, len(self.layers), experts), dtype=torch.int64, device=device)
        sums = torch.zeros((len(self.layers), 2 * experts + 1), dtype=torch.float64, device=device)
        for layer, router in self.routers.items():
            n, own = self.layers.index(layer), router.state
            counts[:, n] = own.assignments
            sums[n, :experts], sums[n, -1] = own.sums[:-1], own.sums[-1]
            if self._counts:
                sums[n, experts:-1] = own.bias
        world = self.state.axis("tp", "cp", "dp", "pp")
        for work in (all_reduce_(counts, world), all_reduce_(sums, world)):
            work.wait()
        behind = (counts[0].sum(1, keepdim=True) - experts * counts[0]).sign()
        for layer, router in self.routers.items():
            n, own = self.layers.index(layer), router.state
            own.before.copy_(counts[0, n])
            own.bias += self.rate * behind[n].to(own.bias.dtype)
        self.begin()
        chance, bias, z = sums.split_with_sizes([experts, experts, 1], 1)
        self.routing = Routing(
            self.layers, counts[0], counts[1], chance / self.tokens, z[:, 0] / self.tokens, bias + self.rate * behind
        )

    def begin(self) -> None:
        """Forget what a step that did not come to its end has counted."""
        for router in self.routers.values():
            router.state.assignments.zero_()
            router.state.sums.zero_()

    def slices(self) -> list[Slice]:
        """What a checkpoint holds of it: biases beside the weights, and the counts of the last step."""
        found = []
        for layer, router in self.routers.items():
            where = f"model.layers.{layer}.mlp.gate"
            kept: list[tuple[str, Tensor]] = [(f"counts/{where}", router.state.before)]
            if router.config.router_bias:
                kept.append((f"model/{bias_of(layer)}", router.state.bias))
            found += [Slice(name, tensor, tuple(tensor.shape), (0,), self._counts) for name, tensor in kept]
        return found


def routers_of(stages: Iterable[nn.Module]) -> dict[int, Router]:
    """The routers of some stages by the number of their layer, `model.layers.7.mlp.gate`."""
    named = {name: m for stage in stages for name, m in stage.named_modules() if isinstance(m, Router)}
    return {int(name.split(".")[2]): router for name, router in named.items()}
