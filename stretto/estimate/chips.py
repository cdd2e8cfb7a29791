"""What GPUs do in a second: measured in training steps, at the clocks of sustained work (docs/performance.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from stretto.estimate.context import BETWEEN, LATENCY, NODE


@dataclass(frozen=True)
class Chip:
    """Rates of one kind of GPU, and what a step loses to them."""

    gemm: float
    """Operations a second of large GEMMs in bf16."""
    fp8: float
    """The same in FP8."""
    forward: float
    """Operations a second of causal attention's forward: two GEMMs over a long sequence, of half the pairs."""
    backward: float
    """Of its backward, five GEMMs."""
    memory: float
    """Bytes a second that a large copy reads and writes."""
    node: float = NODE
    """Bytes a second from other GPUs of its node."""
    between: float = BETWEEN
    """From other nodes."""
    latency: float = LATENCY
    """Seconds of a collective."""
    half_side: float = 100.0
    """A GEMM whose smallest side is n runs at n / (n + `half_side`) of the rate."""
    half_length: float = 730.0
    """Attention over s tokens runs at s / (s + `half_length`) of its rate."""
    half_head: float = 64.0
    """And of heads of d numbers at d / (d + `half_head`)."""
    pass_over: float = 1.7
    """What an elementwise pass takes beside a copy of its bytes."""
    casts: float = 2.1
    """And what it takes in FP8, where it rounds and looks for the largest, beside one in bf16."""
    update_over: float = 1.2
    """What the update takes beside a copy of its bytes."""
    contention: float = 0.8
    """What a second of communication behind GEMMs costs them, which share multiprocessors, memory and power with it."""
    grouped: float = 1.1
    """What GEMMs of experts take beside dense ones of as many rows."""
    routing: float = 120e-6
    """Seconds of a router's and a sort's small kernels, forward and backward."""
    exchange: float = 288e9
    """Bytes a second of an uneven all-to-all of NCCL within a node, each way."""
    to_host: float = 40.5e9
    """Bytes a second to the host's memory, and from it at the same time, of state that an update streams."""
    host: float = 1.9e-3
    """Seconds of the host for a dense layer and microbatch that is no CUDA graph: a step takes no less."""
    host_sparse: float = 4.9e-3
    """For a layer of experts."""
    gaps: float = 3e-3
    """Seconds of a step in which nothing runs."""


CHIPS: Final[Mapping[str, Chip]] = MappingProxyType(
    {
        "h100": Chip(gemm=715e12, fp8=1290e12, forward=860e12, backward=750e12, memory=3.03e12),
        "h200": Chip(gemm=715e12, fp8=1290e12, forward=860e12, backward=750e12, memory=4.27e12),
    }
)
"""By name; both at 700 W."""
