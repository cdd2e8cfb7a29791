"""The kernel of AdamW: on a GPU, and anywhere else in Triton's interpreter.

Faults to catch: the end of a vector that is not a whole block left out; what lies behind a vector written; a moment
that changes by the other's rate; weights that do not follow their masters; moments written with the weights alone.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")

from stretto.distributed import AdamWRule
from stretto.distributed.rules import adamw, adamw_weights
from stretto.kernels.hand_written import kernels

pytestmark = [pytest.mark.gloo, pytest.mark.gpu] if torch.cuda.is_available() else pytest.mark.gloo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULE = AdamWRule((0.9, 0.95), 1e-8, 0.1)


def drawn(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def vectors(size: int) -> list[Tensor]:
    """Master, gradient and both moments."""
    return [drawn(size, 1), drawn(size, 2), drawn(size, 3) / 10, drawn(size, 4).square()]


def numbers(dtype: torch.dtype, step: int = 3) -> list[Tensor]:
    return [torch.tensor(x, dtype=dtype, device=DEVICE) for x in (0.7, *RULE.numbers(1e-2, step, 0.1))]


def update(master: Tensor, rounded: Tensor | None, grad: Tensor, *state: Tensor) -> None:
    kernels()[adamw].run(master, rounded, grad, *state, *numbers(torch.float32), *RULE.constants)


@pytest.mark.parametrize("size", [1, 7, 1024, 3000])
@pytest.mark.parametrize("narrow", [False, True])
def test_it_is_the_formula(size: int, narrow: bool) -> None:
    """And leaves what lies behind a vector as it is."""
    whole = vectors(size + 5)
    rounded = torch.full((size + 5,), 9.0, dtype=torch.bfloat16, device=DEVICE) if narrow else None
    before = [x.clone() for x in whole]
    exact = [x[:size].double() for x in whole]
    adamw(exact[0], None, *exact[1:], *numbers(torch.float64), *RULE.constants)
    master, *rest = (x[:size] for x in whole)
    update(master, None if rounded is None else rounded[:size], *rest)
    for found, wanted, old in zip(whole, exact, before, strict=True):
        torch.testing.assert_close(found[:size].double(), wanted, rtol=2e-6, atol=1e-8)
        assert torch.equal(found[size:], old[size:])
    if rounded is not None:
        assert (rounded[:size].double() - exact[0]).norm() <= 2**-7 * exact[0].norm()
        assert (rounded[size:] == 9.0).all()


@pytest.mark.parametrize("size", [7, 1024, 3000])
def test_weights_alone_are_those_of_the_whole_update_to_the_bit(size: int) -> None:
    found, wanted = (torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    master, *rest = vectors(size)
    before = [x.clone() for x in (master, *rest)]
    kernels()[adamw_weights].run(master, found, *rest, *numbers(torch.float32), *RULE.constants)
    assert all(torch.equal(a, b) for a, b in zip((master, *rest), before, strict=True))
    update(master, wanted, *rest)
    assert torch.equal(found, wanted)


def test_updates_are_those_of_torch() -> None:
    weight = drawn(2500, 1).requires_grad_()
    theirs = torch.optim.AdamW([weight], lr=1e-2, betas=RULE.betas, eps=RULE.eps, weight_decay=0.1)
    master, first, second = weight.detach().clone(), *torch.zeros(2, 2500, device=DEVICE)
    for step in range(1, 6):
        weight.grad = drawn(2500, 10 + step)
        of = [torch.tensor(x, device=DEVICE) for x in (1.0, *RULE.numbers(1e-2, step, 0.1))]
        kernels()[adamw].run(master, None, weight.grad.clone(), first, second, *of, *RULE.constants)
        theirs.step()
    torch.testing.assert_close(master, weight.detach(), rtol=1e-5, atol=1e-7)


@given(size=some.integers(2, 3000), data=some.data())
def test_bits_are_the_same_wherever_vectors_are_cut(size: int, data: some.DataObject) -> None:
    cut = data.draw(some.integers(1, size - 1))
    whole, parts = [[*vectors(size), torch.empty(size, dtype=torch.bfloat16, device=DEVICE)] for _ in range(2)]
    for each, part in ((whole, slice(size)), (parts, slice(cut)), (parts, slice(cut, size))):
        master, grad, first, second, rounded = (x[part] for x in each)
        update(master, rounded, grad, first, second)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_it_takes_what_the_optimizer_gives() -> None:
    """On a GPU; moments in bf16 come through another function, and fp64 is the compiler's."""
    given_ = [*vectors(8), *numbers(torch.float32), *RULE.constants]
    given_.insert(1, torch.empty(8, dtype=torch.bfloat16))
    kernel = kernels()[adamw]
    with patch.object(Tensor, "is_cuda", True):
        assert kernel.takes(given_)
        assert kernel.takes([given_[0], None, *given_[2:]])
        assert not kernel.takes([x.double() if isinstance(x, Tensor) else x for x in given_])
        assert not kernel.takes([x[:0] if isinstance(x, Tensor) and x.dim() else x for x in given_])
