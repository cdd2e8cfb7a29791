"""P1 for embedding, head and cross-entropy with the vocabulary cut, also where ranks hold no word at all.

Faults to catch: tokens of other ranks looked up in row 0; the shift by the maximum of this rank alone; the exponentials
not summed over the ranks; the label's logit not summed over the ranks; padding that takes part; a gradient without the
label's one subtracted; a piece of the logits whose gradient of the weight overwrites that of the piece before; a
gradient that does not see what follows the loss; a second derivative that is silently incomplete.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tensor_parallel_full import compare, draw, full_grads, mine, set_full
from torch import Tensor, nn
from torch.nn import functional as F

from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init
from stretto.tensor_parallel import (
    Build,
    VocabParallelEmbedding,
    VocabParallelHead,
    declare_norm,
    vocab_parallel_cross_entropy,
    vocab_spec,
)
from stretto.tensor_parallel.cross_entropy import HeadLoss
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

S, B, H = 12, 2, 6


class Ends(nn.Module):
    """The two ends of a language model, with a norm between them."""

    def __init__(self, vocab: int, tied: bool, build: Build) -> None:
        super().__init__()
        spec = vocab_spec(vocab, H, Init(std=1.0), tied=tied)
        self.embed = VocabParallelEmbedding(spec, build)
        self.norm = declare_norm(nn.LayerNorm(H, dtype=build.dtype), sequence_parallel=build.sequence_parallel)
        self.head = VocabParallelHead(spec, build, self.embed.weight if tied else None)

    def forward(self, tokens: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return self.head.loss(self.norm(self.embed(tokens)), labels, weights)


@pytest.mark.parametrize("tp", [1, 2, 3, pytest.param(4, marks=pytest.mark.nightly)])
def test_loss_and_gradients_equal_plain_torch(pool: Pool, tp: int) -> None:
    pool.run(tp, _ends)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_huge_logits_stay_finite_and_right(pool: Pool, tp: int) -> None:
    """Logits of +-10,000, where an exponential without the shift overflows; in fp64, fp32 and bf16."""
    pool.run(tp, _stability)


@pytest.mark.parametrize("tp", [1, 2])
def test_narrow_logits_are_added_up_in_fp32(pool: Pool, tp: int) -> None:
    """A thousand equal logits in bf16: the sum of exponentials would stop at 256."""
    for loss in pool.run(tp, _many_equal):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, torch.full_like(loss, 1000.0).log(), rtol=1e-6, atol=0)


def test_a_second_derivative_is_rejected() -> None:
    """The backward's own derivative would lack the softmax's part, and nobody would know."""
    logits = torch.randn(3, 1, 8, requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.zeros(3, 1).long(), Axis.single("tp"), start=0, rows=8)
    (grad,) = torch.autograd.grad(loss.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_input_of_the_loss_stays_as_it_is() -> None:
    logits = torch.randn(3, 1, 8, dtype=torch.float64)
    before = logits.clone()
    vocab_parallel_cross_entropy(logits, torch.zeros(3, 1).long(), Axis.single("tp"), start=0, rows=8)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("rows", "limit", "taken"), [(12, 6, 6), (12, 5, 4), (12, 7, 6), (11, 5, 4), (11, 1, 1)])
def test_pieces_are_alike_where_that_costs_little(rows: int, limit: int, taken: int) -> None:
    """Catches: a last piece shorter than it need be; pieces above the limit; a prime number taken one by one."""
    measure = HeadLoss(Build(Axis.single("tp"), False, torch.float64), 0, 8, limit=limit * 2 * 8 * 8)
    assert measure.chunk(torch.empty(rows, 2, 4, dtype=torch.float64), torch.empty(8, 4)) == taken


def _ends(world: World) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        tp = state.axis("tp")
        # One row of logits at a time, five rows or so of the smallest vocabulary, all at once.
        for vocab, tied, sp, limit in product((5, 32, 101), (False, True), (False, True), (1, 700, 2**28)):
            what = f"vocab={vocab} tied={tied} sp={sp} limit={limit}"
            tokens, labels = (torch.randint(vocab, (B, S), generator=_seeded(n)) for n in (1, 2))
            dy = draw((S, B), "dy")
            plain, wanted = _plain(vocab, tied, tokens, labels, 2 * dy)
            model = Ends(vocab, tied, Build(tp, sp, torch.float64))
            set_full(model)
            model.head.measure.limit = limit
            loss = model(tokens, labels, dy.t())
            (2 * loss).backward()
            compare(what, {"loss": loss.detach()}, {"loss": plain})
            compare(what, full_grads(model, tp), wanted)
            _held_rows(model, vocab, tp)


def _plain(vocab: int, tied: bool, tokens: Tensor, labels: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    names = ["embed.weight", *([] if tied else ["head.weight"])]
    w = {name: draw((vocab, H), name).requires_grad_() for name in names}
    w |= {name: draw((H,), name).requires_grad_() for name in ("norm.weight", "norm.bias")}
    x = F.layer_norm(w["embed.weight"][tokens.t()], (H,), w["norm.weight"], w["norm.bias"])
    logits = x @ w[names[-1]].t()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.t().flatten(), reduction="none").view(S, B)
    return (loss * dy).detach().sum() / 2, dict(zip(w, torch.autograd.grad(loss, list(w.values()), dy), strict=True))


def _held_rows(model: Ends, vocab: int, tp: Axis) -> None:
    """The awkward sizes are awkward: on four ranks, three hold nothing of five words."""
    logits = model.head(mine(draw((S, B, H), "h"), tp, model.head.build.sequence_parallel))
    assert logits.isfinite().sum() == S * B * model.head.rows
    if vocab == 5 and tp.rank > 0:
        assert model.head.rows == 0
    if vocab == 101 and tp.size == 4:
        assert (model.head.start, model.head.rows) == (32 * tp.rank, 5 if tp.rank == 3 else 32)


def _stability(world: World) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        tp, vocab = state.axis("tp"), 40
        logits, labels = draw((S, B, vocab), "logits", scale=1e4), torch.randint(vocab, (S, B), generator=_seeded(1))
        logits[0] = 1e4  # all equal
        logits[1] = -1e4
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
            full = logits.to(dtype).double().clone().requires_grad_()
            plain = F.cross_entropy(full.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
            plain.sum().backward()
            n = vocab // tp.size
            part = slice(tp.rank * n, (tp.rank + 1) * n)
            local = logits.to(dtype)[..., part].clone().requires_grad_()
            loss = vocab_parallel_cross_entropy(local, labels, tp, start=part.start, rows=n)
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
            compare(str(dtype), {"loss": loss.detach().double()}, {"loss": plain.detach()}, min(tolerance, 1e-6))
            loss.sum().backward()
            assert local.grad.dtype == dtype
            compare(str(dtype), {"grad": local.grad.double()}, {"grad": full.grad[..., part]}, tolerance)


def _many_equal(world: World) -> Tensor:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        n = 1000 // world.size
        logits = torch.full((3, 2, n), 7.0, dtype=torch.bfloat16)
        labels = torch.full((3, 2), 999)
        return vocab_parallel_cross_entropy(logits, labels, state.axis("tp"), start=world.rank * n, rows=n)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
