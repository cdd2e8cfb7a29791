"""Windows by FlashAttention: the same as with a mask, forward and back.

Faults to catch: a window that is one key too wide; a window that looks ahead; scores in a window without their scale.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from stretto.attention import Scores, causal_attention, dot_product, tile
from stretto.attention.tile import Exact
from stretto.sequence import Tile

pytestmark = pytest.mark.gloo
SCORES = Scores(scale=0.2, window=5)


def inputs(s: int, d: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k and v [b, heads, s, d] side by side in memory, sequence first, as the model has them."""
    qkv = torch.randn(s, 2, 8, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = qkv.to(device, dtype).split([4, 2, 2], 2)
    return [part.permute(1, 2, 0, 3).detach().requires_grad_() for part in parts]


def found(tensors: list[Tensor], scores: Scores) -> list[Tensor]:
    """Output and gradients."""
    y = causal_attention(*tensors, scores)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, tensors, dy.to(y))]


def _tile(q: Tensor, k: Tensor, left: int, right: int) -> tuple[Tile, Scores]:
    assert right == 0
    return Tile(slice(0, q.shape[1]), slice(0, k.shape[1]), 0, left + 1), SCORES


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, **window: int) -> tuple[Tensor, ...]:
    assert rest == (None, None, q.shape[1], k.shape[1], 0.0, False, False)
    assert scale == SCORES.scale
    of, scores = _tile(q, k, window["window_size_left"], window["window_size_right"])
    y, lse = Exact().forward(*(x.transpose(1, 2) for x in (q, k, v)), of, scores)
    return y.transpose(1, 2), lse


def _backward(*given: Any, scale: float, **window: int) -> tuple[Tensor, ...]:
    dy, q, k, v, y, lse, *_ = given
    assert scale == SCORES.scale
    of, scores = _tile(q, k, window["window_size_left"], window["window_size_right"])
    heads = [x.transpose(1, 2) for x in (dy, q, k, v, y)]
    return tuple(x.transpose(1, 2) for x in Exact().backward(*heads, lse, of, scores))


def test_the_kernels_are_asked_for_what_a_mask_says() -> None:
    """The kernels stand in as what they say that they compute, in fp64."""
    tensors = inputs(12, 8, torch.float64)
    want = found(tensors, SCORES)
    aten = torch.ops.aten
    with (
        mock.patch.object(dot_product, "takes_window", return_value=True),
        mock.patch.object(tile, "_flash_takes", return_value=True),
        mock.patch.object(aten, "_flash_attention_forward", _forward),
        mock.patch.object(aten, "_flash_attention_backward", _backward),
    ):
        ours = found(tensors, SCORES)
    for one, other in zip(ours, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of a GPU")
@pytest.mark.parametrize(("s", "d", "window"), [(512, 64, 100), (1000, 128, 2), (640, 256, 512), (300, 80, 299)])
def test_a_gpu_sees_the_window(s: int, d: int, window: int) -> None:
    """Beside the mask in fp64 on a CPU."""
    scores = Scores(window=window)
    want = found(inputs(s, d, torch.float64), scores)
    tensors = inputs(s, d, torch.bfloat16, "cuda")
    assert dot_product.takes_window(*tensors)
    for one, other in zip(found(tensors, scores), want, strict=True):
        assert (one.cpu().double() - other).norm() < 0.01 * other.norm()
