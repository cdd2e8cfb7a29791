"""P25: a collective changes nothing it is given, takes any strides, and is differentiated by its transpose.

Each invariant is held against tensors gathered by torch itself.
Faults to catch: a sum left out of a forward; a sum left out of a backward; a gather along the wrong dimension;
all_to_all turned the wrong way round in its backward; a sum that changes its input; a backward of detached tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stretto.collectives import (
    all_gather,
    all_reduce,
    all_reduce_,
    all_reduce_max,
    all_to_all,
    broadcast,
    reduce_scatter,
    shift_async,
)
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.testing import Pool
from stretto.world import Axis, World

pytestmark = pytest.mark.gloo

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
STRIDES = ("plain", "transposed", "strided", "offset", "expanded")


@dataclass(frozen=True)
class Case:
    """One call: `units` are the sizes of the dimensions; those that are cut get that many times the axis."""

    op: str
    units: tuple[int, ...]
    dims: tuple[int, int]
    strides: str
    seed: int

    def shape(self, n: int) -> tuple[int, ...]:
        """The input's shape over an axis of n."""
        cut = {"reduce_scatter": (0,), "all_to_all": (0, 1)}.get(self.op, ())
        dims = {self.dims[i] % len(self.units) for i in cut}
        return tuple(u * n if d in dims else u for d, u in enumerate(self.units))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    units = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    dim = st.integers(-len(units), len(units) - 1)
    return Case(
        draw(st.sampled_from(OPS)), units, (draw(dim), draw(dim)), draw(st.sampled_from(STRIDES)), draw(st.integers(0))
    )


