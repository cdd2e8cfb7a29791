"""The terms of the loss over a cut vocabulary, fused and in pieces, against torch's own cross-entropy in fp64.

Faults to catch: smoothing over the words of one rank; the smoothed target left out of the gradient; a z-loss that
forgets the shift by the highest logit; a z-loss without its gradient; a label to be ignored that counts; terms that an
evaluation counts; losses of tokens whose gradient forgets what each weighs.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from tensor_parallel_full import compare, draw, full_grads, set_full
from torch import Tensor
from torch.nn import functional as F

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init
from stretto.tensor_parallel import Build, LossTerms, VocabParallelHead, vocab_parallel_cross_entropy, vocab_spec
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

S, B, H, VOCAB = 6, 2, 5, 53
IGNORE = -100
WEIGHED = draw((S, B), "dy")
CASES = [LossTerms(0.1), LossTerms(0.0, 1e-2), LossTerms(0.3, 1e-3, ignore=IGNORE), LossTerms(ignore=IGNORE)]


def by_torch(logits: Tensor, labels: Tensor, terms: LossTerms) -> Tensor:
    """[s, b]: what torch computes of all logits [s, b, V]."""
    flat, wanted = logits.flatten(0, 1), labels.flatten()
    ignore = -1 if terms.ignore is None else terms.ignore
    loss = F.cross_entropy(flat, wanted, label_smoothing=terms.smoothing, ignore_index=ignore, reduction="none")
    return (loss + terms.z * flat.logsumexp(-1).square() * (wanted != ignore)).view(labels.shape)


def labels_of(terms: LossTerms) -> Tensor:
    labels = torch.randint(VOCAB, (S, B), generator=torch.Generator().manual_seed(3))
    if terms.ignore is not None:
        labels[1:3, 1] = terms.ignore
    return labels


@pytest.mark.parametrize(
    "layout", [Layout.of(tp=3), *(pytest.param(Layout.of(tp=n), marks=pytest.mark.nightly) for n in (2, 8))]
)
def test_losses_and_gradients_equal_those_of_torch(pool: Pool, layout: Layout) -> None:
    pool.run(layout.world, _all_cases, layout)


def test_one_rank_equals_torch() -> None:
    _cases(Axis.single("tp"))


def test_an_evaluation_is_cross_entropy_alone() -> None:
    head, x, labels = _head(Axis.single("tp"), LossTerms(0.3, 1e-1)), draw((S, B, H), "x"), labels_of(LossTerms())
    with torch.no_grad():
        for found in (head.loss(x, labels.t(), WEIGHED.t()), (head.losses(x, labels.t()) * WEIGHED.t()).sum()):
            plain = (by_torch(x @ head.weight[:VOCAB].t(), labels, LossTerms()) * WEIGHED).sum()
            torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)


def test_smoothing_needs_to_know_the_whole_vocabulary() -> None:
    logits, labels = torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"smoothing=0.1 with vocab=0"):
        vocab_parallel_cross_entropy(logits, labels, Axis.single("tp"), start=0, rows=8, terms=LossTerms(0.1))


def _all_cases(world: World, layout: Layout) -> None:
    with ParallelState.build(layout, world) as state:
        _cases(state.axis("tp"))


def _cases(tp: Axis) -> None:
    # A weight of thousands makes logits of thousands: an exponential that is not shifted is infinite.
    for terms, scale, cap in product(CASES, (1.0, 1e3), (None, 5.0)):
        what, labels = f"{terms} x {scale} cap {cap}", labels_of(terms)
        x, w = (
            (draw(shape, n) * k).requires_grad_()
            for shape, n, k in (((S, B, H), "x", scale), ((VOCAB, H), "weight", 1))
        )
        logits = x @ w.t()
        plain = by_torch(logits if cap is None else cap * torch.tanh(logits / cap), labels, terms)
        wanted = dict(zip(("x", "weight"), torch.autograd.grad((plain * WEIGHED).sum(), [x, w]), strict=True))
        for each, limit in product((False, True), (1, 2**28)):
            head = _head(tp, terms, cap)
            head.measure.limit = limit
            entering = x.detach().requires_grad_()
            if each:
                losses = head.losses(entering, labels.t()).t()
                compare(what, {"losses": losses.detach()}, {"losses": plain.detach()})
                loss = (losses * WEIGHED).sum()
            else:
                loss = head.loss(entering, labels.t(), WEIGHED.t())
            loss.backward()
            compare(what, {"loss": loss.detach()}, {"loss": (plain.detach() * WEIGHED).sum()})
            assert entering.grad is not None
            compare(what, {"x": entering.grad, **full_grads(head, tp)}, wanted)
        if cap is None:
            _of_logits(tp, terms, labels, logits.detach(), plain.detach())


def _head(tp: Axis, terms: LossTerms, cap: float | None = None) -> VocabParallelHead:
    build = Build(tp, False, torch.float64)
    head = VocabParallelHead(vocab_spec(VOCAB, H, Init(std=1.0), tied=False), build, softcap=cap, terms=terms)
    set_full(head)
    return head


def _of_logits(tp: Axis, terms: LossTerms, labels: Tensor, logits: Tensor, plain: Tensor) -> None:
    """The loss of logits that are there, not contiguous, and padded by what must not count."""
    (want,) = torch.autograd.grad(by_torch(logits.requires_grad_(), labels, terms).sum(), [logits])
    rows = -(-VOCAB // tp.size)
    start, stop = min(tp.rank * rows, VOCAB), min((tp.rank + 1) * rows, VOCAB)
    padded = torch.full((S, rows + 3, B), 1e9, dtype=torch.float64)
    padded[:, : stop - start] = logits.detach()[..., start:stop].transpose(1, 2)
    local = padded.transpose(1, 2).requires_grad_()
    loss = vocab_parallel_cross_entropy(
        local, labels, tp, start=start, rows=stop - start, terms=replace(terms, vocab=VOCAB)
    )
    compare(str(terms), {"losses": loss.detach()}, {"losses": plain})
    loss.sum().backward()
    assert local.grad is not None
    compare(str(terms), {"logits": local.grad[..., : stop - start]}, {"logits": want[..., start:stop]})
    assert (local.grad[..., stop - start :] == 0).all(), "padding"
