"""Any modules as the stages of a pipeline, under any schedule: for models of one's own, without the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from stretto.deferred import Deferred
from stretto.pipeline_parallel.executor import Executor, OwnWeights
from stretto.pipeline_parallel.link import Link
from stretto.pipeline_parallel.meta import Boundary, EachBoundary, TensorMeta
from stretto.pipeline_parallel.stage import Stage
from stretto.schedule import Schedule, lower
from stretto.schedule.generators import forward_only
from stretto.world import Axis


class Pipeline:
    """The stages of this rank, and a step over them.

        pipeline = Pipeline(make, schedule_for("zbv", 2, 8), axis, TensorMeta((4, 64), torch.float32))
        loss = pipeline.step(microbatches)           # gradients are in the parameters' .grad

    `make(s)` is the module of stage s, of those that the schedule places on this rank. It is called as
    `module(x, microbatch)`, x None on the first stage and else of `boundary`: a tensor, or a tuple of them, of any
    dtypes; `boundary(stage, microbatch)` where they differ. The last returns the scalar loss. All ranks know the
    microbatches. Integers, and what is marked `gradient=False`, have no gradient. With `check_finite` NaN or infinity
    is a FloatingPointError whose note names the action. Where
    the schedule splits backwards, the weights of `nn.Linear` wait for W; all other gradients come with I. Raises
    ValueError for a schedule of another number of ranks, and for a boundary that is none.
    """

    def __init__(
        self,
        make: Callable[[int], nn.Module],
        schedule: Schedule,
        axis: Axis,
        boundary: Boundary | Callable[[int, Any], Boundary],
        device: torch.device | str = "cpu",
        *,
        check_finite: bool = False,
    ) -> None:
        if (ranks := len(schedule.ranks)) != axis.size:
            raise ValueError(f"the schedule is one of {ranks} ranks, but {axis} has {axis.size}: make it for as many")
        said = boundary if isinstance(boundary, tuple) else (boundary,)
        if not callable(boundary) and not all(isinstance(each, TensorMeta) for each in said):
            raise ValueError(f"boundary={boundary}: say a TensorMeta(shape, dtype), a tuple of them, or a function")
        self.deferred = Deferred()
        mine = [stage for stage, rank in enumerate(schedule.placement) if rank == axis.rank]
        self.modules = {stage: defer_linear(make(stage), self.deferred) for stage in mine}
        """By stage; their parameters are those to optimize."""
        last = schedule.num_stages - 1

        def entering(s: int) -> EachBoundary | None:
            if not 0 < s <= last:
                return None
            return boundary if isinstance(boundary, TensorMeta | tuple) else partial(boundary, s)

        stages = {
            s: Stage(s, module, entering(s), self.deferred, entering(s + 1)) for s, module in self.modules.items()
        }
        link = Link(axis, torch.device(device))
        self.executor = Executor(lower(schedule), axis.rank, stages, link, OwnWeights())
        self.executor.check_finite = check_finite
        self._forwards: dict[int, Executor] = {}

    def parameters(self) -> list[nn.Parameter]:
        """Of all stages on this rank."""
        return [p for module in self.modules.values() for p in module.parameters()]

    def step(self, microbatches: Sequence[Any]) -> Tensor:
        """Forwards and backwards of all microbatches: the sum of the losses on the rank of the last stage, else 0."""
        if not torch.is_grad_enabled():
            raise RuntimeError("a step has backwards, and gradients are off: evaluate(microbatches) has forwards alone")
        return self.executor.step(microbatches)

    def evaluate(self, microbatches: Sequence[Any]) -> Tensor:
        """Forwards alone, of any number of microbatches, without gradients: the sum of the losses, as of a step."""
        if (m := len(microbatches)) not in self._forwards:
            program = self.executor.program
            forwards = forward_only(program.num_ranks, m, program.placement)
            self._forwards[m] = self.executor.playing(lower(forwards))
        with torch.no_grad():
            return self._forwards[m].step(microbatches)


def defer_linear(module: nn.Module, deferred: Deferred) -> nn.Module:
    """Let the gradients of the weights of every `nn.Linear` in `module` wait for the W of a split backward."""
    for each in module.modules():
        if type(each) is nn.Linear:
            each.forward = partial(_linear, each, deferred)  # type: ignore[method-assign]
    return module


def _linear(layer: nn.Linear, deferred: Deferred, x: Tensor) -> Tensor:
    y: Tensor = _Linear.apply(x, layer.weight, deferred)  # type: ignore[no-untyped-call]
    bias = cast("Tensor | None", layer.bias)
    return y if bias is None else y + bias


class _Linear(Function):
    """y = x w^T: x [.., d_in], w [d_out, d_in] -> [.., d_out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, deferred: Deferred) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.deferred = weight, deferred  # of a checkpoint, what is saved is a copy, whose gradient is lost
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dw = ctx.deferred.gradient(ctx.weight, partial(_wgrad, dy, x)) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def _wgrad(dy: Tensor, x: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
