"""torch's own context parallelism beside ours: the ring of SDPA for causal rows, and FlexAttention for any mask.

`torch.distributed.tensor.experimental` calls both prototypes. FlexAttention is used as torchtitan 0.2.2 uses it: keys
and values gathered before each call, blocks of 128 queries dealt to the ranks by how many blocks of keys they see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import _attention as cp
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.context_ways import Case, Way
from stretto.world import World

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "Flash": SDPBackend.FLASH_ATTENTION}
ROTATIONS = ("allgather", "alltoall")
BLOCK = 128
"""Queries, and keys, of a block of FlexAttention's masks."""


def torchs(case: Case, world: World, *, autotune: bool = True) -> tuple[dict[str, Callable[[], Way]], dict[str, str]]:
    """How each way is made, which may fail; and why there is none of a kind."""
    ways: dict[str, Callable[[], Way]] = {}
    why: dict[str, str] = {}
    if case.packed:
        why["torch ring"] = "its SDPA over cp is causal or whole: it takes no mask, so no documents"
    else:
        for kernel in BACKENDS:
            for rotation in ROTATIONS:
                ways[f"torch ring, {kernel}, {rotation}"] = partial(ring, case, world, kernel, rotation)
    name = "torch FlexAttention" if autotune else "torch FlexAttention, not autotuned"
    ways[name] = partial(flex, case, world, autotune)
    return ways, why


def ring(case: Case, world: World, kernel: str, rotation: str) -> Way:
    """`context_parallel` around SDPA, each rank with the head and the tail that torch's balancer gives it."""
    mesh = _mesh(world)
    around = partial(_patched, mesh, world.device, kernel, rotation)
    groups = case.kv_heads == case.heads or _groups(case, world.device, around)

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        if not groups:
            k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
        y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups)
        return y

    length = case.tokens * world.size
    order = cp._HeadTailLoadBalancer(length, world.size, world.device)._generate_indices()
    return Way(attend, None, case.tokens, _own(order, world), around=around)


@contextmanager
def _patched(mesh: DeviceMesh, device: torch.device, kernel: str, rotation: str) -> Iterator[None]:
    """Where SDPA is torch's ring. An error leaves `context_parallel` of torch 2.11 in force, so none passes it."""
    cp.set_rotate_method(rotation)
    failed: Exception | None = None
    row = torch.zeros(1, 1, 2 * mesh.size(), 1, device=device)  # it wants something to cut
    with sdpa_kernel(BACKENDS[kernel]), context_parallel(mesh, buffers=[row], buffer_seq_dims=[2]):
        try:
            yield
        except Exception as error:  # noqa: BLE001  # raised again below
            failed = error
    cp.set_rotate_method(ROTATIONS[0])
    if failed is not None:
        raise failed


def _groups(case: Case, device: torch.device, around: Callable[[], Any]) -> bool:
    """Whether its ring takes fewer keys than queries here."""
    q, k, v = (
        torch.zeros(1, heads, 2 * BLOCK, case.dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    try:
        with around():
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
    except Exception:  # noqa: BLE001  # whatever it is: with as many keys it may work
        return False
    return True


class Flex(nn.Module):
    """FlexAttention as a module, whose inputs `_ContextParallel` replaces: queries of a rank, all keys."""

    def __init__(self, device: torch.device, autotune: bool) -> None:
        super().__init__()
        # The choices of torchtitan, where autotuned.
        options = {"max_autotune": autotune, "coordinate_descent_tuning": autotune, "triton.cudagraphs": False}
        gpu = device.type == "cuda"
        self.call = torch.compile(flex_attention, dynamic=False, options=options) if gpu else flex_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, enable_gqa: bool) -> Tensor:
        """[b, heads, n, d] of q and [b, kv_heads, m, d] of k and v -> [b, heads, n, d]."""
        y: Tensor = self.call(q, k, v, block_mask=block_mask, enable_gqa=enable_gqa)
        return y


def flex(case: Case, world: World, autotune: bool) -> Way:
    """A mask of documents, its blocks dealt by their work."""
    length, device, mesh = case.tokens * world.size, world.device, _mesh(world)
    starts = case.row(world.size).starts
    document = torch.zeros(length, dtype=torch.int64) if starts is None else starts[0]
    document = document.to(device)

    def sees(_row: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document[q] == document[k])

    # Compiled, for otherwise it makes every pair of a query and a key: 17 GB at 128k tokens.
    make = torch.compile(create_block_mask, dynamic=False) if device.type == "cuda" else create_block_mask
    whole = make(sees, 1, 1, length, length, device=device.type, BLOCK_SIZE=(BLOCK, BLOCK))
    balancer = cp._PTRRLoadBalancer(whole, world.size)
    (mask,) = cp._context_parallel_shard(mesh, [whole], [2], balancer)
    style = cp._ContextParallel(seq_dim=2, attention_type=cp._ContextParallel.AttentionType.FLEX)
    module = parallelize_module(Flex(device, autotune), mesh, style)

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        y: Tensor = module(q, k, v, block_mask=mask, enable_gqa=case.kv_heads < case.heads)
        return y

    own = _own(balancer._generate_indices(), world)
    return Way(attend, None, case.tokens, own, backward=device.type == "cuda")  # on a CPU it has no backward


def _own(order: Tensor | None, world: World) -> Tensor:
    """This rank's tokens, in a balancer's order of the whole row [1, s]."""
    assert order is not None
    return order[0].long().chunk(world.size)[world.rank]


def _mesh(world: World) -> DeviceMesh:
    return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("cp",))
