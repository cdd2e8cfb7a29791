"""What this machine says where nobody else does: by its GPUs the device, and how many processes to start; by its
environment where caches are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Final

from stretto.arguments.errors import Violation
from stretto.arguments.layers import Layer, said_by
from stretto.arguments.setting import Value
from stretto.arguments.sources import Source, SourceKind

CACHES: Final = "XDG_CACHE_HOME"
ROWS = 32
"""Of a batch for each GPU, where the fallback preset leaves the batch to the machine."""


def uses_gpus(layers: Sequence[Layer], gpus: Callable[[], int]) -> bool:
    """Whether a run goes to GPUs: it is asked to, or there are enough and nothing is said."""
    said = said_by(layers)
    device, nproc = said.get("run.device"), said.get("run.nproc")
    if device is not None:
        return device == "cuda"
    return gpus() >= (nproc if isinstance(nproc, int) else 1)


def cache_of(env: Mapping[str, str]) -> Layer:
    """The place for caches that the user's desktop names; a relative one is none (XDG Base Directory Specification)."""
    home = PurePath(env.get(CACHES, ""))
    found: dict[str, Value] = {"data.cache": f"{home / 'stretto'}"} if home.is_absolute() else {}
    return Layer(Source(SourceKind.DEFAULT, CACHES), found)


def of_machine(layers: Sequence[Layer], gpus: Callable[[], int], *, whole: bool) -> Layer:
    """The weakest layer of all: values that follow from the machine; with `whole`, those of the batch too.

    It has a violation where more processes are asked for than there are GPUs.
    """
    source = Source(SourceKind.DEFAULT, "GPUs of this machine")
    if not uses_gpus(layers, gpus):
        return Layer(source, {})
    said, count = said_by(layers), gpus()
    found: dict[str, Value] = {"run.device": "cuda"}
    tp, cp, pp, dp, nproc = (
        size if isinstance(size := said.get(path), int) else 0
        for path in ("parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp", "run.nproc")
    )
    model = (tp or 1) * (cp or 1) * (pp or 1)
    asked = nproc or model * dp or None
    if asked is None and count and count % model == 0:
        found["run.nproc"] = asked = count
    if whole:
        found["batch.global_batch"] = ROWS * max(1, (asked or model) // model)
    return Layer(source, found, _too_many(asked or model, count) if count else ())


def _too_many(nproc: int, count: int) -> tuple[Violation, ...]:
    if nproc <= count:
        return ()
    problem = f"nproc = {nproc}, but this machine has {count} GPU{'s' * (count > 1)}, and each process needs one"
    hint = f"take a layout of at most {count}, several nodes with torchrun or srun, or --device cpu"
    return (Violation("gpus_hold_processes", ("run.nproc",), problem, hint=hint),)
