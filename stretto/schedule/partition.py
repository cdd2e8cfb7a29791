"""Which layers each stage holds."""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import isfinite


def partition(
    layers: int,
    stages: int,
    *,
    explicit: tuple[int, ...] | None = None,
    embedding: float = 0.0,
    head: float = 0.0,
) -> tuple[range, ...]:
    """The layers of each stage, as ranges of global layer numbers: each layer once, in order.

    The first stage also holds the embedding and the last one the head, at these costs in units of one
    layer. The most costly stage is as cheap as can be, then the next most costly, and so on. Where stages
    tie, the layer goes to a middle stage, the later the better (earlier stages keep more activations),
    then to the first, then to the last (it computes the logits). Stages may be empty.
    `explicit` gives the number of layers of each stage instead. `ValueError` if it does not add up.
    """
    if layers < 0 or stages < 1:
        raise ValueError(f"cannot place {layers} layers on {stages} stages: need layers >= 0 and stages >= 1")
    if not all(isfinite(c) and c >= 0 for c in (embedding, head)):
        raise ValueError(f"costs must be finite and not negative, got embedding={embedding}, head={head}")
    balanced = _balanced(layers, stages, embedding, head)
    if explicit is not None:
        _check_explicit(layers, explicit, balanced)
    counts = balanced if explicit is None else explicit
    return tuple(range(a, b) for a, b in pairwise(accumulate(counts, initial=0)))


def _balanced(layers: int, stages: int, embedding: float, head: float) -> tuple[int, ...]:
    counts = [0] * stages
    extra = [0.0] * stages
    extra[0] += embedding
    extra[-1] += head
    preference = [*range(stages - 2, 0, -1), 0, stages - 1]
    # Layers cost the same, so giving each to the cheapest stage so far is optimal. Rounded: costs that
    # differ by floating-point noise alone are a tie.
    for _ in range(layers):
        cheapest = min(preference, key=lambda stage: round(counts[stage] + extra[stage], 9))
        counts[cheapest] += 1
    return tuple(counts)


def _check_explicit(layers: int, explicit: tuple[int, ...], balanced: tuple[int, ...]) -> None:
    wrong = []
    if len(explicit) != len(balanced):
        wrong.append(f"it names {len(explicit)} stages, the pipeline has {len(balanced)}")
    if sum(explicit) != layers:
        wrong.append(f"it sums to {sum(explicit)}, the model has {layers} layers")
    if any(count < 0 for count in explicit):
        wrong.append("a stage cannot hold fewer than 0 layers")
    if wrong:
        raise ValueError(f"layers per stage {list(explicit)}: {'; '.join(wrong)}; {list(balanced)} would do")
