"""From what differs to where to look.

A step is a chain: activations, loss, gradients of activations, gradients of parameters, norm, update. What comes after
the first wrong link is wrong because of it, so only that link is told of, with the rule that governs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stretto.arguments.schema import Arguments
from stretto.distributed import AdamW, clip_factor, grad_norm
from stretto.distributed.bucket import Bucket
from stretto.distributed.partial import sum_partial_gradients
from stretto.params import ParamSpec, fill
from stretto.tensor_parallel import (
    ColumnParallelLinear,
    HeadLoss,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    copy_to,
    gather_sequence,
    reduce_from,
    scatter_sequence,
)
from stretto.train.step import evaluate
from stretto.verify.compare import Comparison, Difference, Kind
from stretto.verify.places import Place, line_of

_ENTERS = (ColumnParallelLinear, VocabParallelHead)
_LEAVES = (RowParallelLinear, VocabParallelEmbedding)
_NAMED = 3


def where_to_look(found: Comparison, args: Arguments, places: Mapping[str, Place]) -> list[str]:
    """What the first wrong link of the chain is, in paragraphs; nothing when all is equal.

    `places` are those of the run's parameters and activations.
    """
    d = _Diagnosis(found, args, places)
    links = (d.initial, d.forward, d.loss, d.backward, d.gradients, d.norm, d.update, d.evaluation, d.later_steps)
    return next((lines for link in (*links, d.replicas) if (lines := link())), [])


@dataclass(frozen=True)
class _Diagnosis:
    found: Comparison
    args: Arguments
    places: Mapping[str, Place]

    def initial(self) -> list[str]:
        wrong = self._wrong("initial weight", step=0)
        if not wrong:
            return []
        return [
            f"The two draw different initial weights: {_names(wrong)}. A value is a function of seed, name and place "
            f"in the whole tensor: {_at(fill)}. It is {self._place(wrong[0].quantity.of)}."
        ]

    def forward(self) -> list[str]:
        first, before = self.found.first("activation")
        if first is None:
            return []
        place = self.places[first.quantity.of]
        said = f"Forward, the first module that differs is {first.quantity.of}, by {first.error:.1e}"
        right = f"; all is equal up to {before.quantity.of}" if before else ""
        return [f"{said}{right}.", f"It is a {place.source}{self._border(place, backward=False)}."]

    def loss(self) -> list[str]:
        wrong = self._wrong("loss")
        if not wrong:
            return []
        return [
            f"All activations are equal, but not the loss{_times(wrong[0])}. Look at what follows them: the logits and "
            f"their cross-entropy, {_at(HeadLoss)}, the loss mask, and the count of valid tokens of the whole global "
            "batch, by which every rank divides."
        ]

    def backward(self) -> list[str]:
        first, before = self.found.first("activation gradient")
        if first is None:
            return []
        said = "Forward all is equal. Backward, the first gradient that differs is that of the output of "
        said += f"{first.quantity.of}, by {first.error:.1e}{_times(first)}"
        if before is None:  # head and loss are one operation, whose logits never exist together
            head = Place("lm_head", VocabParallelHead)
            return [
                f"{said}, the last of the model.",
                f"So look at the backward of the loss: {head.module} is a {head.source}"
                f"{self._border(head, backward=True)}; then come the gradients of its logits, {_at(HeadLoss)}.",
            ]
        user = self.places[before.quantity.of]
        return [
            f"{said}; that of {before.quantity.of} is still equal.",
            f"So look at the backward of what lies between: {user.module} is a {user.source}"
            f"{self._border(user, backward=True)}.",
        ]

    def gradients(self) -> list[str]:
        wrong = self._wrong("gradient")
        rules = dict.fromkeys(self._summed(d.quantity.of) for d in wrong)
        alike = [[d for d in wrong if self._summed(d.quantity.of) == rule] for rule in rules]
        return [
            f"Activations and their gradients are equal, but not the gradient of {_names(some)}, by "
            f"{some[0].error:.1e}{_times(some[0])}. {some[0].quantity.of} is {self._place(some[0].quantity.of)}."
            f"{self._undeclared(some[0].quantity.of)}"
            for some in alike[:_NAMED]
        ]

    def norm(self) -> list[str]:
        wrong = self._wrong("gradient norm")
        if not wrong:
            return []
        return [
            f"All gradients are equal, but not their norm{_times(wrong[0])}. Of the ranks that hold a block one counts "
            f"it: {_at(ParamSpec.owned)}, {_at(grad_norm)}."
        ]

    def update(self) -> list[str]:
        wrong = self._wrong("update")
        if not wrong:
            return []
        return [
            f"Gradients and their norm are equal, but not the update of {_names(wrong)}: look at "
            f"{_at(clip_factor)} and {_at(AdamW)}."
        ]

    def evaluation(self) -> list[str]:
        wrong = self._wrong("evaluation")
        return (
            [f"The step is equal, but not the evaluation{_times(wrong[0])}: look at {_at(evaluate)}."] if wrong else []
        )

    def later_steps(self) -> list[str]:
        if not self.found.failures:
            return []
        worst = self.found.failures[0]
        return [
            f"The first step is equal; later ones are not, worst of all {worst.name}. Look at what a step leaves "
            f"behind: the moments of {_at(AdamW)}, gradients that are not forgotten by {_at(Bucket.zero)}, parameters "
            "that do not follow their masters."
        ]

    def replicas(self) -> list[str]:
        if not self.found.unequal:
            return []
        name = self.found.unequal[0].partition("/")[2]
        return [
            f"Ranks that should hold the same bits do not: {_some(self.found.unequal)}. {name} is {self._place(name)}."
        ]

    def _wrong(self, kind: Kind, step: int = 1) -> list[Difference]:
        return [d for d in self.found.failures if d.quantity.kind == kind and d.quantity.step == step]

    def _border(self, place: Place, *, backward: bool) -> str:
        """The collective that stands before or after the module, with that of its backward."""
        tp, sp = self.args.parallel.tp, self.args.parallel.sequence_parallel
        if tp == 1 or not issubclass(place.kind, _ENTERS + _LEAVES):
            return ""
        if issubclass(place.kind, _ENTERS):
            way, does, undoes = (
                (gather_sequence, "an all-gather", "a reduce-scatter") if sp else (copy_to, "nothing", "an all-reduce")
            )
            where = "Its input comes"
        else:
            way, does, undoes = (
                (scatter_sequence, "a reduce-scatter", "an all-gather")
                if sp
                else (reduce_from, "an all-reduce", "nothing")
            )
            where = "Its output goes"
        now = f"in whose backward {undoes} is done" if backward else f"in which {does} is done"
        return f". {where} through {_at(way)}, {now} over tp={tp}"

    def _place(self, name: str) -> str:
        """How a parameter lies on the ranks, where that is declared, and who sums its gradient."""
        place, sizes = self.places[name], self._sizes
        cuts = [
            f"cut along dim {s.dim} over {s.axis}={sizes[s.axis]}" + (f" in {s.copies} copies" if s.copies > 1 else "")
            for s in _spec(place).shard
            if sizes[s.axis] > 1
        ]
        held = ", ".join(cuts) or ("whole on each of the tp ranks" if sizes["tp"] > 1 else "whole")
        return f"{held}, declared in {place.source}; its gradient is {self._summed(name)}"

    def _summed(self, name: str) -> str:
        """Over what the gradient of a parameter is summed, and where."""
        spec, sizes = _spec(self.places[name]), self._sizes
        parts = [f"{a}={sizes[a]}" for a in spec.sum_grad if sizes[a] > 1]
        replicas = [f"{a}={sizes[a]}" for a in spec.replicas if sizes[a] > 1]
        sums = [f"a part on each rank of {', '.join(parts)}, which {_at(sum_partial_gradients)} adds up"] * bool(parts)
        sums += [f"summed over {', '.join(replicas)} by {_at(Bucket)}"] * bool(replicas)
        return "; ".join(sums) or "whole on each rank, so nobody sums it"

    def _undeclared(self, name: str) -> str:
        """What speaks against a declaration by which every tensor-parallel rank has the whole gradient."""
        spec = _spec(self.places[name])
        cut = any(s.axis == "tp" for s in spec.shard) or "tp" in spec.sum_grad
        if cut or self._sizes["tp"] == 1 or not any(each.partition("/")[2] == name for each in self.found.unequal):
            return ""
        return " Yet its replicas differ: where each rank has a part of it, sum_grad of its ParamSpec must name tp."

    @property
    def _sizes(self) -> dict[str, int]:
        p = self.args.parallel
        return {"tp": p.tp, "cp": p.cp, "dp": p.dp or 1, "embed": p.pp}


def _spec(place: Place) -> ParamSpec:
    assert place.spec is not None, f"{place.module} is an activation"
    return place.spec


def _at(thing: type | object) -> str:
    return f"{getattr(thing, '__qualname__', thing)} ({line_of(thing)})"


def _names(wrong: Sequence[Difference]) -> str:
    return _some([d.quantity.of for d in wrong])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _times(d: Difference) -> str:
    return "" if d.factor is None else f" (it is {d.factor:.4g} times what it should be)"
