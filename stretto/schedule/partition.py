"""Which layers each stage holds."""

from __future__ import annotations

from functools import cache
from itertools import accumulate, pairwise
from math import isfinite
from typing import Final

import numpy as np
from numpy.typing import NDArray

_EVEN: Final = 1e-9
"""Costs that differ by less are alike: floating-point noise."""
_CUT: Final = 1e-6
_TIE: Final = 1e-8
"""What a cut counts, and a place on a stage that others go before, of splits that are alike."""


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
    counts = balanced(layers, stages, (embedding, head))
    if explicit is not None:
        require_counts(layers, explicit, counts)
    return _ranges(tuple(map(int, counts if explicit is None else explicit)))


@cache
def _ranges(counts: tuple[int, ...]) -> tuple[range, ...]:
    return tuple(range(a, b) for a, b in pairwise(accumulate(counts, initial=0)))


def layers_of(text: str) -> tuple[float, ...]:
    """Layers of each stage, from Megatron-LM's compact form: `Et*3|(tt|)*29,t|L`.

    `|` ends a stage, `t` is a layer, `E` the embedding, `L` the loss with the head, `*n` repeats the letter or the
    group in parentheses before it, commas are for the eye. Beyond Megatron's letters `a` is the attention of a layer
    and `f` its feed-forward, which comes next: `Et*4a|ft*3L`. `ValueError` for what cannot be: an embedding that is
    not first, a loss that is not last, half of a layer without the other, another letter.
    """
    plain = _unfolded(text.replace(",", "").replace(" ", ""), text)
    stages = plain.split("|")
    if unknown := sorted(set(plain) - set("EtafL|")):
        further = "blocks of --mtp-layers lie before the head in any case: leave m out"
        what = further if "m" in unknown else "there are E, t, a, f, L, |, (), * and ,"
        raise ValueError(f"layout {text!r} has {' '.join(unknown)}: {what}")
    if plain.count("E") != 1 or not stages[0].startswith("E"):
        raise ValueError(f"layout {text!r} must begin with the embedding, E, and have no other")
    if plain.count("L") != 1 or not stages[-1].endswith("L"):
        raise ValueError(f"layout {text!r} must end with the loss, L, and have no other")
    if "a" in plain.replace("|", "").replace("af", "") or "f" in plain.replace("|", "").replace("af", ""):
        raise ValueError(f"layout {text!r}: behind each a, the attention of a layer, comes its f, the feed-forward")
    return tuple(stage.count("t") + (stage.count("a") + stage.count("f")) / 2 for stage in stages)


def _unfolded(text: str, whole: str) -> str:
    """Without parentheses and multipliers."""
    out, at = "", 0
    while at < len(text):
        if text[at] == "(":
            end = text.find(")", at)
            if end < 0 or "(" in text[at + 1 : end]:
                raise ValueError(f"layout {whole!r}: each ( needs its ), and none inside another")
            piece, at = _unfolded(text[at + 1 : end], whole), end + 1
        elif text[at] in ")*":
            raise ValueError(f"layout {whole!r}: nothing stands before {text[at]}")
        else:
            piece, at = text[at], at + 1
        if at < len(text) and text[at] == "*":
            digits = len(text[at + 1 :]) - len(text[at + 1 :].lstrip("0123456789"))
            if not 1 <= digits <= 6:
                raise ValueError(f"layout {whole!r}: a number must follow *")
            piece, at = piece * int(text[at + 1 : at + 1 + digits]), at + 1 + digits
        out += piece
    return out


@cache
def balanced(
    layers: int, stages: int, ends: tuple[float, float] = (0.0, 0.0), attention: float | None = None
) -> tuple[float, ...]:
    """How many layers each stage holds: whole ones, or halves where `attention` is what attention is of a layer.

    The most costly stage is as cheap as can be, then the sum of squares of all; `ends` are the costs of the embedding
    on the first stage and the head on the last. Where stages tie, see `partition`; of splits that are alike the one
    with fewer cuts.
    """
    share = attention or 0.0
    at = np.arange((layers if attention is None else 2 * layers) + 1)  # places where a stage may end
    before = at.astype(float) if attention is None else at // 2 + (at % 2) * share
    cut = (at % 2) * (0.0 if attention is None else _CUT)
    extra = np.zeros(stages)
    extra[0] += ends[0]
    extra[-1] += ends[1]
    most = _least_most(before, extra, share)
    tie = [_TIE * rank for rank in (stages - 1, *range(stages - 2, 0, -1), stages)] if stages > 1 else [0.0]
    best = np.where(at == 0, 0.0, np.inf)
    chosen = []
    for s in range(stages):
        found, taken = np.full(len(at), np.inf), np.zeros(len(at), int)
        for n in range(min(len(at) - 1, int(2 * most) + 2), -1, -1):
            cost = before[n:] - before[: len(at) - n] + extra[s]
            total = np.where(cost <= most + _EVEN, best[: len(at) - n] + cost**2 + cut[n:] + n * tie[s], np.inf)
            better = total < found[n:]
            found[n:][better], taken[n:][better] = total[better], n
        best = found
        chosen.append(taken)
    counts, end = [], len(at) - 1
    for taken in reversed(chosen):
        counts.append(int(taken[end]))
        end -= counts[-1]
    return tuple(n if attention is None else n / 2 for n in reversed(counts))


def _least_most(before: NDArray[np.float64], extra: NDArray[np.float64], attention: float) -> float:
    """The least that the most costly stage can cost."""
    whole = np.arange(int(before[-1] + 0.5) + 1)
    of_layers = (whole, whole + attention, whole + (1 - attention))
    costs = np.unique(np.concatenate([each + end for each in of_layers for end in {0.0, *extra.tolist()}]))
    costs = costs[costs >= extra.max()]
    low, high = 0, len(costs) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(before, extra, float(costs[middle])) else (middle + 1, high)
    return float(costs[low])


def _fits(before: NDArray[np.float64], extra: NDArray[np.float64], most: float) -> bool:
    """Whether all finds a place where no stage costs more."""
    at = 0
    for spent in extra:
        at = int(np.searchsorted(before, before[at] + most - spent + _EVEN, side="right")) - 1
    return at == len(before) - 1


def require_counts(layers: int, explicit: tuple[float, ...], good: tuple[float, ...]) -> None:
    """Raise ValueError for layers of each stage that do not add up, beside what would do."""
    wrong = []
    if len(explicit) != len(good):
        wrong.append(f"it names {len(explicit)} stages, the pipeline has {len(good)}")
    if sum(explicit) != layers:
        wrong.append(f"it sums to {sum(explicit):g}, the model has {layers} layers")
    if any(count < 0 for count in explicit):
        wrong.append("a stage cannot hold fewer than 0 layers")
    if wrong:
        said, do = (", ".join(f"{count:g}" for count in counts) for counts in (explicit, good))
        raise ValueError(f"layers per stage [{said}]: {'; '.join(wrong)}; [{do}] would do")
