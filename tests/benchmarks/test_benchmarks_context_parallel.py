"""What is timed beside context attention computes the same, and what cannot run here says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.context_parallel import FAR, Results, Said, Truth, compared, measured
from benchmarks.context_torch import ring
from benchmarks.context_ways import REFERENCES, Case
from stretto import Layout, ParallelState
from stretto.attention import PLAIN
from stretto.attention.tile import Exact
from stretto.sequence import Tile
from stretto.world import World

pytestmark = [pytest.mark.gloo, pytest.mark.filterwarnings("default")]  # torch's own modules warn of each other

aten = torch.ops.aten


MAKE = "torch.distributed.tensor.experimental._context_parallel._attention._compiled_create_block_mask"


def compare(world: World, case: Case, out: Path) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    not_compiled = mock.patch(MAKE, create_block_mask)  # seconds
    with ParallelState.build(Layout.of(cp=world.size), world) as state, not_compiled:
        results = Results({}, out, tells=world.rank == 0)
        compared(case, state.axis("cp"), world, Said(calls=1), results)
    return results.cases[str(case)], results.errors[str(case)]


@pytest.mark.parametrize("packed", [False, True])
def test_every_way_computes_the_same(pool, packed, tmp_path):
    """Catches tokens dealt otherwise than they are compared, and a mask that a document's neighbour passes."""
    case = Case(tokens=256, heads=4, kv_heads=2, dim=8, packed=packed)
    found, errors = pool.run(2, compare, case, tmp_path / "cp.json")[0]
    ways = {"all-gather", "needed", "ring", "ulysses", "plain ring", "torch FlexAttention"}
    assert found.keys() == {*REFERENCES, *ways}
    assert all(found[name]["apart"] < FAR[torch.float32] for name in ways)
    assert json.loads((tmp_path / "cp.json").read_text()) == {
        "cases": {str(case): found},
        "errors": {str(case): errors},
    }
    assert len(errors) == (1 if packed else 4)  # its kernels are those of GPUs
    assert all("\n" not in why for why in errors.values())


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *_: Any, scale: Any = None
) -> Any:
    """The kernel of a GPU, as `aten` declares it."""
    y, lse = Exact().forward(q, k, v, tile_of(q, k, causal), PLAIN)
    state = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return y, lse, None, None, q.shape[2], k.shape[2], *state, torch.zeros(0)


def flash_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, *rest: Any, scale: Any = None
) -> Any:
    return Exact().backward(dy, q, k, v, y, lse, tile_of(q, k, rest[5]), PLAIN)


def tile_of(q: Tensor, k: Tensor, causal: bool) -> Tile:
    """Not causal: every query comes after all keys."""
    return Tile(slice(0, q.shape[2]), slice(0, k.shape[2]), 0 if causal else k.shape[2], None)


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
        y: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal)[0]
        return y

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_flash_attention", flash, "CPU")
        library.impl("_scaled_dot_product_flash_attention_backward", flash_backward, "CPU")
        with mock.patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention):
            yield


def run_ring(world: World, case: Case, rotation: str) -> tuple[dict[str, float], bool]:
    with ParallelState.build(Layout.of(cp=world.size), world) as state:
        truth = Truth(case, state.axis("cp"), world.device, torch.float32)
        with kernels_of_a_gpu():
            plain: Callable[..., Tensor] = F.scaled_dot_product_attention
            found = measured(lambda: ring(case, world, "Flash", rotation), truth, 1)
            return found, F.scaled_dot_product_attention is plain


@pytest.mark.parametrize(("rotation", "ranks"), [("allgather", 2), ("alltoall", 3)])
def test_torchs_ring_gets_the_tokens_of_its_balancer(pool, rotation, ranks):
    """Through all of torch but the kernel itself. Catches tokens in order where torch takes head and tail."""
    case = Case(tokens=24, heads=4, kv_heads=2, dim=8, packed=False)
    for found, left in pool.run(ranks, run_ring, case, rotation):
        assert found["apart"] < FAR[torch.float32]
        assert "both_ms" in found
        assert left
