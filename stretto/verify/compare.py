"""Runs from the same weights and batches, held against each other tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stretto.batch import Batch
from stretto.verify.activations import Seen
from stretto.verify.session import Session, weights_in

TOLERANCE = {"fp64": 1e-10, "fp32": 3e-5}
"""Largest error of a tensor, relative to its largest element. In fp32 reordered sums give up to 5e-6 and real defects
0.1 and more."""

PROJECTED = 1e-12
"""The same of what must be equal to the last bit, where it is looked at by projections whose sums in fp64 are not."""

UPDATE_SLACK = 10.0
"""Updates may differ by so many times more: AdamW divides by the root of the second moment, and what is small in a
gradient's largest element is not small in its small ones. Gradients themselves have no slack; a wrong update is wrong
by 0.1 and more."""

MOMENTS_SLACK = 2.0**-6
"""How far updates may be apart after the first where moments are kept in bf16 and all else in fp32: a moment near the
middle of two numbers of bf16 goes to one of them or to the other, 2^-7 of it away."""

ROUNDING = {"bf16": 2.0**-8}
"""Where rounding is coarse a run is held against fp64, and may be twice as wrong as one process of its own dtype is;
an error below one rounding step, half of the last place, is none."""

ROUNDING_FP8 = 2.0**-4
"""The same of a run with GEMMs in fp8, of 3 bits of mantissa."""

Kind = Literal[
    "initial weight", "activation", "loss", "activation gradient", "gradient", "gradient norm", "update", "evaluation"
]


class Quantity(NamedTuple):
    """Something that both runs have at `step`, counted from 1 (0: before the first); `of` a module or a parameter."""

    step: int
    kind: Kind
    of: str = ""

    def __str__(self) -> str:
        return f"step {self.step} {self.kind} {self.of}".rstrip()


@dataclass(frozen=True)
class Difference:
    """One quantity in both runs, the relative error between them, and how large it may be."""

    quantity: Quantity
    error: float
    limit: float
    factor: float | None = None
    """By what the reference's must be multiplied to be this run's, where that explains the whole error."""

    @property
    def name(self) -> str:
        """The quantity in words: `step 1 gradient model.norm.weight`."""
        return str(self.quantity)

    @property
    def exceeds(self) -> bool:
        """Whether it is too large; a NaN is."""
        return not self.error <= self.limit

    @property
    def severity(self) -> float:
        """The error in limits; a NaN is worse than any number."""
        if self.limit == 0 or self.error != self.error:
            return torch.inf if self.exceeds else 0.0
        return self.error / self.limit


@dataclass(frozen=True)
class Trace:
    """What a run showed, step by step; of activations, what the first step showed."""

    initial: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    """The weights that it began from."""
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    evaluations: tuple[float, ...]
    """Loss of each step's batch after the step, as an evaluation computes it."""
    grads: tuple[Mapping[str, Tensor], ...]
    params: tuple[Mapping[str, Tensor], ...]
    unequal: tuple[str, ...]
    """Replicas that are not bitwise equal, on this rank."""
    seen: Seen


@dataclass(frozen=True)
class Comparison:
    """Every difference between a run and its reference.

    Those of activations are in forward order, those of their gradients in backward order.
    """

    differences: tuple[Difference, ...]
    unequal: tuple[str, ...]

    @property
    def failures(self) -> tuple[Difference, ...]:
        """The differences that are too large, worst first."""
        return tuple(sorted((d for d in self.differences if d.exceeds), key=lambda d: -d.severity))

    @property
    def equal(self) -> bool:
        """The verdict."""
        return not self.unequal and not any(d.exceeds for d in self.differences)

    def of(self, kind: Kind) -> list[Difference]:
        """The differences of one kind, in order."""
        return [d for d in self.differences if d.quantity.kind == kind]

    def first(self, kind: Kind) -> tuple[Difference | None, Difference | None]:
        """The first difference of a kind that is too large, and the one before it: None where there is none."""
        before = None
        for d in self.of(kind):
            if d.exceeds:
                return d, before
            before = d
        return None, before


def trace(session: Session, weights: Mapping[str, Tensor], batches: Sequence[Batch]) -> Trace:
    """Look at the weights as they are, then run one step per batch from `weights`."""
    initial = session.full_params()
    session.load_full(weights)
    losses: list[float] = []
    norms, evaluations, grads, params = [], [], [], []
    unequal: list[str] = []
    for batch in batches:
        loss, norm = session.step(batch, observe=not losses)
        losses.append(loss)
        norms.append(norm)
        grads.append(session.full_grads())
        state = session.full_state()
        params.append(weights_in(state))
        unequal += session.unequal_replicas(state)
        evaluations.append(session.evaluate(batch))
    return Trace(
        initial,
        weights,
        tuple(losses),
        tuple(norms),
        tuple(evaluations),
        tuple(grads),
        tuple(params),
        tuple(dict.fromkeys(unequal)),
        session.seen,
    )


