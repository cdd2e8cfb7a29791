"""Kernels of the loss over long rows: on a GPU, and anywhere else in Triton's interpreter.

Faults to catch: a sum that is not rescaled when a higher logit comes; words after the last whole group left out;
padding between rows that is written; the label of another rank that counts as word 0; the gradient of the cap lost.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")

from stretto.kernels import cross_entropy as by_hand
from stretto.kernels.hand_written import kernels
from stretto.params import Init
from stretto.tensor_parallel import Build, LossTerms, VocabParallelHead, vocab_spec
from stretto.tensor_parallel import loss_formulas as formula
from stretto.world import Axis

pytestmark = [pytest.mark.gloo, pytest.mark.gpu] if torch.cuda.is_available() else pytest.mark.gloo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PADDED = 7.0
"""What the columns after the last word hold, before and after."""


def rows_of(shape: tuple[int, ...], padding: int, scale: float, dtype: torch.dtype, seed: int = 7) -> Tensor:
    """Logits [.., words], whose rows lie further apart than they are long."""
    *rows, words = shape
    memory = torch.full((*rows, words + padding), PADDED, dtype=dtype, device=DEVICE)
    logits = memory[..., :words]
    logits.copy_(scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return logits


def close(found: Tensor, exact: Tensor, limit: float, least: float = 0.0) -> None:
    assert found.shape == exact.shape
    assert (found.double() - exact).norm() <= limit * exact.norm() + least


def compare(logits: Tensor, local: Tensor, mine: Tensor, terms: LossTerms, cap: float | None, limit: float) -> None:
    """Statistics and gradient of the kernels and of the formulas in fp64."""
    exact = logits.double()
    more = {"cap": cap, "smoothing": terms.smoothing}
    wanted = formula.statistics(exact, local, mine, **more)
    found = kernels()[formula.statistics].run(logits, local, mine, **more)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        close(one, other, 2e-6)
    # Of all ranks: higher, and more, than what is here.
    highest, exps = wanted[0] + 0.5, wanted[1] * 0.7 + 0.1
    dy = torch.randn(local.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    more |= {"z": terms.z, "vocab": terms.vocab}
    formula.gradient_(exact, local, mine, highest, exps, dy.double(), **more)
    kernels()[formula.gradient_].run(logits, local, mine, highest.float(), exps.float(), dy, **more)
    close(logits, exact, limit, 1e-6 * dy.norm().item())  # of probabilities that cancel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("terms", [LossTerms(), LossTerms(0.2, 1e-2, vocab=9000)])
@pytest.mark.parametrize(("words", "padding"), [(1, 0), (7, 1), (13, 0), (50, 6), (4096, 8), (9001, 7)])
def test_statistics_and_gradients(
    words: int, padding: int, terms: LossTerms, cap: float | None, dtype: torch.dtype
) -> None:
    """Of no whole group; of one block and of several; of rows that are aligned, and that are not."""
    logits = rows_of((3, 2, words), padding, 2.0, dtype)
    generator = torch.Generator().manual_seed(3)
    mine = (torch.rand(3, 2, generator=generator) < 0.7).to(DEVICE)
    local = torch.randint(words, (3, 2), generator=generator).to(DEVICE) * mine
    local[0, 0], mine[0, 0] = words - 1, True
    compare(logits, local, mine, terms, cap, 2e-6 if dtype == torch.float32 else 2**-7)
    if padding:
        memory = logits.as_strided((*logits.shape[:-1], padding), logits.stride(), words)
        assert (memory == PADDED).all()


@given(
    words=some.integers(1, 6000),
    rows=some.tuples(some.integers(1, 3), some.integers(1, 3)),
    padding=some.integers(0, 9),
    scale=some.sampled_from([0.0, 1.0, 1e3, 1e4]),
    wide=some.booleans(),
    seed=some.integers(0, 99),
)
def test_any_rows(words: int, rows: tuple[int, int], padding: int, scale: float, wide: bool, seed: int) -> None:
    logits = rows_of((*rows, words), padding, scale, torch.float32 if wide else torch.bfloat16, seed)
    local = torch.randint(words, rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    compare(logits, local, local % 3 != 0, LossTerms(0.1, vocab=words + 3), None, 2e-5 if wide else 2**-7)


def test_bits_follow_from_the_row_alone() -> None:
    """Whatever rows there are beside it. Catches: few rows that are read in other blocks."""
    logits = rows_of((9, 1, 5003), 5, 1.0, torch.bfloat16)
    local, mine = torch.zeros(9, 1, dtype=torch.long, device=DEVICE), torch.ones(9, 1, dtype=torch.bool, device=DEVICE)
    together = by_hand.statistics(logits, local, mine)
    for n in range(9):
        alone = by_hand.statistics(logits[n : n + 1], local[n : n + 1], mine[n : n + 1])
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other[n : n + 1])


def test_logits_that_are_minus_infinity_add_nothing() -> None:
    logits = rows_of((2, 1, 5000), 0, 1.0, torch.float32)
    logits[0, 0, 17:] = -torch.inf
    logits[1, 0, :4990] = -torch.inf
    local, mine = torch.tensor([[3], [4995]], device=DEVICE), torch.ones(2, 1, dtype=torch.bool, device=DEVICE)
    wanted = formula.statistics(logits.double(), local, mine)
    for one, other in zip(by_hand.statistics(logits, local, mine), wanted, strict=True):
        close(one, other, 1e-6)


def test_rows_at_unequal_distances_are_an_error() -> None:
    """Catches: a copy that gets the gradient."""
    logits = rows_of((4, 3, 8), 0, 1.0, torch.float32)[:, :2]
    local, mine = torch.zeros(4, 2, dtype=torch.long, device=DEVICE), torch.ones(4, 2, dtype=torch.bool, device=DEVICE)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        by_hand.statistics(logits, local, mine)


@pytest.mark.parametrize(
    ("dtype", "words", "batch", "taken"),
    [
        (torch.bfloat16, 13, 3, True),
        (torch.float32, 13, 1, True),
        (torch.float32, 0, 2, False),
        (torch.float64, 13, 2, False),
    ],
)
def test_the_head_computes_with_them(dtype: torch.dtype, words: int, batch: int, taken: bool) -> None:
    """Whatever its pieces, as torch does. Catches: what the head gives not taken, for its dtypes or how labels lie;
    fp64 taken, and a rank without words."""
    chosen = set()

    def fuse(function: Any) -> Any:
        of, bound = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
        if of not in (formula.statistics, formula.gradient_):
            return function

        def call(*tensors: Tensor) -> Any:
            with patch.object(Tensor, "is_cuda", True):  # as on a GPU
                chosen.add(takes := kernels()[of].takes([*tensors]))
            return kernels()[of].run(*tensors, **bound) if takes else function(*tensors)

        return call

    head = VocabParallelHead(
        vocab_spec(13, 8, Init(), tied=False), Build(Axis.single("tp"), False, dtype, DEVICE, fuse=fuse)
    )
    head.measure.rows = words
    with torch.no_grad():
        head.weight.normal_()
    x = torch.randn(5, batch, 8, dtype=dtype, device=DEVICE, requires_grad=True)
    labels, weights = torch.randint(13, (batch, 5), device=DEVICE), torch.rand(batch, 5, device=DEVICE).double()
    for rows in (1, 2, 5):
        head.measure.limit = rows * batch * head.weight.shape[0] * head.weight.element_size()
        loss = head.loss(x, labels, weights)
        dx, dw = torch.autograd.grad(loss, [x, head.weight])
        if not words:
            continue
        exact = [t.detach().double().requires_grad_() for t in (x, head.weight)]
        each = F.cross_entropy((exact[0] @ exact[1][:13].t()).flatten(0, 1), labels.t().flatten(), reduction="none")
        wanted = (each * weights.t().flatten()).sum()
        limit = 2e-2 if dtype == torch.bfloat16 else 1e-6
        close(loss, wanted, limit)
        for one, other in zip((dx, dw), torch.autograd.grad(wanted, exact), strict=True):
            close(one, other, limit)
        assert not dw[13:].any(), "padding"
    assert chosen == {taken}
