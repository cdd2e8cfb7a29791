"""A sparse feed-forward block: each token through the few experts that its router chooses, [s(/t), b, h] -> the same.

The tokens of all ranks of a pipeline stage are different ones: under sequence parallelism as they are, else the
ranks of tp share them. Experts that every token goes through are a dense block beside, computed while tokens travel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stretto.arguments.schema import ModelConfig
from stretto.collectives import nothing
from stretto.experts.dispatch import Dispatch
from stretto.experts.grouped import GroupedLinear, Joined
from stretto.experts.nodes import enter, receive, regathered, weigh
from stretto.experts.output import combine, give_back
from stretto.experts.parts import Others, Own
from stretto.experts.plan import Sorting
from stretto.experts.router import Router
from stretto.experts.rows import RowOps
from stretto.experts.run import Pause, Run, Stop, finish
from stretto.experts.tokens import mine, share, unshare
from stretto.params import Init, ParamSpec, Shard
from stretto.streams import Stream
from stretto.structure import Structure
from stretto.tensor_parallel import Build, Lazy, Pointwise, declare_on, replicated


class Experts(nn.Module):
    """The routed experts that this rank holds: one matrix for gate and up of all of them, one for down."""

    def __init__(self, config: ModelConfig, build: Build, activation: Pointwise, *, out_init: Init) -> None:
        super().__init__()
        ep, h, f = build.experts.ep, config.hidden, config.dim_expert
        local = config.experts // ep.size
        here = range(ep.rank * local, (ep.rank + 1) * local)
        inward = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
        into = Init(std=config.init_std)

        def spec(name: str, shape: tuple[int, ...], dim: int | None, init: Init) -> ParamSpec:
            return ParamSpec(
                shape,
                init,
                shard=() if dim is None else (Shard("etp", dim),),
                sum_grad=("etp",) if dim is None else (),  # one of its ranks adds it
                replicas=("edp",),
                apart=("pp", "ep"),
                weight_decay=len(shape) > 1,
                part=name,
            )

        up, down = [f"{e}.{name}" for e in here for name in inward], [f"{e}.down_proj" for e in here]
        up_biases = [spec(name, (f,), 0, Init()) for name in up] if config.bias else []
        down_biases = [spec(name, (h,), None, Init()) for name in down] if config.bias else []
        self.activation = activation
        fp8 = build.experts_fp8
        self.gate_up_proj = GroupedLinear(
            [spec(name, (f, h), 0, into) for name in up], up_biases, local, build, column=True, fp8=fp8
        )
        self.down_proj = GroupedLinear(
            [spec(name, (h, f), 1, out_init) for name in down], down_biases, local, build, column=False, fp8=fp8
        )


class SparseFeedForward(nn.Module):
    """`shared` makes the dense block of an inner size that every token goes through."""

    def __init__(
        self,
        config: ModelConfig,
        build: Build,
        activation: Pointwise,
        shared: Callable[[int], nn.Module],
        *,
        out_init: Init,
    ) -> None:
        super().__init__()
        self.config, self.build, self.rows = config, build, RowOps.of(build)
        self.gate = Router(config, build)
        self.experts = Experts(config, build, activation, out_init=out_init)
        self.shared_experts: nn.Module | None = None
        self.shared_expert_gate: SharedGate | None = None
        if config.shared_ffn:
            self.shared_experts = shared(config.shared_ffn)
            if config.shared_gate:
                self.shared_expert_gate = SharedGate(config, build)

    def forward(self, x: Tensor, structure: Structure | None = None) -> Tensor:
        return finish(self.run(x, structure))

    def run(self, x: Tensor, structure: Structure | None = None, beside: Stream = Stream()) -> Run:  # noqa: B008
        """The forward, which can be left at each `Stop`; what it sends passes `beside` what is computed meanwhile."""
        build, tp = self.build, self.build.tp
        flat = x.reshape(-1, x.shape[-1])
        shared_out = not build.sequence_parallel and tp.size > 1
        tokens = share(flat, tp) if shared_out else flat
        part = tp.rank if build.sequence_parallel else 0
        real = None if structure is None else structure.holds_tokens(part, x.shape[0], x.shape[1], x.device)
        if shared_out and real is not None:
            real = real[mine(len(flat), tp)]
        dispatch = Dispatch(build.experts, self.rows, beside)
        tokens, entered = enter(tokens, dispatch)
        choice = self.gate(tokens, (x.shape[0], x.shape[1]), real, structure)
        of, number = self.experts, self.config.experts
        sorting = dispatch.sorting = Sorting(choice.experts, number, build.experts, choice.kept, beside, self.rows)
        weighed = weigh(choice.weights, dispatch)
        own, others = Own(dispatch), [Others(dispatch)] * dispatch.exchanges
        into, out_of = Joined(1 + len(others)), Joined(1 + len(others))
        flush = nothing if build.accumulators is None or not others else build.accumulators.flush
        rows: Tensor | Lazy
        if of.activation.recompute and not others:
            beside_them, rows = self._shared(x, structure), regathered(entered, tokens, dispatch)
        else:
            if others:
                dispatch.offer(tokens)
            yield Pause(Stop.SORTED, entered)
            sorting.ask()
            yield Pause(Stop.ASKED, entered)
            rows = receive(entered, tokens, own, flush)  # the device moves them while the host sends
            if others:
                dispatch.send()
            beside_them = self._shared(x, structure)
            yield Pause(Stop.SENT, entered)
        own_gate_up = of.gate_up_proj(rows, own.segments, into)
        for away in others:
            dispatch.tell()
            gate_up = of.gate_up_proj(receive(entered, tokens, away, flush), away.segments, into)
            weighed = give_back(gate_up, weighed, of.down_proj, of.activation, away, out_of)
            del gate_up
            yield Pause(Stop.COMPUTED, weighed)
            away.give()
        given = give_back(own_gate_up, weighed, of.down_proj, of.activation, own, out_of)
        yield Pause(Stop.GIVEN, given)
        out = combine(given, choice.weights, dispatch)
        if shared_out:
            out = unshare(out, tp, flat.shape[0])
        out = out.view_as(x)
        return out if beside_them is None else out + beside_them

    def _shared(self, x: Tensor, structure: Structure | None) -> Tensor | None:
        """What the shared experts give, times their gate where they have one."""
        if self.shared_experts is None:
            return None
        y: Tensor = self.shared_experts(x, structure)
        return y if self.shared_expert_gate is None else y * self.shared_expert_gate(x)


class SharedGate(nn.Module):
    """How much of the shared experts a token gets: sigmoid of one number, [s(/t), b, h] -> [s(/t), b, 1]."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        spec = replicated(
            (1, config.hidden),
            Init(std=config.init_std),
            sequence_parallel=build.sequence_parallel,
            weight_decay=True,
        )
        self.weight = declare_on(self, "weight", spec, build)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(torch.nn.functional.linear(x, self.weight))
