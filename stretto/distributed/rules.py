"""Update rules: how a master moves, given its gradient. They know vectors, and nothing of where these lie.

A rule names the state that it keeps beside each master, in its shape, and has one function that moves all in place, in
one pass over memory where it is fused. Numbers that change from step to step are tensors [] in the dtype of the master:
as Python's they would be compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor


class Rule(Protocol):
    """`update(master, rounded, grad, *state, scale, *numbers, *constants)`, in place; `rounded`, if any, gets
    the rounded master, and `scale` multiplies the gradient."""

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the state, as in checkpoints."""

    @property
    def weight_decay(self) -> float:
        """Of what is decayed, where nothing else is said."""

    @property
    def constants(self) -> tuple[Any, ...]:
        """Numbers that never change."""

    @property
    def update(self) -> Callable[..., None]:
        """The function."""

    def numbers(self, lr: float, step: int, decay: float) -> tuple[float, ...]:
        """What changes, in update number `step`, counted from 1."""


@dataclass(frozen=True)
class AdamWRule:
    """Decoupled weight decay (Loshchilov and Hutter, 2019)."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float

    state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    @property
    def update(self) -> Callable[..., None]:
        return adamw

    @property
    def constants(self) -> tuple[Any, ...]:
        return self.betas, self.eps

    def numbers(self, lr: float, step: int, decay: float) -> tuple[float, ...]:
        return 1 - lr * decay, lr / (1 - self.betas[0] ** step), 1 - self.betas[1] ** step


@dataclass(frozen=True)
class SGDRule:
    """Gradient descent with momentum (Polyak, 1964), and the decay added to the gradient, as in `torch.optim.SGD`."""

    momentum: float
    weight_decay: float

    state: ClassVar[tuple[str, ...]] = ("momentum",)

    @property
    def update(self) -> Callable[..., None]:
        return _sgd

    @property
    def constants(self) -> tuple[Any, ...]:
        return (self.momentum,)

    def numbers(self, lr: float, step: int, decay: float) -> tuple[float, ...]:
        del step
        return lr, decay


@dataclass(frozen=True)
class LionRule:
    """The sign of an interpolated momentum (Chen et al., 2023, algorithm 2), with decoupled weight decay."""

    betas: tuple[float, float]
    weight_decay: float

    state: ClassVar[tuple[str, ...]] = ("exp_avg",)

    @property
    def update(self) -> Callable[..., None]:
        return _lion

    @property
    def constants(self) -> tuple[Any, ...]:
        return (self.betas,)

    def numbers(self, lr: float, step: int, decay: float) -> tuple[float, ...]:
        del step
        return 1 - lr * decay, lr


@dataclass(frozen=True)
class MuonRule:
    """Matrices move along their orthogonalized momentum (Jordan et al., 2024), all else by `rest`.

    An update is scaled by 0.2 sqrt(max(rows, columns)), to the size of AdamW's (Liu et al., 2025): one learning rate
    and decay for both. `rest` keeps its first moment where matrices keep their momentum.
    """

    rest: AdamWRule
    momentum: float = 0.95
    iterations: int = 5
    """Of Newton-Schulz."""

    state: ClassVar[tuple[str, ...]] = ("exp_avg",)


def direction(momentum: Tensor, grad: Tensor, scale: Tensor, beta: float) -> Tensor:
    """Vectors [n]: the momentum with this gradient, in place; returns Nesterov's look ahead."""
    grad = grad * scale
    momentum.lerp_(grad, 1 - beta)
    return grad.lerp(momentum, beta)


def adamw(
    master: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    keep: Tensor,
    rate: Tensor,
    correction: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Vectors [n]: `keep` is 1 - lr * decay, `rate` lr / (1 - beta1^t), `correction` 1 - beta2^t."""
    grad = grad * scale
    first.lerp_(grad, 1 - betas[0])
    second.lerp_(grad * grad, 1 - betas[1])
    master.mul_(keep).sub_(rate * first / ((second / correction).sqrt() + eps))
    if rounded is not None:
        rounded.copy_(master)


def adamw_weights(master: Tensor, rounded: Tensor, grad: Tensor, first: Tensor, second: Tensor, *rest: Any) -> None:
    """`adamw`, of which `rounded` alone is written: what the weights will be."""
    adamw(master.clone(), rounded, grad, first.clone(), second.clone(), *rest)


def _sgd(
    master: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    velocity: Tensor,
    scale: Tensor,
    rate: Tensor,
    decay: Tensor,
    momentum: float,
) -> None:
    velocity.mul_(momentum).add_(grad * scale + decay * master)
    master.sub_(rate * velocity)
    if rounded is not None:
        rounded.copy_(master)


def _lion(
    master: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    first: Tensor,
    scale: Tensor,
    keep: Tensor,
    rate: Tensor,
    betas: tuple[float, float],
) -> None:
    grad = grad * scale
    master.mul_(keep).sub_(rate * (first * betas[0] + grad * (1 - betas[0])).sign())
    first.lerp_(grad, 1 - betas[1])
    if rounded is not None:
        rounded.copy_(master)


def rounding(update: Callable[..., None], states: int) -> Callable[..., None]:
    """`update` with state that is narrower than the masters: computed wide, rounded to nearest."""

    def rounded_update(master: Tensor, rounded: Tensor | None, grad: Tensor, *rest: Any) -> None:
        wide = [state.to(master.dtype) for state in rest[:states]]
        update(master, rounded, grad, *wide, *rest[states:])
        for state, new in zip(rest[:states], wide, strict=True):
            state.copy_(new)

    return rounded_update
