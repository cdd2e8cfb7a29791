"""Plain data parallelism: every rank holds whole parameters, and gradients are summed in buckets.

It answers the three verbs of the schedule. `reduce(stage)` is all that makes overlap: it stands before the stage's
last backward, and from then on each bucket leaves as its last gradient arrives.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from stretto.distributed.bucket import Bucket, fill_buckets
from stretto.distributed.main_gradients import MainGradients
from stretto.distributed.partial import sum_partial_gradients
from stretto.parallel_state import ParallelState
from stretto.params import Declared, collect


class DataParallel:
    """The weights of this rank's stages: buckets, and the hooks that fill them.

    `stages` maps the number of each stage on this rank to its module; `direct` is what its layers were built with,
    if they add weight gradients up themselves. Raises ValueError for undeclared parameters, and for two copies of one
    logical tensor, such as a tied embedding, in stages of this rank.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        state: ParallelState,
        *,
        bucket_mb: float = 25.0,
        direct: MainGradients | None = None,
    ) -> None:
        self.state = state
        self.declared: tuple[Declared, ...] = ()
        self.buckets: dict[int, list[Bucket]] = {}
        for stage, module in stages.items():
            here: tuple[Declared, ...] = self.declared
            declared = collect(module, elsewhere={known.param for known in here})
            axis_of = {d.replicas: state.axis(*d.replicas) for d in declared}
            self.declared += declared
            self.buckets[stage] = fill_buckets(declared, axis_of, int(bucket_mb * 2**20))
        holders = Counter(part.name for d in self.declared for part in d.logical)
        if twice := [name for name, count in holders.items() if count > 1]:
            raise ValueError(
                f"{', '.join(twice)} lies on this rank twice, in stages of their own: nothing adds the gradients of "
                "its copies; place the stages that share it on different ranks, or in one stage"
            )
        self._home = {item.param: b for b in self.all_buckets for item in b.items}
        self._unsent: deque[Bucket] = deque()
        self._main_gradients = MainGradients() if direct is None else direct
        self._main_gradients.bind(self._home, self._send_full)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for p in self._home
        ]

    @property
    def all_buckets(self) -> list[Bucket]:
        """The buckets of every stage on this rank."""
        return [bucket for buckets in self.buckets.values() for bucket in buckets]

    def unshard(self, stage: int) -> None:
        """Nothing to do: parameters are whole."""

    def reshard(self, stage: int) -> None:
        """Nothing to do: parameters stay whole."""

    def reduce(self, stage: int) -> None:
        """The next backward of the stage is its last of this step: buckets leave as they fill."""
        self._main_gradients.flush()  # of an earlier backward: not among the last ones
        # Where weight gradients of the stage wait for a W that comes next, all others came with the last I.
        here = {param for bucket in self.buckets[stage] for param in bucket.params}
        waiting = here & self._main_gradients.deferred.weights()
        for bucket in self.buckets[stage]:
            bucket.arm(waiting or None)
            self._unsent.append(bucket)
        self._send_full()

    def finish(self) -> None:
        """Wait for the reductions, then sum what replicated parameters hold parts of. Gradients are whole after it.

        A bucket that did not fill in the last backward, or was never armed, leaves only now: right, but not
        overlapped. Raises RuntimeError naming parameters that got no gradient in the whole step.
        """
        self._main_gradients.flush()
        missing = [name for bucket in self.all_buckets for name in bucket.missing]
        if missing:
            raise RuntimeError(
                f"no gradient reached {', '.join(missing)}: the loss does not depend on them; "
                "remove them from the module or use them in its forward"
            )
        for bucket in dict.fromkeys((*self._unsent, *self.all_buckets)):
            if not bucket.sent:
                bucket.send()
        self._unsent.clear()
        for bucket in self.all_buckets:
            bucket.wait()
        sum_partial_gradients(self.declared, self.grad, self.state)

    def grad(self, param: nn.Parameter) -> Tensor:
        """The accumulated gradient of a stored parameter."""
        bucket = self._home[param]
        return bucket.view(bucket.grads, param)

    def bucket_of(self, param: nn.Parameter) -> Bucket:
        """Where a stored parameter lies."""
        return self._home[param]

    def zero(self) -> None:
        """Begin a step."""
        self._unsent.clear()
        self._main_gradients.forget()
        for bucket in self.all_buckets:
            bucket.zero()

    def position(self, axes: Sequence[str] = ("tp", "cp", "dp", "embed")) -> dict[str, int]:
        """This rank's place on the axes along which parameters may be repeated."""
        return {name: self.state.axis(name).rank for name in axes}

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, param: nn.Parameter) -> None:
        """Take the gradient that autograd just finished for `param`."""
        grad = param.grad
        if grad is None:  # autograd ran the hook, but the layer put its gradient off, or added it up itself
            return
        bucket = self._home[param]
        bucket.add(param, lambda total, first_microbatch: total.copy_(grad) if first_microbatch else total.add_(grad))
        param.grad = None
        bucket.arrived(param)
        self._send_full()

    def _send_full(self) -> None:
        """Send what is full, in the one order that all ranks share.

        Ranks whose graphs differ fill their buckets in different orders, and sums of different buckets must not meet.
        """
        while self._unsent and self._unsent[0].full:
            self._unsent.popleft().send()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