@settings(max_examples=settings.default.max_examples // 4)
@given(batch=st.lists(cases(), min_size=1, max_size=16))
@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_collective_is_what_gathered_inputs_give_and_its_backward_is_its_transpose(
    pool: Pool, n: int, batch: list[Case]
) -> None:
    pool.run(n, _hold_laws, batch)


def test_every_operation_in_every_stride_and_dimension(pool: Pool) -> None:
    """The fixed part of the invariant above, so that no run of the tests leaves an operation out."""
    dims = [(0, 0), (0, 1), (1, 2), (2, 0), (-1, 0)]
    pool.run(3, _hold_laws, [Case(op, (2, 1, 3), d, s, 7) for op in OPS for d in dims for s in STRIDES])


def test_over_one_rank_everything_is_its_input_itself() -> None:
    """Catches a copy, a change of dtype or a node of autograd where there is nothing to do."""
    axis, x = Axis.single("tp"), torch.randn(3, 4, requires_grad=True)
    for out in (all_reduce(x, axis), all_gather(x, axis, 1), reduce_scatter(x, axis, 1), all_to_all(x, axis, 0, 1)):
        assert out is x
    for out in (all_reduce_max(x, axis), broadcast(x, axis)):
        assert torch.equal(out, x)
        assert not out.requires_grad
    before = x.detach().clone()
    all_reduce_(x.detach(), axis).wait()
    assert torch.equal(x, before)


def test_what_carries_no_gradient(pool: Pool) -> None:
    """Maximum, broadcast and the sum in place, against gathered inputs; the first two leave their input alone."""
    for maximum, first, total, everyone in pool.run(3, _without_gradient):
        assert torch.equal(maximum, torch.stack(everyone).amax(0))
        assert torch.equal(first, everyone[1])
        torch.testing.assert_close(total, sum(everyone), rtol=0, atol=1e-14)


def test_a_shift_brings_what_the_rank_before_has(pool: Pool) -> None:
    """Also of tensors with strides, two of them under way at once, in the order in which they were begun."""
    for rank, (one, two, left) in enumerate(pool.run(3, _shifted)):
        before = (rank - 1) % 3
        assert torch.equal(one, torch.arange(6).view(2, 3).t() + 10 * before)
        assert torch.equal(two, torch.full((2,), before))
        assert left
    x = torch.arange(3.0)
    assert shift_async(x, Axis.single("cp")).wait() is x


def test_a_dimension_that_does_not_divide_is_rejected_with_its_numbers(pool: Pool) -> None:
    """Catches a remainder that is dropped in silence. All ranks reject before anything is sent."""
    for messages in pool.run(2, _rejections):
        for message in messages:
            assert "tp[0, 1]" in message
            assert "dimension 1 of (4, 3) is 3, not a multiple of 2" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_dtypes(pool: Pool, dtype: torch.dtype) -> None:
    """Small integers are exact in every dtype, so sums must be too; the dtype stays."""
    for rank, found in enumerate(pool.run(2, _in_dtype, dtype)):
        full = torch.arange(8).view(2, 4)
        wanted = (3 * full, torch.cat([full, 2 * full]), 3 * full[rank : rank + 1], _turned(full, rank))
        for got, want in zip(found, wanted, strict=True):
            assert got.dtype == dtype
            assert torch.equal(got.long(), want)


def test_tensors_without_elements(pool: Pool) -> None:
    """A rank may hold nothing (no rows of a vocabulary, no tokens of an expert): shapes hold and nobody hangs."""
    for shapes in pool.run(2, _empty, timeout=20.0):
        assert shapes == [(0, 4), (0, 8), (0, 2), (0, 2)]


def _shifted(world: World) -> tuple[Tensor, Tensor, bool]:
    with ParallelState.build(Layout.of(cp=3), world) as state:
        x = torch.arange(6).view(2, 3).t() + 10 * world.rank
        kept = x.clone()
        first, second = (shift_async(each, state.axis("cp")) for each in (x, torch.full((2,), world.rank)))
        return first.wait(), second.wait(), torch.equal(x, kept)


def _hold_laws(world: World, batch: list[Case]) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        for case in batch:
            try:
                _hold(case, state.axis("tp"))
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error


def _hold(case: Case, axis: Axis) -> None:
    generator = torch.Generator().manual_seed(case.seed % 2**63 + axis.rank)
    x = _laid_out(torch.randn(case.shape(axis.size), generator=generator, dtype=torch.float64), case.strides)
    before, storage = x.clone(), x.untyped_storage().data_ptr()
    x.requires_grad_()
    out = _apply(case, x, axis)

    want = _reference(case, _everyone(before, axis), axis)
    assert out.shape == want.shape
    torch.testing.assert_close(out.detach(), want, rtol=0, atol=1e-12)
    assert out.untyped_storage().data_ptr() != storage, "the result lies in the input's memory"
    assert torch.equal(x.detach(), before), "the input changed"

    y = torch.randn(out.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    (back,) = torch.autograd.grad(out, x, y, create_graph=True)
    assert back.shape == x.shape
    forward, backward = _total((out * y).sum(), axis), _total((x * back).sum(), axis)
    torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12, msg="the backward is not the transpose")

    # The backward is linear in y, so its own transpose is the forward again.
    z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    (again,) = torch.autograd.grad(back, y, z)
    torch.testing.assert_close(again, _reference(case, _everyone(z, axis), axis), rtol=0, atol=1e-12)


def _apply(case: Case, x: Tensor, axis: Axis) -> Tensor:
    match case.op:
        case "all_reduce":
            return all_reduce(x, axis)
        case "all_gather":
            return all_gather(x, axis, case.dims[0])
        case "reduce_scatter":
            return reduce_scatter(x, axis, case.dims[0])
        case _:
            return all_to_all(x, axis, *case.dims)


def _reference(case: Case, everyone: list[Tensor], axis: Axis) -> Tensor:
    total = torch.stack(everyone).sum(0)
    match case.op:
        case "all_reduce":
            return total
        case "all_gather":
            return torch.cat(everyone, case.dims[0])
        case "reduce_scatter":
            return total.chunk(axis.size, case.dims[0])[axis.rank]
        case _:
            split, concat = case.dims
            return torch.cat([x.chunk(axis.size, split)[axis.rank] for x in everyone], concat)


def _laid_out(x: Tensor, strides: str) -> Tensor:
    """The same numbers in other strides (in an expanded tensor, those of the first row)."""
    match strides:
        case "transposed":
            return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
        case "strided":
            wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
            wide[..., ::2] = x
            return wide[..., ::2]
        case "offset":
            return torch.cat([x.new_zeros(1, *x.shape[1:]), x])[1:]
        case "expanded":
            return x[:1].clone().expand(x.shape)
        case _:
            return x


def _everyone(x: Tensor, axis: Axis) -> list[Tensor]:
    found: list[Any] = [None] * axis.size
    dist.all_gather_object(found, x.contiguous(), group=axis.group)
    return found


def _total(x: Tensor, axis: Axis) -> Tensor:
    return torch.stack(_everyone(x.detach(), axis)).sum(0)


def _without_gradient(world: World) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        axis = state.axis("tp")
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(world.rank)).t()
        x.requires_grad_()
        everyone = _everyone(x.detach(), axis)
        maximum, first = all_reduce_max(x, axis), broadcast(x, axis, src=1)
        assert not maximum.requires_grad
        assert not first.requires_grad
        assert torch.equal(x, everyone[world.rank])
        total = x.detach().contiguous()
        all_reduce_(total, axis).wait()
        return maximum, first, total, everyone


def _rejections(world: World) -> list[str]:
    messages = []
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        axis, x = state.axis("tp"), torch.ones(4, 3)
        for op in (lambda: reduce_scatter(x, axis, 1), lambda: all_to_all(x, axis, 1, 0)):
            with pytest.raises(ValueError, match="not a multiple") as error:
                op()
            messages.append(str(error.value))
    return messages


def _in_dtype(world: World, dtype: torch.dtype) -> list[Tensor]:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        axis, x = state.axis("tp"), (torch.arange(8).view(2, 4) * (world.rank + 1)).to(dtype)
        return [all_reduce(x, axis), all_gather(x, axis, 0), reduce_scatter(x, axis, 0), all_to_all(x, axis, 1, 0)]


def _turned(full: Tensor, rank: int) -> Tensor:
    return torch.cat([x.chunk(2, 1)[rank] for x in (full, 2 * full)])


def _empty(world: World) -> list[tuple[int, ...]]:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        axis, x = state.axis("tp"), torch.ones(0, 4)
        made = [all_reduce(x, axis), all_gather(x, axis, 1), reduce_scatter(x, axis, 1), all_to_all(x, axis, 1, 0)]
        return [tuple(t.shape) for t in made]
