"""The kernel that adds gradients to the rows that were looked up computes its formula, on a GPU or in the interpreter.

Faults to catch: tokens of a word beyond those read at a time left out; each token of a word adds what follows it; what
is another rank's added.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")

from stretto.kernels.hand_written import kernels
from stretto.tensor_parallel.formulas import add_rows_

pytestmark = [pytest.mark.gloo, pytest.mark.gpu] if torch.cuda.is_available() else pytest.mark.gloo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mine", ["all", "some", "none"])
@pytest.mark.parametrize(
    ("rows", "tokens", "width"), [(5, (7, 3), 40), (64, (9, 1), 1032), (1, (8, 3), 16), (3, (0, 2), 8)]
)
def test_rows_are_added(rows: int, tokens: tuple[int, int], width: int, mine: str, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    ids = torch.randint(0, rows, tokens, device=DEVICE)
    dy = torch.randn(*tokens, width, dtype=dtype, device=DEVICE)
    here = {
        "all": torch.ones(tokens, dtype=torch.bool, device=DEVICE),
        "some": torch.arange(ids.numel(), device=DEVICE).view(tokens) % 3 > 0,
        "none": torch.zeros(tokens, dtype=torch.bool, device=DEVICE),
    }[mine]
    total = torch.randn(rows, width, device=DEVICE)
    exact = add_rows_(total.double(), dy.double(), ids, here)
    kernel = kernels()[add_rows_]
    assert not total.is_cuda or kernel.takes((total, dy, ids, here))
    found = kernel.run(total, dy, ids, here)
    assert found is total
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert mine != "none" or torch.equal(found.double(), exact)


def test_the_same_tokens_give_the_same_bits() -> None:
    """In the order of the tokens, eight at a time: in another the small ones would be lost."""
    ids, mine = torch.zeros(16, 1, dtype=torch.int64, device=DEVICE), torch.ones(16, 1, dtype=torch.bool, device=DEVICE)
    dy = torch.tensor([1e8, -1e8, *[1.0] * 14], device=DEVICE).view(16, 1, 1).expand(16, 1, 4)
    found = [kernels()[add_rows_].run(torch.zeros(2, 4, device=DEVICE), dy, ids, mine) for _ in range(3)]
    assert all(torch.equal(found[0], each) for each in found[1:])
    assert found[0][1].tolist() == [0.0] * 4
