"""Attention by flash-attn-4: its kernels on a GPU, and around them the order in memory that all else has.

Faults to catch: an output in another order in memory; keys and values exchanged; a backward that is told of another
output.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from stretto.attention.dot_product import attention_by, causal_attention

pytestmark = pytest.mark.gloo

S, B, HEADS, KV, D = 24, 3, 4, 2, 16


def inputs(dtype: torch.dtype, device: str = "cpu", size: int = 1) -> list[Tensor]:
    """q, k and v [b, heads, s, d] side by side in memory, sequence first, as the model has them."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(S * size, B, HEADS + 2 * KV, D * size, generator=generator, dtype=torch.float64)
    parts = qkv.to(device, dtype).split([HEADS, KV, KV], 2)
    return [part.permute(1, 2, 0, 3).detach().requires_grad_() for part in parts]


def test_a_missing_package_is_named_with_the_flag() -> None:
    missing = ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")
    with mock.patch("stretto.attention.flash.import_module", side_effect=missing), pytest.raises(ImportError) as error:
        attention_by("flash4")
    for said in (
        "needs the package flash-attn-4",
        "flash_attn is not installed",
        "stretto[flash4]",
        "--attention torch",
    ):
        assert said in str(error.value)


def _forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool, out: Tensor) -> tuple[Tensor, ...]:
    assert causal
    assert return_lse
    with torch.no_grad():
        out.copy_(causal_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))
    return out, q.new_zeros(()), q.new_zeros(())


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dy: Tensor, lse: Tensor, *, causal: bool, deterministic: bool
) -> tuple[Tensor, ...]:
    assert causal
    assert deterministic
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        y = causal_attention(*(x.transpose(1, 2) for x in given)).transpose(1, 2)
    assert torch.equal(y, out)
    return torch.autograd.grad(y, given, dy)


def test_what_is_around_the_kernels_keeps_values_and_order() -> None:
    """With kernels that are torch's: the output lies sequence first, so that the next product reads it as it is."""
    theirs = SimpleNamespace(_flash_attn_fwd=_forward, _flash_attn_bwd=_backward)
    with mock.patch("stretto.attention.flash.import_module", return_value=theirs):
        attend = attention_by("flash4", deterministic=True)
    ours, plain = inputs(torch.float64), inputs(torch.float64)
    y, want = attend(*ours), causal_attention(*plain)
    assert torch.equal(y, want)
    assert y.permute(2, 0, 1, 3).is_contiguous()
    dy = torch.randn_like(want)
    for one, other in zip(torch.autograd.grad(y, ours, dy), torch.autograd.grad(want, plain, dy), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # those of a package that is not ours, about itself
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_are_as_near_to_the_truth_as_torchs() -> None:
    pytest.importorskip("flash_attn.cute.interface", reason="flash-attn-4 is optional")
    exact = inputs(torch.float64, size=8)
    wanted = causal_attention(*exact)
    dy = torch.randn_like(wanted)
    truth = [wanted.detach(), *torch.autograd.grad(wanted, exact, dy)]
    errors = {}
    for name in ("torch", "flash4"):
        given = inputs(torch.bfloat16, "cuda", size=8)
        y = attention_by(name)(*given)  # type: ignore[arg-type]
        found = [y.detach(), *torch.autograd.grad(y, given, dy.to(y))]
        errors[name] = [float((a.cpu().double() - t).norm() / t.norm()) for a, t in zip(found, truth, strict=True)]
    assert all(ours <= 2 * theirs for ours, theirs in zip(errors["flash4"], errors["torch"], strict=True)), errors
