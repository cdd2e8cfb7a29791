"""Where the time of a step goes, from the kernels of a trace. Never imports torch.

Every instant of the step belongs to one item, so the items sum to the step: what several kernels do at once counts
for the first of products, attention, optimizer, elementwise, communication; what none does is a gap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

Spans = list[tuple[float, float]]

ITEMS = (
    "matmul ceiling",
    "small shapes",
    "attention",
    "elementwise",
    "exposed communication",
    "bubble",
    "optimizer",
    "launch and host gaps",
)

_PATTERNS = MappingProxyType(
    {
        "communication": re.compile(r"nccl|nvshmem|PtoP", re.I),
        "attention": re.compile(r"sdpa|flash|fmha|attention", re.I),
        "product": re.compile(r"gemm|nvjet|cublas|cutlass|xmma|splitk|triton_tem", re.I),
        "optimizer": re.compile(r"adam|multi_tensor_apply", re.I),
    }
)
_ORDER = ("product", "attention", "optimizer", "elementwise", "communication")


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy of a trace; milliseconds."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """The class of a kernel by its name.

    A fused kernel of Inductor carries the names of the operations around it, `attention` among them, and is
    elementwise all the same, unless it is made from a template of a product.
    """
    if name.startswith("triton_") and not name.startswith("triton_tem"):
        return "elementwise"
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(name)), "elementwise")


def kinds(kernels: Sequence[Kernel]) -> list[str]:
    """The class of each kernel of one step.

    What follows the last product and attention belongs to the optimizer (norm, clipping, rounding of weights), but
    for the gradient of the embedding. A few small kernels of the first layer's backward may be counted with it.
    """
    found = [kind_of(kernel.name) for kernel in kernels]
    last = max((k.end for k, kind in zip(kernels, found, strict=True) if kind in ("product", "attention")), default=0.0)
    return [
        "optimizer"
        if kind == "elementwise" and k.start >= last and last and not re.search("embedding|index", k.name, re.I)
        else kind
        for k, kind in zip(kernels, found, strict=True)
    ]


@dataclass(frozen=True)
class Waterfall:
    """Milliseconds of each of `ITEMS`; `step` is the time of a step without a profiler."""

    items: dict[str, float]
    step: float

    @property
    def total(self) -> float:
        """Of the items: the step under the profiler."""
        return sum(self.items.values())

    @property
    def off(self) -> float:
        """By how much of the step the items miss it."""
        return abs(self.total - self.step) / self.step

    @property
    def holds(self) -> bool:
        """Whether the items sum to the step within 2 %."""
        return self.off <= 0.02


def waterfall(
    kernels: Sequence[Kernel],
    window: tuple[float, float],
    *,
    step: float,
    product_flops: float,
    tflops: float,
    pipeline: bool,
) -> Waterfall:
    """Of one step's kernels within `window`.

    Args:
        kernels: of this rank, in any order; what lies outside of `window` is left out.
        window: milliseconds, from the end of the step before to the end of this one.
        step: milliseconds of a step without a profiler.
        product_flops: operations of this rank's products.
        tflops: the best measured rate of a product: what the time of the products is split by.
        pipeline: whether the other ranks are other stages: who waits for them is in the bubble.
    """
    spans: dict[str, Spans] = {kind: [] for kind in _ORDER}
    for kernel, kind in zip(kernels, kinds(kernels), strict=True):
        span = (max(kernel.start, window[0]), min(kernel.end, window[1]))
        if span[0] < span[1]:
            spans[kind].append(span)
    taken: Spans = []
    exposed: dict[str, float] = {}
    for kind in _ORDER:
        union = merge([*taken, *spans[kind]])
        exposed[kind] = length(union) - length(taken)
        taken = union
    ideal = min(product_flops / (tflops * 1e12) * 1e3, exposed["product"])
    values = (
        ideal,
        exposed["product"] - ideal,
        exposed["attention"],
        exposed["elementwise"],
        0.0 if pipeline else exposed["communication"],
        exposed["communication"] if pipeline else 0.0,
        exposed["optimizer"],
        window[1] - window[0] - length(taken),
    )
    return Waterfall(dict(zip(ITEMS, values, strict=True)), step)


def merge(spans: Iterable[tuple[float, float]]) -> Spans:
    """The union of spans, as disjoint ones in order."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: Iterable[tuple[float, float]]) -> float:
    """The sum of the lengths of disjoint spans."""
    return sum(end - start for start, end in spans)
