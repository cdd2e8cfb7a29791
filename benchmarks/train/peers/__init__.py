"""What is measured: one file for each peer, behind one Protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from benchmarks.train.shapes import Job


class RunRejectedError(RuntimeError):
    """This peer cannot do this job here; the message is one line that says why."""


class Peer(Protocol):
    """One way to train the job's model, on this rank."""

    def setup(self, job: Job) -> None:
        """Processes, model, optimizer. Raises RunRejectedError."""

    def step(self) -> Tensor:
        """One whole step, its batch and its update included.

        Returns the loss [] of the global batch as far as this rank knows it; those of all ranks add up to it. The
        host does not wait for the device.
        """

    def held(self) -> Mapping[str, list[Tensor]]:
        """What lives now, between steps or within one: "weights", "gradients", "optimizer", maybe more.

        Weights that are masters are "optimizer".
        """

    def about(self) -> Mapping[str, Any]:
        """What the report says of it: versions and choices."""

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated on this rank's device since setup."""

    def close(self) -> None:
        """Leave the processes' groups."""


PEERS = MappingProxyType(
    {
        "stretto": ("benchmarks.train.peers.stretto_peer", ""),
        "stretto-selective": ("benchmarks.train.peers.stretto_peer", "--recompute selective"),
        "stretto-block": ("benchmarks.train.peers.stretto_peer", "--recompute block"),
        "stretto-no-graphs": ("benchmarks.train.peers.stretto_peer", "--no-cuda-graphs"),
        "stretto-nccl": ("benchmarks.train.peers.stretto_peer", "--no-tp-comm-overlap"),
        "stretto-flash4": ("benchmarks.train.peers.stretto_peer", "--attention flash4"),
        "stretto-fp8": ("benchmarks.train.peers.stretto_peer", "--fp8 tensorwise"),
        "stretto-fp8-rowwise": ("benchmarks.train.peers.stretto_peer", "--fp8 rowwise"),
        "stretto-ddp": ("benchmarks.train.peers.stretto_peer", "--sharding none"),
        "stretto-zero1": ("benchmarks.train.peers.stretto_peer", "--sharding zero1"),
        "stretto-zero2": ("benchmarks.train.peers.stretto_peer", "--sharding zero2"),
        "stretto-fsdp": ("benchmarks.train.peers.stretto_peer", "--sharding fsdp"),
        "stretto-fsdp-fp8": ("benchmarks.train.peers.stretto_peer", "--sharding fsdp --fp8 tensorwise"),
        "stretto-fsdp-nccl": ("benchmarks.train.peers.stretto_peer", "--sharding fsdp --no-dp-copy-engines"),
        "stretto-fsdp-selective": ("benchmarks.train.peers.stretto_peer", "--sharding fsdp --recompute selective"),
        "stretto-fsdp-lean": (
            "benchmarks.train.peers.stretto_peer",
            "--sharding fsdp --recompute selective --masters remainder",
        ),
        # Of D4: as little computed once more as 25 GiB leave.
        "stretto-fsdp-budget": (
            "benchmarks.train.peers.stretto_peer",
            "--sharding fsdp --masters remainder --activation-budget 7.7GiB",
        ),
        "stretto-interleaved": ("benchmarks.train.peers.stretto_peer", "--schedule interleaved --vpp 2"),
        "stretto-zb-h1": ("benchmarks.train.peers.stretto_peer", "--schedule zb-h1"),
        "stretto-zbv": ("benchmarks.train.peers.stretto_peer", "--schedule zbv --vpp 2"),
        "stretto-zbv-post": ("benchmarks.train.peers.stretto_peer", "--schedule zbv --vpp 2 --post-validate"),
        # Of 8 layers on two pipeline ranks (D4), cut between attention and feed-forward, and whole.
        **{
            f"stretto-{how}-{name}": ("benchmarks.train.peers.stretto_peer", f"{schedule} --stage-layers {layers}")
            for name, schedule, *both in (
                ("1f1b", "--schedule 1f1b", "4.5,3.5", "4,4"),
                ("zb-h1", "--schedule zb-h1", "4.5,3.5", "4,4"),
                ("zb-h2", "--schedule zb-h2", "4.5,3.5", "4,4"),
                ("interleaved", "--schedule interleaved --vpp 2", "2,2,2.5,1.5", "2,2,2,2"),
                ("interleaved-zb", "--schedule interleaved-zb --vpp 2", "2,2,2.5,1.5", "2,2,2,2"),
                ("interleaved4", "--schedule interleaved --vpp 4", "1,1,1,1,1,1,1.5,0.5", "1,1,1,1,1,1,1,1"),
                ("interleaved-zb4", "--schedule interleaved-zb --vpp 4", "1,1,1,1,1,1,1.5,0.5", "1,1,1,1,1,1,1,1"),
                ("zbv", "--schedule zbv --vpp 2", "2,2,2.5,1.5", "2,2,2,2"),
                ("dualpipev", "--schedule dualpipev --vpp 2", "2,2,2.5,1.5", "2,2,2,2"),
                ("auto-v", "--schedule auto --vpp 2 --vpp-shape v", "2,2,2.5,1.5", "2,2,2,2"),
                ("auto-v-post", "--schedule auto --vpp 2 --vpp-shape v --post-validate", "2,2,2.5,1.5", "2,2,2,2"),
                ("zb-h2-nccl", "--schedule zb-h2 --no-pp-copy-engines", "4.5,3.5", "4,4"),
                (
                    "interleaved4-nccl",
                    "--schedule interleaved --vpp 4 --no-pp-copy-engines",
                    "1,1,1,1,1,1,1.5,0.5",
                    "1,1,1,1,1,1,1,1",
                ),
            )
            for how, layers in zip(("halves", "whole"), both, strict=True)
        },
        "torch": ("benchmarks.train.peers.torch_peer", ""),
        "torch-eager": ("benchmarks.train.peers.torch_peer", "eager"),
        "torch-async-tp": ("benchmarks.train.peers.torch_peer", "async-tp"),
        "torch-zero1": ("benchmarks.train.peers.torch_peer", "zero1"),
        "torch-fsdp": ("benchmarks.train.peers.torch_peer", "fsdp"),
        "torch-interleaved": ("benchmarks.train.peers.torch_peer", "interleaved"),
        "megatron-fsdp": ("benchmarks.train.peers.megatron_fsdp_peer", ""),
        "torchtitan": ("benchmarks.train.peers.torchtitan_peer", ""),
        "torchtitan-fsdp": ("benchmarks.train.peers.torchtitan_peer", "fsdp"),
        "megatron": ("benchmarks.train.peers.megatron_peer", ""),
    }
)
"""By the name on the command line: the module, and the variant that its `Peer` is made with. `torch` and `torchtitan`
under dp are DDP, `torch-zero1` and `megatron` shard the optimizer, the `-fsdp` ones shard all; under pp `torch` is
1F1B. Those of Stretto differ by words of the command line."""


def create(name: str) -> Peer:
    """The peer of that name, not set up. Raises RunRejectedError for an unknown one."""
    if name not in PEERS:
        raise RunRejectedError(f"unknown peer; there are {', '.join(PEERS)}")
    module, variant = PEERS[name]
    make: Callable[[str], Peer] = import_module(module).Peer
    return make(variant)


def peak_of(device: str) -> int:
    """Bytes; 0 where nothing counts them."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
