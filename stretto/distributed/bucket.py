"""A bucket: parameters that lie one behind the other in flat storage, reduced and updated as one.

The parameters become views of `weights` (their own dtype), and their gradients add up in `grads` (fp32, or fp64 for
fp64 parameters: 256 + 1 in bf16 would stay 256). One all-reduce moves them all; the optimizer sees two long vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from stretto.collectives import all_reduce_
from stretto.params import Declared
from stretto.world import Axis, Work

ALIGNMENT: Final = 64
"""Elements: every parameter begins at a multiple of 128 bytes at least, as matrix units and vector loads want."""


class Bucket:
    """Flat storage of some parameters of one stage with the same dtype, replicas and weight decay."""

    def __init__(self, items: Sequence[Declared], axis: Axis) -> None:
        """Move the parameters into flat storage. `axis` is what their gradients are reduced over."""
        self.items, self.axis = tuple(items), axis
        self.weight_decay = items[0].weight_decay
        first = items[0].param
        self.grad_dtype = torch.promote_types(first.dtype, torch.float32)
        self._spans: dict[nn.Parameter, tuple[int, int]] = {}
        end = 0
        for item in items:
            self._spans[item.param] = (end, end + item.param.numel())
            end += -(-item.param.numel() // ALIGNMENT) * ALIGNMENT
        self.weights = torch.zeros(end, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros(end, dtype=self.grad_dtype, device=first.device)
        for item in items:
            view = self.view(self.weights, item.param)
            view.copy_(item.param.data)
            item.param.data = view
        self._without = set(self._spans)  # no gradient in this step yet
        self._waiting: set[nn.Parameter] | None = None  # once armed: the last gradient still to come
        self.sent = False
        self._work: Work | None = None

    def view(self, flat: Tensor, param: nn.Parameter) -> Tensor:
        """The part of `flat` (weights, grads, a moment) that belongs to `param`, in its shape."""
        start, end = self._spans[param]
        return flat[start:end].view(param.shape)

    def add(self, param: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        """Let `write(total, first_microbatch)` add a gradient of `param`, or set it where it is the first of the step.

        Raises RuntimeError when the bucket has left: the gradient would be lost to the other ranks.
        """
        if self.sent:
            raise RuntimeError(
                f"a gradient of {self._name(param)} came after its bucket was sent: "
                "reduce(stage) must stand before the stage's last backward of the step, zero() before its first"
            )
        write(self.view(self.grads, param), param in self._without)
        self._without.discard(param)

    def arrived(self, param: nn.Parameter) -> None:
        """Every gradient of `param` in this backward was added."""
        if self._waiting is not None:
            self._waiting.discard(param)

    def arm(self, only: Container[nn.Parameter] | None = None) -> None:
        """The next gradient of each parameter is the last one, or of those among `only`: the others have theirs.

        Raises RuntimeError the second time in a step.
        """
        if self._waiting is not None:
            raise RuntimeError("reduce(stage) was called twice in one step: zero() must begin the next one")
        self._waiting = {p for p in self._spans if only is None or p in only}

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        """The parameters in it."""
        return tuple(self._spans)

    @property
    def full(self) -> bool:
        """Whether every last gradient is here."""
        return self._waiting is not None and not self._waiting

    @property
    def missing(self) -> list[str]:
        """Parameters that got no gradient in this step."""
        return [item.name for item in self.items if item.param in self._without]

    def send(self) -> None:
        """Begin to sum the gradients over the axis."""
        self.sent = True
        self._work = all_reduce_(self.grads, self.axis)

    def wait(self) -> None:
        """What follows sees the summed gradients."""
        if self._work is not None:
            self._work.wait()
        self._work = None

    def zero(self) -> None:
        """Forget the gradients: a new step begins. The first of each parameter is written over what is there."""
        self._without, self._waiting, self.sent = set(self._spans), None, False

    def _name(self, param: nn.Parameter) -> str:
        return next(item.name for item in self.items if item.param is param)


def fill_buckets(items: Sequence[Declared], axis_of: dict[tuple[str, ...], Axis], limit: int) -> list[Bucket]:
    """Cut the parameters of a stage into buckets of at most `limit` bytes of gradient (a larger one stands alone).

    `items` are in forward order; buckets are in the order in which a backward fills them. `axis_of` maps the
    replicas of a spec to the axis that they are reduced over.
    """
    place = {item: n for n, item in enumerate(items)}
    groups: list[list[Declared]] = []
    open_: dict[tuple[object, ...], list[Declared]] = {}
    for item in reversed(items):
        kind = (item.replicas, item.weight_decay, item.param.dtype)
        group = open_.get(kind)
        size = item.param.numel() + sum(i.param.numel() for i in group or ())
        if group is None or size * max(4, item.param.element_size()) > limit:
            group = open_[kind] = []
            groups.append(group)
        group.append(item)
    groups.sort(key=lambda group: -place[group[-1]])  # a bucket is full with its first parameter of the forward
    return [Bucket(group, axis_of[group[0].replicas]) for group in groups]