def differences(one: Trace, other: Trace, *, ord: float = float("inf"), bits: bool = False) -> dict[Quantity, float]:
    """Relative errors of activations, losses, norms, gradients and updates.

    `ord` is the vector norm in which tensors are measured: the largest element shows a single wrong one, the 2-norm
    is steadier where rounding is coarse. Where all `bits` count an update has no grain. Raises ValueError when the two
    have different parameters.
    """
    # What one layout recomputes, and so never puts out, another may keep: a budget, or so many layers of each
    # stage, chooses other layers there.
    both = [n for n in one.seen.outputs if n in other.seen.outputs]
    forward = {n: one.seen.outputs[n] for n in both}
    # Where all in front of a module is frozen no gradient comes to it, unless it begins a stage.
    both = [n for n in one.seen.gradients if n in other.seen.gradients]
    backward = {n: one.seen.gradients[n] for n in reversed(both)}
    found = {Quantity(1, "activation", n): e for n, e in errors(forward, other.seen.outputs, ord=ord).items()}
    found |= {
        Quantity(1, "activation gradient", n): e for n, e in errors(backward, other.seen.gradients, ord=ord).items()
    }
    before = (one.start, other.start)
    for k, (grads, theirs) in enumerate(zip(one.grads, other.grads, strict=True)):
        _same("parameters", grads, theirs)
        step = k + 1
        found[Quantity(step, "loss")] = _ratio(abs(one.losses[k] - other.losses[k]), abs(one.losses[k]))
        found |= {Quantity(step, "gradient", n): e for n, e in errors(grads, theirs, ord=ord).items()}
        found[Quantity(step, "gradient norm")] = _ratio(abs(one.norms[k] - other.norms[k]), abs(one.norms[k]))
        updates = [
            {n: run.params[k][n].double() - was[n].double() for n in was}
            for run, was in zip((one, other), before, strict=True)
        ]
        # A weight cannot be told from one a unit in the last place away, nor can its update.
        grain = None if bits else {n: 2 * torch.finfo(w.dtype).eps * _norm(w, ord) for n, w in one.start.items()}
        found |= {Quantity(step, "update", n): e for n, e in errors(*updates, ord=ord, grain=grain).items()}
        evaluations = one.evaluations[k], other.evaluations[k]
        found[Quantity(step, "evaluation")] = _ratio(abs(evaluations[0] - evaluations[1]), abs(evaluations[0]))
        before = (one.params[k], other.params[k])
    return found


def factor(one: Trace, other: Trace, q: Quantity) -> float | None:
    """By what the quantity of `one` must be multiplied to be that of `other`; None where no number does it.

    A gradient that is summed once too often is tp or dp times what it should be: the number says which.
    """
    pair = [_value(run, q) for run in (one, other)]
    if pair[0] is None or pair[1] is None:
        return None
    a, b = pair[0].double().flatten(), pair[1].double().flatten()
    found = (torch.dot(a, b) / torch.dot(a, a)).item()
    return found if (b - found * a).norm() <= 0.01 * b.norm() and abs(found - 1) > 0.01 else None


def _value(run: Trace, q: Quantity) -> Tensor | None:
    k = q.step - 1
    match q.kind:
        case "loss":
            return torch.tensor([run.losses[k]])
        case "gradient norm":
            return torch.tensor([run.norms[k]])
        case "evaluation":
            return torch.tensor([run.evaluations[k]])
        case "gradient":
            return run.grads[k][q.of]
        case "activation gradient":
            return run.seen.gradients[q.of]
        case _:
            return None


def initial_differences(one: Trace, other: Trace) -> dict[Quantity, float]:
    """Relative errors of the initial weights."""
    _same("parameters", one.initial, other.initial)
    return {Quantity(0, "initial weight", n): e for n, e in errors(one.initial, other.initial).items()}


def errors(
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    *,
    ord: float = float("inf"),
    grain: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Norm of the difference of each tensor, beyond its `grain`, over its norm.

    A norm below a hundredth of the largest of all tensors counts as that: some gradients are zero but for rounding
    (softmax does not see a bias of the keys), and rounding over rounding says nothing.
    """
    size = {name: max(_norm(one[name], ord), _norm(other[name], ord)) for name in one}
    floor = 0.01 * max(size.values(), default=0.0)
    found = {}
    for name in one:
        apart = _norm(one[name].double() - other[name].double(), ord) - (grain[name] if grain else 0.0)
        # Not max(0, apart), which turns NaN into 0.
        found[name] = 0.0 if apart <= 0 else _ratio(apart, max(size[name], floor))
    return found


def _same(what: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    if set(one) != set(other):
        raise ValueError(f"the two runs have different {what}: {', '.join(sorted(set(one) ^ set(other)))}")


def _norm(x: Tensor, ord: float) -> float:
    return torch.linalg.vector_norm(x.double(), ord).item() if x.numel() else 0.0


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else difference
