"""Layers of experts that are compared: ours as the model has it, and three in plain PyTorch.

The plain ones have parameters in bf16 and let autograd compute and keep their gradients, in bf16. `grouped` follows
the order of torchtitan's layer: sort, gather, three grouped GEMMs, scores, scatter-add. Their routers' scores are in
bf16, so of tokens with scores that are nearly alike some go to other experts than ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.arguments.schema import ModelConfig
from stretto.experts import SparseFeedForward
from stretto.kernels import fused
from stretto.params import Init
from stretto.tensor_parallel import Build, Pointwise, formulas
from stretto.world import Axis


class Layer(Protocol):
    """One peer."""

    def begin(self) -> None:
        """A step begins: gradients are those of this one alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, h] -> [n, h]."""

    def gradients(self) -> dict[str, Tensor]:
        """Of the parameters, after a backward: router [E, h], gate_up [E, 2f, h], down [E, h, f]."""


def weights(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2f, h] and down [E, h, f] in bf16, the same for all peers."""
    torch.manual_seed(1)
    e, h, f = config.experts, config.hidden, config.dim_expert
    return tuple(0.02 * torch.randn(e, *of, device=device, dtype=torch.bfloat16) for of in ((2 * f, h), (h, f)))  # type: ignore[return-value]


class Sums:
    """Accumulators of one layer: fp32 totals of its weights."""

    def __init__(self) -> None:
        self.totals: dict[nn.Parameter, Tensor] = {}

    def expect(self, weight: nn.Parameter) -> None:
        self.totals[weight] = torch.zeros_like(weight, dtype=torch.float32)

    @torch.no_grad()
    def add(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        write(self.totals[weight], True)  # the one microbatch is the first

    defer = add_in_forward = add

    def flush(self) -> None:
        """Nothing is deferred on one rank."""

    def complete(self, weight: nn.Parameter) -> None:
        """Nothing is added in a forward here."""


class Ours:
    """`SparseFeedForward` with the kernels and accumulators that a run gives it."""

    def __init__(self, config: ModelConfig, router: Tensor, tokens: int, *, recompute: bool, compiled: bool) -> None:
        self.config, self.sums = config, Sums()
        build = Build(
            Axis.single("tp"),
            False,
            torch.bfloat16,
            router.device,
            recompute=recompute,
            accumulators=self.sums,
            tokens=tokens,
            **({"fuse": fused} if compiled else {}),  # type: ignore[arg-type]
        )
        activation = Pointwise.of(formulas.SWIGLU, build)
        self.layer = SparseFeedForward(config, build, activation, lambda _: nn.Identity(), out_init=Init(std=0.02))
        with torch.no_grad():
            self.layer.gate.weight.copy_(router)
            experts = self.layer.experts
            for held, value in zip(
                (experts.gate_up_proj, experts.down_proj), weights(config, router.device), strict=True
            ):
                held.weight.copy_(value.flatten(0, 1))

    def begin(self) -> None:
        """The first write of a step sets the totals."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x[:, None])
        return y.squeeze(1)

    def gradients(self) -> dict[str, Tensor]:
        experts, e = self.layer.experts, self.config.experts
        both = {"gate_up": experts.gate_up_proj.weight, "down": experts.down_proj.weight}
        found = {name: self.sums.totals[w].view(e, -1, w.shape[-1]) for name, w in both.items()}
        return found | {"router": self.sums.totals[self.layer.gate.weight]}


class Plain(nn.Module):
    """Parameters and router of the plain layers."""

    def __init__(self, config: ModelConfig, router: Tensor) -> None:
        super().__init__()
        gate_up, self.config = weights(config, router.device), config
        f = config.dim_expert
        self.router = nn.Parameter(router.clone())
        self.w1 = nn.Parameter(gate_up[0][:, :f].clone())
        self.w3 = nn.Parameter(gate_up[0][:, f:].clone())
        self.w2 = nn.Parameter(gate_up[1])

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [n, K] in fp32 and experts [n, K]."""
        scores = F.linear(x, self.router).float().softmax(-1)
        top, experts = scores.topk(self.config.top_k, -1)
        return (top / top.sum(-1, keepdim=True) if self.config.router_renormalize else top), experts

    def begin(self) -> None:
        for p in self.parameters():
            p.grad = None

    def gradients(self) -> dict[str, Tensor]:
        w1, w2, w3, router = (p.grad for p in (self.w1, self.w2, self.w3, self.router))
        assert w1 is not None
        assert w2 is not None
        assert w3 is not None
        assert router is not None
        return {"gate_up": torch.cat([w1, w3], 1), "down": w2, "router": router}


class Grouped(Plain):
    """By `grouped_mm` over sorted rows."""

    def forward(self, x: Tensor) -> Tensor:
        mm: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
        weights, experts = self.chosen(x)
        flat = experts.flatten()
        order = torch.argsort(flat, stable=True)
        e = self.config.experts
        ends = torch.histc(flat.float(), bins=e, min=0, max=e).cumsum(0).to(torch.int32)  # bincount is not compiled
        token = order // self.config.top_k
        rows = x.index_select(0, token)
        inner = F.silu(mm(rows, self.w1.transpose(1, 2), offs=ends)) * mm(rows, self.w3.transpose(1, 2), offs=ends)
        out = mm(inner, self.w2.transpose(1, 2), offs=ends)
        out = (out.float() * weights.flatten()[order, None]).to(x.dtype)
        return torch.zeros_like(x).scatter_add(0, token[:, None].expand(-1, x.shape[1]), out)


class Loop(Plain):
    """One expert after the other."""

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.chosen(x)
        total = torch.zeros_like(x)
        for e in range(self.config.experts):
            token, slot = torch.where(experts == e)
            rows = x[token]
            inner = F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e])
            out = F.linear(inner, self.w2[e]) * weights[token, slot, None]
            total.index_add_(0, token, out.to(x.dtype))
        return total


class Compiled:
    """A plain layer under `torch.compile`."""

    def __init__(self, inner: Plain) -> None:
        self.begin, self.gradients = inner.begin, inner.gradients
        self.forward = torch.compile(inner.forward, dynamic=False)


PEERS = ("stretto", "stretto-selective", "grouped-compiled", "grouped", "loop")


def made(name: str, config: ModelConfig, router: Tensor, tokens: int) -> Layer:
    """The peer of this name. Raises ValueError."""
    if name in ("stretto", "stretto-selective"):
        return Ours(config, router, tokens, recompute=name != "stretto", compiled=router.is_cuda)
    if name == "grouped-compiled":
        return Compiled(Grouped(config, router))
    if name in ("grouped", "loop"):
        return (Grouped if name == "grouped" else Loop)(config, router)
    raise ValueError(f"there are {', '.join(PEERS)}, not {name}")
