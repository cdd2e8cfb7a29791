"""What a cluster must know of a job, in words of no particular cluster; pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from stretto.arguments.setting import setting

WARNING_SECONDS = 120
"""How long before its end a job is warned, to save and leave; a save must fit in."""


@dataclass(frozen=True)
class Job:
    """A training run as a job of a cluster."""

    nodes: int = setting(1, "nodes of the job", at_least=1)
    gpus_per_node: int = setting(
        8, "ranks on each node; and its GPUs, unless the run is on CPUs (--device cpu)", at_least=1
    )
    name: str = setting("stretto", "of the job")
    train: tuple[str, ...] = field(default=())
    """Options of `stretto train`."""
    device: Literal["cpu", "cuda"] = "cuda"
    """What the run computes on."""

    def __post_init__(self) -> None:
        for what, value in (("nodes", self.nodes), ("gpus_per_node", self.gpus_per_node)):
            if value < 1:
                raise ValueError(f"{what}={value}: at least 1")

    @property
    def ranks(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.gpus_per_node

    @property
    def directory(self) -> str:
        """A directory for the run, from its name and its options: other options are another run."""
        digest = hashlib.sha256("\0".join(self.train).encode()).hexdigest()
        return f"runs/{self.name}-{digest[:8]}"
