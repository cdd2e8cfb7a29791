"""Functions by torch's compiler without its guards: the same results, for whatever sizes and constants they get.

Faults to catch: what is written in place not told to autograd; two arguments taken for one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stretto.kernels import compiled

pytestmark = pytest.mark.gloo


def scaled_(x: Tensor, y: Tensor, factor: int, *, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In place and as results."""
    x.mul_(factor)
    return x + y if more is None else x + y + more, (y * factor).sum(-1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_is_compiled_follows_from_the_arguments() -> None:
    """Catches: a constant, a word or a size of the first call in later ones; what is written in place left out, or not
    told to autograd; a gradient that is lost."""
    function = compiled(scaled_)
    calls: list[tuple[tuple[int, ...], int, bool]] = [((4, 8), 2, False), ((4, 8), 3, False), ((2, 8), 2, True)]
    for turn in range(2):  # compiled, and looked up
        for shape, factor, more in calls:
            x, y, z = (torch.randn(shape, generator=torch.Generator().manual_seed(turn + n)) for n in range(3))
            named = {"more": z} if more else {}
            mine = x.clone()
            results = function(mine, y, factor, **named)
            assert mine._version > 0
            wanted = scaled_(x, y, factor, **named)
            assert torch.equal(mine, x)
            for result, value in zip(results, wanted, strict=True):
                torch.testing.assert_close(result, value)
    w = torch.ones(4, 8, requires_grad=True)
    function(torch.ones(4, 8), w, 2)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(w.grad, torch.ones(4, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_kernel_that_is_looked_up_is_called_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a torch that keeps its kernels elsewhere: all would be right, and slow."""
    function = compiled(lambda x, y: (x + y, x * y))
    x, y = torch.ones(4, 8), torch.ones(4, 8)
    function(x, y)

    def wrapped(*_: object) -> None:
        raise AssertionError("through torch's wrappers")

    monkeypatch.setattr("torch._inductor.output_code.CompiledFxGraph.__call__", wrapped)
    torch.testing.assert_close(function(2 * x, y)[0], 2 * x + y)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_tensor_given_twice_is_not_taken_for_two_that_differ() -> None:
    """Catches: x * x in the place of x * y, of a first call with one tensor for both."""
    function = compiled(lambda x, y: x * y)
    x, y = torch.full((4, 8), 2.0), torch.full((4, 8), 3.0)
    for first, second in ((x, x), (x, y), (y, y), (x, y)):
        torch.testing.assert_close(function(first, second), first * second)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_inference_mode_computes_the_same() -> None:
    """Before the kernels are known, and after. Catches: versions asked of tensors that have none."""
    function = compiled(lambda x, y: (x.mul_(2), x + y)[1])
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            x, y = torch.ones(4, 8), torch.ones(4, 8)
            assert torch.equal(function(x, y), torch.full((4, 8), 3.0))
            assert torch.equal(x, torch.full((4, 8), 2.0))
