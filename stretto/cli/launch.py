"""`stretto launch`: run on this machine, or write what a cluster needs to run, and submit it on request."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from stretto.arguments import ConfigError, Resolved, parse
from stretto.arguments.command_line import MEGATRON
from stretto.arguments.sources import SourceKind
from stretto.cli.megatron import layer
from stretto.cli.words import FALLBACK
from stretto.launch.kubernetes import KubernetesJob
from stretto.launch.slurm import SlurmJob
from stretto.terminal import hand_on, said_plainly, say

USAGE_ERROR = 2

USAGE = """\
usage: stretto launch local N [options of stretto train]
       stretto launch slurm [--nodes ...] [--submit] [--out FILE] -- [options of stretto train]
       stretto launch k8s [--nodes ...] [--submit] [--out FILE] -- [options of stretto train]

`local` trains with N processes of this machine. `slurm` and `k8s` write a batch script or a JobSet manifest for the
run to standard output or to a file, with --submit also hand it to sbatch or kubectl, and take --help."""


_Out = Annotated[Path | None, tyro.conf.arg(help="file to write; without it, standard output", metavar="FILE")]


@dataclass(frozen=True)
class Slurm(SlurmJob):
    """Write a batch script for SLURM."""

    out: _Out = None
    submit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also hand it to sbatch."""


@dataclass(frozen=True)
class Kubernetes(KubernetesJob):
    """Write a JobSet manifest (jobset.sigs.k8s.io) for Kubernetes."""

    out: _Out = None
    submit: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also hand it to kubectl."""


J = TypeVar("J", Slurm, Kubernetes)


def main(argv: Sequence[str]) -> int:
    """Run `stretto launch ...`; 0, or 2 when the command line or the configuration cannot be used."""
    where, *rest = argv or ("",)
    commands: dict[str, Callable[[Sequence[str]], int]] = {"local": _local, "slurm": _slurm, "k8s": _k8s}
    if where not in commands:
        asked = where in ("-h", "--help")
        say(USAGE, out=asked)
        return 0 if asked else USAGE_ERROR
    try:
        return commands[where](rest)
    except (ConfigError, ValueError, OSError) as error:
        say(f"stretto launch {where}: {error}")
        return USAGE_ERROR


def _local(argv: Sequence[str]) -> int:
    if not argv or not argv[0].isdecimal():
        raise ValueError("how many processes? For example: stretto launch local 8 --tp 2")
    from stretto.cli import train

    at = argv.index(MEGATRON) if MEGATRON in argv else len(argv)  # what follows there is not ours
    return train.main([*argv[1:at], "--nproc", argv[0], *argv[at:]])


def _slurm(argv: Sequence[str]) -> int:
    job = _read(Slurm, argv, "stretto launch slurm")
    return _deliver(job.script(), job.out, ["sbatch"] if job.submit else None)


def _k8s(argv: Sequence[str]) -> int:
    job = _read(Kubernetes, argv, "stretto launch k8s")
    return _deliver(job.manifest(), job.out, ["kubectl", "apply", "-f", "-"] if job.submit else None)


def _read(kind: type[J], argv: Sequence[str], command: str) -> J:
    """The job of the words before `--`, which trains with those behind it. Raises ConfigError where it could not."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    about = f"{kind.__doc__} The options of `stretto train` follow after --, as in {command} --nodes 2 -- --tp 8."
    with said_plainly():
        read = tyro.cli(kind, args=words[:at], prog=command, description=about)
    job: J = replace(read, train=tuple(words[at + 1 :]))
    resolved = _check(job.train, job.ranks)
    job = replace(job, device=resolved.args.run.device)
    if resolved.sources["run.device"].kind is SourceKind.DEFAULT:
        say(f"{command}: the run is on CPUs, so the job asks for no GPUs; for GPUs say --device cuda")
    if resolved.sources["checkpoint.out"].kind is SourceKind.DEFAULT:
        # Two scripts must not go on with each other's run. First, as what follows --megatron is not ours.
        job = replace(job, train=("--out", job.directory, *job.train))
    return job


def _check(train: tuple[str, ...], ranks: int) -> Resolved:
    """The run, which is rejected here if it would only be rejected on the cluster, hours later.

    Its data, its tokenizer, its model and its directory lie there: nobody looks for them here.
    """
    translate = partial(layer, processes=ranks)
    return parse(list(train), world_size=ranks, translate=translate, files=False, fallback=FALLBACK)


def _deliver(text: str, out: Path | None, submit: list[str] | None) -> int:
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if submit is not None:
        return subprocess.run(submit, input=text, text=True, check=False).returncode
    if out is None:
        hand_on(text)
    return 0
