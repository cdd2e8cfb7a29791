"""How much memory a host of a planned run has: as said, or that of this machine where the run could be here."""

from __future__ import annotations

from stretto.arguments import Arguments
from stretto.cli.memory import GIB
from stretto.initialize.gpus import visible_gpus
from stretto.initialize.host_memory import host_memory


def limit_of_host(args: Arguments, said: float | None) -> float | None:
    """Bytes; None where nobody knows."""
    if said is not None:
        return said * GIB
    return host_memory() if args.run.device == "cpu" or visible_gpus() else None
