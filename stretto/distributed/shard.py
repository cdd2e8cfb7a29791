"""Any module in an ordinary loop, in the place of `DistributedDataParallel` or `fully_shard`.

    with shard(model, state, sharding="fsdp") as sharded:
        optimizer = sharded.optimizer(AdamW(weight_decay=0.1), clip_grad=1.0)
        for x in batches:                      # each rank its own
            model(x).backward()
            norm = optimizer.step(lr=3e-4)

The gradient is the mean over the ranks of that of each rank's loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from stretto.distributed.alike import align_copies, apart_along, require_alike, warn_of_batch_norm
from stretto.distributed.data_parallel import DataParallel
from stretto.distributed.dropout import number_rows, warn_of_dropout
from stretto.distributed.foreign_optimizer import UPDATES
from stretto.distributed.handed_over import require_own
from stretto.distributed.norm import clip_factor, grad_norm
from stretto.distributed.optimizer import Optimizer
from stretto.distributed.replicate import FROZEN, declare_rest, undeclared
from stretto.distributed.stand_in import StandIn
from stretto.parallel_state import ParallelState
from stretto.params import Slice
from stretto.schedule.sharding import MODES

LOOKS: Final = 8
"""Steps between two looks at weights that have masters beside them: whether somebody has written to `param.data`."""


class Sharded(DataParallel):
    """A module whose sums begin by themselves; made by `shard`."""

    def __init__(self, module: nn.Module, state: ParallelState, mode: str, microbatches: int, **options: Any) -> None:
        super().__init__({0: module}, state, sharding=MODES[mode], **options)
        self.module, self.microbatches = module, microbatches
        self._backwards = 0
        self._added = False
        """Whether a backward added something since the last forward began."""
        self._announced = False
        """Whether a sum is to follow what is added next."""
        self._forward = module.register_forward_pre_hook(self._begins)
        self._stand_ins = {p: StandIn(p) for p in self._home if p.requires_grad}
        """What `param.grad` is after a backward."""
        self._hooks += [p.register_hook(partial(self._arrives, p)) for p in self._stand_ins]  # type: ignore[no-untyped-call]

    def optimizer(self, make: Callable[[DataParallel], Optimizer], *, clip_grad: float = 0.0) -> SteppingOptimizer:
        """What updates the module after its last backward of a step; `make` is `stretto.AdamW(...)`, say."""
        return SteppingOptimizer(self, make(self), clip_grad)

    def number(self, rows: range | Tensor) -> None:
        """Which rows of the run the next forward has, int64 [b]: what `stretto.Dropout` draws by."""
        number_rows(self.module, rows)

    def close(self) -> None:
        super().close()
        self._forward.remove()

    def zero(self) -> None:
        super().zero()
        self._take_stand_ins_away()
        self._backwards = 0
        self._added = self._announced = False

    def _take_stand_ins_away(self) -> None:
        for param in self._stand_ins:
            param.grad = None

    @staticmethod
    def _arrives(param: nn.Parameter, _grad: Tensor) -> None:
        """Autograd is about to add a gradient to what `param.grad` is."""
        param.grad = None

    def _begins(self, _module: nn.Module, _args: Any) -> None:
        """A forward: what its backward adds is summed, after each where gradients are sharded, else after the last.

        Several forwards may have one backward, and several backwards may follow several forwards.
        """
        if torch.is_grad_enabled():
            if self._added:
                self._take_stand_ins_away()
            self._backwards += self._added
            self._announced &= not (self._added and self._each)
            self._added = False
            if self._backwards >= self.microbatches:
                raise RuntimeError(
                    f"a forward begins, but the {self._backwards} backward(s) of this step were not followed by an "
                    f"update: {UPDATES}; or say shard(microbatches=) where a step has more backwards"
                )
            if not self._announced and (self._each or self._backwards == self.microbatches - 1):
                self._announced = True
                self.reduce(0)

    def _arrived(self, param: nn.Parameter) -> None:
        self._added = True
        bucket = self._home[param]
        if bucket.sharding.grads and bucket.sent and param.grad is not None:  # of one more backward
            self.reduce(0)
        super()._arrived(param)
        param.grad = self._stand_ins[param]


class SteppingOptimizer:
    """`step(lr)` once all backwards of a step are done."""

    def __init__(self, weights: Sharded, inner: Optimizer, clip_grad: float) -> None:
        self.weights, self.inner, self.clip_grad = weights, inner, clip_grad

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Finish the sums, clip, update, and begin a step. Returns the gradient's norm [], before clipping."""
        self.weights.finish()
        if self.weights.lent or self.inner.steps % LOOKS == 0:
            self.inner.require_own_weights()
            self.weights.lent = False
        ranks = self.weights.state.axis("dp", "cp").size
        norm = grad_norm(self.weights) / ranks
        factor = clip_factor(norm, self.clip_grad)
        self.inner.step(lr, (torch.ones_like(norm) if factor is None else factor) / ranks)
        self.weights.zero()
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what backwards have added since the last update, as a loop does that leaves rows out: all ranks
        together. After `step` there is nothing to forget."""
        del set_to_none  # which torch's has
        self.weights.forget()

    def slices(self) -> list[Slice]:
        """Masters and state of this rank, which `save_checkpoint` writes and `load_checkpoint` fills, in any mode."""
        return self.inner.slices()

    def loaded(self, steps: int) -> None:
        """The slices were filled from a checkpoint of so many steps: the module's weights follow."""
        self.inner.loaded(steps)


