"""What a run asks of this machine before it starts processes on it."""

from __future__ import annotations

import os
from importlib import import_module

import torch

from stretto.arguments import ConfigError, Resolved, Violation


def import_for_workers(resolved: Resolved) -> None:
    """Import once, before the fork, what each worker would on its way to the end of the first step.

    NumPy and torch load parts of themselves when they are first used. None of these starts a thread. Those of
    `torch.compile` are loaded here for the CPU alone: a node with GPUs has cores for its ranks to do so side by side.
    """
    names = ["numpy.ma", "numpy.random", "encodings.idna"]
    if resolved.args.run.compile and resolved.args.run.device == "cpu":
        names += ["torch._dynamo", "torch._inductor.compile_fx"]
    for name in names:
        import_module(name)


def require_devices(resolved: Resolved) -> None:
    """Raise ConfigError when there is no GPU at all; counting them leaves them untouched, so workers may still fork."""
    if resolved.args.run.device == "cuda":
        require_cuda()


def require_cuda() -> None:
    """The same for a command that is to use one."""
    if not torch.cuda.device_count():
        problem = f"run.device=cuda, but torch {torch.__version__} sees no CUDA device on this machine"
        raise ConfigError([Violation("device_exists", ("run.device",), problem, fixes=({"run.device": "cpu"},))])


def require_few(resolved: Resolved, *, alone: bool) -> None:
    """Raise ConfigError for more processes than this machine can be meant to start: a record may say any number."""
    nproc, most = resolved.args.run.nproc or 1, max(256, 32 * (os.cpu_count() or 1))
    if alone and nproc > most:
        problem = f"{nproc:,} processes on this machine, which has {os.cpu_count()} cores; at most {most:,} are started"
        raise ConfigError([Violation("processes_fit", ("run.nproc",), problem, hint="say how many with --nproc")])
