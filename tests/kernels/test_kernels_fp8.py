"""The kernels of fp8 compute their formulas, also on a GPU and in Triton's interpreter.

The interpreter does not round to 8 bits as a GPU does, so there numbers are such that nothing is to be rounded.

Faults to catch: the scale of another row; rows that lie apart read as if they lay together; the last column left out;
the last column of bytes left where it was.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")

from stretto.kernels.hand_written import kernels
from stretto.tensor_parallel import fp8, fp8_shards
from stretto.tensor_parallel.fp8 import E4M3, E5M2

pytestmark = [pytest.mark.gloo, pytest.mark.gpu] if torch.cuda.is_available() else pytest.mark.gloo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(16, 16), (48, 160), (130, 72), (1, 4112)]


def drawn(rows: int, width: int, dtype: torch.dtype, fp8_dtype: torch.dtype) -> Tensor:
    """Numbers of fp8, a quarter as large, the largest among them; where there is a GPU others between them."""
    generator = torch.Generator().manual_seed(rows)
    exponents = torch.randint(-3, 4, (rows, width), generator=generator)
    x = torch.randint(-7, 8, (rows, width), generator=generator) * 2.0**exponents
    x[:, ::5] *= 0.0
    x[:, 7] = torch.finfo(fp8_dtype).max
    if DEVICE == "cuda":
        x += torch.randn(rows, width, generator=generator)
    return (x / 4).to(DEVICE, dtype)


def equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.is_contiguous()
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [E4M3, E5M2])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_one_scale_of_a_matrix(rows: int, width: int, small: torch.dtype, dtype: torch.dtype) -> None:
    x = drawn(rows, width, dtype, small)
    for each in (x, torch.cat([x, x], 1)[:, :width], -x):
        equal((kernels()[fp8.scale].run(each, dtype=small),), (fp8.scale(each, dtype=small),))


@pytest.mark.parametrize("small", [E4M3, E5M2])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_one_scale_and_the_copies(rows: int, width: int, small: torch.dtype) -> None:
    x = drawn(rows, width, torch.bfloat16, small)
    apart = torch.cat([x, x], 1)[:, :width]
    scale = fp8.scale(x, dtype=small)
    for each in (x, apart, -x):
        for formula in (fp8.quantize, fp8.quantize_transposed):
            equal((kernels()[formula].run(each, scale, dtype=small),), (formula(each, scale, dtype=small),))
        equal(kernels()[fp8.quantize_both].run(each, scale, dtype=small), fp8.quantize_both(each, scale, dtype=small))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_a_scale_for_each_row(rows: int, width: int, dtype: torch.dtype) -> None:
    x = drawn(rows, width, dtype, E4M3) * 2.0 ** torch.arange(rows, device=DEVICE).remainder(9)[:, None].to(dtype)
    for each in (x, torch.cat([x, x], 1)[:, :width]):
        equal(kernels()[fp8.quantize_rows].run(each), fp8.quantize_rows(each))


@pytest.mark.parametrize("size", [64, 4096, 10_304])
def test_a_part_of_a_matrix_goes_where_it_is_read(size: int) -> None:
    x = drawn(1, size, torch.bfloat16, E4M3)[0]
    scale = fp8.scale(x[None], dtype=E4M3).view(1)
    found, wanted = (torch.zeros(size + 64, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    kernels()[fp8_shards.quantize_].run(found[64:].view(E4M3), x, scale)
    fp8_shards.quantize_(wanted[64:].view(E4M3), x, scale)
    assert torch.equal(found, wanted)
    assert torch.equal(wanted[64:].view(E4M3).float(), fp8.quantize(x[None], scale, dtype=E4M3)[0].float())


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_bytes_lie_across(rows: int, width: int) -> None:
    x = torch.arange(rows * width, device=DEVICE).remainder(251).view(rows, width).to(torch.uint8)
    found, wanted = (torch.zeros(width, rows, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    kernels()[fp8_shards.transpose_].run(found, x)
    fp8_shards.transpose_(wanted, x)
    assert torch.equal(found, wanted)
    assert torch.equal(found, x.t())


def test_nothing_has_a_scale() -> None:
    nothing = torch.zeros(16, 32, device=DEVICE)
    equal((kernels()[fp8.scale].run(nothing, dtype=E4M3),), (fp8.scale(nothing, dtype=E4M3),))
    equal(kernels()[fp8.quantize_rows].run(nothing), fp8.quantize_rows(nothing))


def test_a_large_matrix_has_one_largest_number() -> None:
    """Of many programs, each with its share; wherever it lies."""
    for place in (0, 70_000, 299_999):
        x = torch.zeros(300, 1000, device=DEVICE)
        x.view(-1)[place] = -3.0
        equal((kernels()[fp8.scale].run(x, dtype=E5M2),), (fp8.scale(x, dtype=E5M2),))


def test_a_part_is_added_to_what_is_there() -> None:
    total, part = torch.rand(70, 129, device=DEVICE), torch.rand(70, 129, device=DEVICE).bfloat16()
    wanted = total + part.float()
    kernels()[fp8.add_].run(total, part)
    equal((total,), (wanted,))


def test_from_fp32_the_compiler_narrows() -> None:
    """On a GPU the transposed copy by our kernel was wrong."""
    wide, scale = torch.randn(16, 16, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    for formula in (fp8.quantize, fp8.quantize_transposed, fp8.quantize_both):
        assert not kernels()[formula].takes([wide, scale])
        assert kernels()[formula].takes([wide.bfloat16(), scale]) == (DEVICE == "cuda")