def shard(
    module: nn.Module,
    state: ParallelState,
    *,
    sharding: str = "fsdp",
    microbatches: int = 1,
    bucket_mb: float = 25.0,
    keep: int = 0,
    allow_unused: bool = False,
) -> Sharded:
    """Spread `module` over the data-parallel ranks of `state`; its parameters stay the same objects.

    Parameters that were not declared count as whole on the ranks of all other axes; matrices are decayed, vectors not.
    All ranks take the values of parameters and buffers of the first.

    Args:
        sharding: none, zero1, zero2 or fsdp, as in `--sharding`.
        microbatches: backwards of a step.
        bucket_mb: gradients that are reduced at once.
        keep: with fsdp, how many last blocks stay whole from forward to backward.
        allow_unused: a parameter that no backward of a step reaches on this rank has gradient 0 there, as where only
            some rows, and so some ranks, use it; otherwise that is an error, which names it.

    Raises:
        ValueError: no such sharding or number, or nothing to train; a module that is handed over already, or that has
            other weights on ranks that count as copies.
    """
    if sharding not in MODES:
        raise ValueError(f"sharding={sharding!r}: take one of {', '.join(MODES)}")
    if microbatches < 1 or bucket_mb <= 0 or keep < 0:
        raise ValueError(
            f"microbatches={microbatches}, bucket_mb={bucket_mb}, keep={keep}: a step has a backward or more, a bucket "
            "more than nothing, and no fewer than 0 blocks stay whole"
        )
    require_own([module])
    unknown, apart = undeclared(module), apart_along(module, state.axis("pp"))
    declare_rest(module, apart)
    if unknown:
        others = [name for name in ("tp", "pp") if state.axis(name).size > 1]
        say = logging.getLogger(__name__).warning if others else logging.getLogger(__name__).info
        say("%d parameters without a declared place count as whole on every rank", len(unknown))
    if not any(param.requires_grad for param in module.parameters()):
        raise ValueError(FROZEN)
    align_copies(module, state)
    require_alike(unknown, [state.axis(name) for name in ("tp", "pp") if name not in apart])
    if state.world.rank == 0:
        warn_of_dropout(module)
        warn_of_batch_norm(module)
    made = Sharded(module, state, sharding, microbatches, bucket_mb=bucket_mb, keep=keep)
    made.allow_unused = allow_unused
    return made
