"""The kernels that move rows of experts compute their formulas, on a GPU or in Triton's interpreter.

Faults to catch: a dropped row that is added; the parts of a cut expert not added up; columns beyond the first block
left out; rows of others looked for behind as many of a rank's own; what is beside a sum left out; slots added in
another order; rows of the next expert added; an expert without rows not set to zero; an expert
that is chosen twice; rows of a second part left out; rows of an expert whose sources lie in any order; rows of an
expert beyond a block left where they were; assignments of blocks before not counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")

from triton.runtime import interpreter

from stretto.experts.grouped import add_products
from stretto.experts.plan import Sorting
from stretto.experts.router import best
from stretto.experts.rows import by_expert, combine_rows, scatter_rows, sort_assignments, sum_rows
from stretto.experts.segments import Segments
from stretto.kernels.hand_written import kernels
from stretto.world import ExpertAxes

pytestmark = [pytest.mark.gloo, pytest.mark.gpu] if torch.cuda.is_available() else pytest.mark.gloo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS = 5
CASES = [(7, 3, 24), (5, 1, 2056), (4, 8, 100), (3, 2, 8200)]
"""Tokens, slots, width."""


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def places(tokens: int, slots: int, dropped: str) -> tuple[Tensor, Tensor]:
    """`order` and `back` of assignments of which none, some or all are dropped; the last expert gets none."""
    experts = torch.randint(0, EXPERTS - 1, (tokens, slots), device=DEVICE)
    kept = {
        "none": None,
        "some": (torch.arange(tokens * slots, device=DEVICE) % 3 > 0).view(tokens, slots),
        "all": torch.zeros(tokens, slots, dtype=torch.bool, device=DEVICE),
    }[dropped]
    plan = Sorting(experts, EXPERTS, ExpertAxes.single(), kept).plan()
    return plan.rows, plan.back


def halved(order: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """The same for experts cut in two, whose second parts lie behind the first."""
    far = torch.where(back < len(order), back + len(order), 2 * len(order))
    return torch.cat([order, order]), torch.cat([torch.where(back < len(order), back, 2 * len(order)), far])


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == exact.shape
    limit = 2**-7 if dtype == torch.bfloat16 else 1e-6  # the interpreter cuts bits off, it does not round
    assert (found.double() - exact.double()).norm() <= limit * exact.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", ["none", "some", "all"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("tokens", "slots", "width"), CASES)
def test_rows_come_and_go(tokens: int, slots: int, width: int, cut: bool, dropped: str, dtype: torch.dtype) -> None:
    order, back = places(tokens, slots, dropped)
    order, back = halved(order, back) if cut else (order, back)
    x, rows = drawn(tokens, width, dtype=dtype), drawn(len(order), width, dtype=dtype)
    weights = torch.rand(tokens, slots, device=DEVICE)
    assert torch.equal(kernels()[scatter_rows].run(x, order, back), scatter_rows(x, order, back))
    close(kernels()[sum_rows].run(rows, None, back), sum_rows(rows.double(), None, back), dtype)
    exact = combine_rows(rows.double(), None, weights.double(), back)
    close(kernels()[combine_rows].run(rows, None, weights, back), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [0, 1, 3, 21])
def test_rows_in_two_tensors_are_those_of_one(own: int, dtype: torch.dtype) -> None:
    """Bitwise; and what is beside the sum is added to what it is rounded to, as by itself."""
    tokens, slots, width = CASES[0]
    order, back = places(tokens, slots, "none")
    rows, weights, beside = (
        drawn(len(order), width, dtype=dtype),
        torch.rand(tokens, slots, device=DEVICE),
        drawn(tokens, width, dtype=dtype),
    )
    add, combine = kernels()[sum_rows].run, kernels()[combine_rows].run
    one, two = (rows, None), (rows[:own], rows[own:])
    assert torch.equal(combine(*two, weights, back), combine(*one, weights, back))
    assert torch.equal(sum_rows(*two, back), sum_rows(*one, back))
    assert torch.equal(add(*two, back), add(*one, back))
    close(add(*two, back, beside), add(*two, back).double() + beside.double(), dtype)
    assert torch.equal(sum_rows(*two, back, beside), sum_rows(*two, back) + beside)


def test_a_sum_has_the_order_of_the_slots() -> None:
    """Bitwise; sums in another order would be 0 and 4."""
    plan = Sorting(torch.tensor([[5, 0, 3], [1, 4, 2]], device=DEVICE), 6, ExpertAxes.single()).plan()
    rows = torch.tensor([[-1e8], [1.0], [2.0], [3.0], [4.0], [1e8]], device=DEVICE)
    weights = torch.ones(2, 3, device=DEVICE)
    assert kernels()[combine_rows].run(rows, None, weights, plan.back).tolist() == [[3.0], [7.0]]
    assert kernels()[sum_rows].run(rows, None, plan.back).tolist() == [[3.0], [7.0]]


def test_no_tokens_move_nothing() -> None:
    order, back = places(0, 2, "none")
    x, weights = drawn(0, 16, dtype=torch.float32), torch.rand(0, 2, device=DEVICE)
    assert kernels()[scatter_rows].run(x, order, back).shape == (0, 16)
    assert kernels()[combine_rows].run(x, None, weights, back).shape == (0, 16)


@pytest.mark.skipif(DEVICE != "cuda", reason="elsewhere no kernel takes anything")
def test_the_kernels_take_what_a_layer_gives() -> None:
    """More rows than a row may have columns, of which each has an index."""
    order, back = places(2**14, 8, "none")
    rows, weights = drawn(len(order), 16, dtype=torch.bfloat16), torch.rand(2**14, 8, device=DEVICE)
    assert kernels()[scatter_rows].takes([rows[: 2**14], order, back])
    assert kernels()[combine_rows].takes([rows, None, weights, back])
    assert not kernels()[combine_rows].takes([rows.double(), None, weights, back])


@pytest.fixture
def _whole_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton 3.6's lacks: it makes a loop's end of an array of one number in a way that numpy 2.4 rejects, and
    adds to nothing through a descriptor."""
    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def add(self: Any, kind: Any, out: Any, value: Any, at: Any) -> None:
        assert "ADD" in str(kind)
        there = self.create_descriptor_load(out, at, None, None)
        self.create_descriptor_store(out, interpreter.TensorHandle(there.data + value.data, value.dtype), at)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", mended)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_descriptor_reduce", add, raising=False)


