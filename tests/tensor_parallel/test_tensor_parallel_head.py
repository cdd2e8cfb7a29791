"""The head's loss makes its gradients in the forward, and adds its weight's up there.

Faults to catch: a microbatch whose gradient is lost when two go forward before one goes back; a gradient of the weight
that waits for the backward; a gradient of a multiple of the loss that is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.params import Init
from stretto.tensor_parallel import Build, VocabParallelHead, vocab_spec
from stretto.world import Axis

pytestmark = pytest.mark.gloo

VOCAB, HIDDEN, SEQ, ROWS = 13, 8, 6, 2
ALONE = Build(Axis.single("tp"), False, torch.float64)


class Sums:
    """Accumulators that note what they are asked, in order."""

    def __init__(self) -> None:
        self.totals: dict[nn.Parameter, Tensor] = {}
        self.asked: list[str] = []

    def expect(self, weight: nn.Parameter) -> None:
        assert weight not in self.totals
        self.asked.append("expect")

    def add_in_forward(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        self.asked.append("early")
        self._write(weight, write)

    def complete(self, weight: nn.Parameter) -> None:
        assert weight in self.totals
        self.asked.append("complete")

    def _write(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        first_microbatch = weight not in self.totals
        total = self.totals.setdefault(weight, torch.full_like(weight, torch.nan, requires_grad=False))
        write(total, first_microbatch)


def head(build: Build) -> VocabParallelHead:
    made = VocabParallelHead(vocab_spec(VOCAB, HIDDEN, Init(), tied=False), build)
    made.measure.limit = 2 * ROWS * made.weight.shape[0] * 8  # two positions at a time
    with torch.no_grad():
        made.weight.copy_(drawn(*made.weight.shape, seed=0))
    return made


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def microbatch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(seed))
    return drawn(SEQ, ROWS, HIDDEN, seed=seed).requires_grad_(), labels, drawn(ROWS, SEQ, seed=seed + 10).abs()


def wanted(weight: Tensor, x: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, by torch."""
    w, x = weight.detach()[:VOCAB].requires_grad_(), x.detach().requires_grad_()
    each = F.cross_entropy(F.linear(x, w).flatten(0, 1), labels.t().flatten(), reduction="none")
    (each * weights.t().flatten()).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return x.grad, w.grad


def test_microbatches_that_go_forward_together_add_up() -> None:
    """As in GPipe: both go forward before either goes back."""
    sums = Sums()
    made = head(replace(ALONE, accumulators=sums))
    batches = [microbatch(1), microbatch(2)]
    losses = [made.loss(*batch) for batch in batches]
    assert sums.asked == ["expect", "early", "early"]
    for loss in losses:
        loss.backward()
    assert sums.asked[3:] == ["complete", "complete"]
    exact = [wanted(made.weight, *batch) for batch in batches]
    for (x, _, _), (dx, _) in zip(batches, exact, strict=True):
        torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-14)
    total = sums.totals[made.weight]
    torch.testing.assert_close(total[:VOCAB], exact[0][1] + exact[1][1], rtol=1e-12, atol=1e-14)
    assert not total[VOCAB:].any()  # padding


def test_no_gradient_of_the_weight_waits_for_the_backward() -> None:
    made, saved = head(replace(ALONE, accumulators=Sums())), list[torch.Size]()

    def note(x: Tensor) -> Tensor:
        saved.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        made.loss(*microbatch(1))
    assert saved == [(SEQ, ROWS, HIDDEN)]


def test_without_gradients_nothing_is_added() -> None:
    sums = Sums()
    made = head(replace(ALONE, accumulators=sums))
    with torch.no_grad():
        made.loss(*microbatch(1))
    assert sums.asked == ["expect"]


@pytest.mark.parametrize("direct", [False, True])
def test_a_multiple_of_the_loss_is_exact_or_not_a_number(direct: bool) -> None:
    made = head(replace(ALONE, accumulators=Sums() if direct else None))
    x, labels, weights = microbatch(1)
    (2 * made.loss(x, labels, weights)).backward()
    assert x.grad is not None
    dx, dw = wanted(made.weight, x, labels, weights)
    if direct:
        assert x.grad.isnan().all()
    else:
        assert made.weight.grad is not None
        torch.testing.assert_close(x.grad, 2 * dx, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(made.weight.grad[:VOCAB], 2 * dw, rtol=1e-12, atol=1e-14)
