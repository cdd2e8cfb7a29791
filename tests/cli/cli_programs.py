"""`stretto` as a program, whole or with something that happens to it at a certain step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from stretto.arguments import Resolved
from stretto.cli import main, training
from stretto.data.text import Text
from stretto.train.loop import Loop
from stretto.world import World

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
"""The environment of programs."""


def happens(what: str, step: int, rank: int, argv: Sequence[str]) -> int:
    """`stretto ARGV`, in which `what`, one of the functions below, happens on `rank` as it begins `step`."""
    begin = Loop._step

    def begin_step(self: Loop) -> Any:
        if (self.train_state.step + 1, self.state.world.rank) == (step, rank):
            globals()[what]()
        return begin(self)

    Loop._step = begin_step  # type: ignore[method-assign]
    return main(argv)


def reads_other_text(ranks: Sequence[int], data: str, argv: Sequence[str]) -> int:
    """`stretto ARGV`, in which some ranks have other text, as if it lay on another node."""
    train = training.train

    def train_on_other(resolved: Resolved, world: World, text: Text, *args: Any, **more: Any) -> Any:
        if world.rank in ranks:
            there = replace(resolved.args, data=replace(resolved.args.data, data=data))
            text = Text.open(there)
        return train(resolved, world, text, *args, **more)

    training.train = train_on_other
    return main(argv)


def remove_the_text() -> None:
    shutil.rmtree(os.environ["TEXT"])


def ctrl_c() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(0.5)  # for the parent to pass it on


def ctrl_c_twice() -> None:
    ctrl_c()
    time.sleep(1)  # within a second it would be the first one
    ctrl_c()
    time.sleep(60)


def terminate_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.5)


def terminate_this_rank() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def warn_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGUSR1)  # as SLURM does before the time is up
    time.sleep(0.5)


def warn_the_parent_and_terminate_this_rank() -> None:
    warn_the_parent()
    terminate_this_rank()


def close_the_terminal() -> None:
    """As when a connection breaks: nobody reads, and all are told by SIGHUP."""
    keyboard, terminal = os.openpty()
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.close(terminal)
    os.close(keyboard)
    os.kill(os.getppid(), signal.SIGHUP)
    time.sleep(0.5)


def nothing() -> None:
    pass


def kill_this_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)  # what the kernel does about it is quick


def fail() -> None:
    raise ValueError("the fault of this rank")


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, all but what a clock has measured, and when checkpoints became whole."""
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "checkpoint_bytes" not in line]
    kept, evaluated = ("step", "loss", "grad_norm", "lr", "tokens", "epoch"), ("_loss", "_bits_per_byte")
    return [{k: v for k, v in json.loads(line).items() if k in kept or k.endswith(evaluated)} for line in lines]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All that the checkpoint of a step holds."""
    reader = FileSystemReader(run / "checkpoints" / f"step-{step:08d}")
    stored = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(stored, storage_reader=reader, no_dist=True)
    return stored