@pytest.mark.usefixtures("_whole_interpreter")
@pytest.mark.parametrize(("assignments", "number"), [(0, 4), (7, 1), (1300, 6), (600, 128)])
@pytest.mark.parametrize("dropped", [False, True])
def test_assignments_are_sorted_by_expert(assignments: int, number: int, dropped: bool) -> None:
    """As torch's stable sort does. Catches: blocks before that are not counted; an order that is not stable; dropped
    ones among the others; totals of a block."""
    keys = torch.randint(0, number + dropped, (assignments,), device=DEVICE)
    keys[keys == 2] = 0  # an expert without any
    want = sort_assignments(keys, number, dropped)
    found = kernels()[sort_assignments].run(keys, number, dropped)
    assert [each.dtype for each in found] == [each.dtype for each in want]
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    assert torch.equal(found[0], keys.sort(stable=True).indices)
    assert torch.equal(found[2], torch.bincount(keys, minlength=number)[:number])


@pytest.mark.usefixtures("_whole_interpreter")
@pytest.mark.parametrize("counts", [[[3, 0, 2], [0, 1100, 5]], [[0, 0]], [[2], [3], [1]]])
def test_rows_by_source_are_put_in_the_order_of_experts(counts: list[list[int]]) -> None:
    """As a sort by expert that is stable does. Catches: the source's place in the order, rows beyond a block."""
    held = torch.tensor(counts, device=DEVICE)
    total = int(held.sum())
    experts = torch.arange(held.shape[1], device=DEVICE).repeat(len(held)).repeat_interleave(held.flatten())
    want = experts.sort(stable=True).indices
    for order, inverse in (by_expert(held, total), kernels()[by_expert].run(held, total)):
        assert torch.equal(order, want)
        assert torch.equal(order[inverse], torch.arange(total, device=DEVICE))


@pytest.mark.usefixtures("_whole_interpreter")
@pytest.mark.parametrize(
    "parts",
    [
        [(3, 0, 130, 5)],
        [(0, 0, 0, 64)],
        [(1, 1, 1, 1)],
        [(3, 0, 40, 0), (0, 0, 65, 1)],
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_weight_gradients_of_all_experts_at_once(parts: list[tuple[int, ...]], first: bool) -> None:
    """A tile of 128 x 128, 32 rows at a time: experts end within a turn. Of one part or of two, of which an expert has
    rows in one, in both or in none. The interpreter multiplies no bf16."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    factors: list[Any] = []
    for counts in parts:
        ends = torch.tensor(counts, dtype=torch.int32, device=DEVICE).cumsum(0).to(torch.int32)
        dy, x = drawn(sum(counts), 128, dtype=dtype), drawn(sum(counts), 256, dtype=dtype)
        factors += [dy, x, Segments(lambda counts=counts: [list(counts)], ends)]  # type: ignore[misc]
    experts = len(parts[0])
    total = torch.full((experts, 128, 256), torch.nan) if first else drawn(experts, 128, 256, dtype=torch.float32)
    total, exact = total.to(DEVICE), total.double().to(DEVICE)
    kernels()[add_products].run(total, first, *factors, tall=128, wide=128, deep=32, warps=4)
    add_products(exact, first, *(each.double() if isinstance(each, Tensor) else each for each in factors))
    close(total, exact, torch.float32)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(37, 64, 8), (5, 128, 1), (130, 12, 3), (1, 7, 7), (0, 8, 2)])
def test_the_best_experts_are_those_of_torch(tokens: int, experts: int, k: int) -> None:
    """Catches: columns that no expert has, the tokens behind the last, an expert that is chosen twice."""
    scores = -drawn(tokens, experts, dtype=torch.float32).abs()
    assert torch.equal(kernels()[best].run(scores, k), best(scores, k))


def test_of_equal_scores_the_first_expert_is_the_better_and_none_is_made_up() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, -torch.inf, 1.0], [torch.nan] * 5], device=DEVICE)
    found = kernels()[best].run(scores, 4)
    assert found[0].tolist() == [1, 2, 0, 4]
    assert bool((found[1] < 5).all())
