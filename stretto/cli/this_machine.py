"""What a run asks of this machine before it starts processes on it."""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module

import torch

from stretto.arguments import Arguments, ConfigError, Resolved, Violation
from stretto.checkpoint.peers import Peers
from stretto.estimate.host import node_memory
from stretto.initialize.host_memory import host_memory
from stretto.report.host_full import host_full
from stretto.train.consensus import require_no_problem
from stretto.world import World


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


def require_host_memory(args: Arguments, world: World) -> None:
    """Raise RunRejectedError on all ranks where those of some host need more memory than it has: the kernel would end
    them without a word, some of them steps later."""
    first, limit = world.rank - world.local_rank, host_memory()
    ranks, problem = range(first, first + world.local_size), None
    if limit is not None:
        problem = host_full(args, partial(node_memory, ranks=ranks), len(ranks), limit)
    said = Peers.of(world, None).gather(problem)
    require_no_problem(((rank, each or "") for rank, each in enumerate(said)), world.size)
