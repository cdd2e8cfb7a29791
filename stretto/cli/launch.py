"""`stretto launch`: run on this machine, or write what a cluster needs to run, and submit it on request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from stretto.arguments import ConfigError
from stretto.arguments.command_line import MEGATRON
from stretto.cli.megatron import layer
from stretto.cli.settings import parse_or_demo
from stretto.launch.kubernetes import KubernetesJob
from stretto.launch.slurm import SlurmJob

USAGE_ERROR = 2

USAGE = """\
usage: stretto launch local N [options of stretto train]
       stretto launch slurm [--nodes ...] [--submit] [--out FILE] -- [options of stretto train]
       stretto launch k8s [--nodes ...] [--submit] [--out FILE] -- [options of stretto train]

`local` trains with N processes of this machine. `slurm` and `k8s` write a batch script or a JobSet manifest for the
run to standard output or to a file, with --submit also hand it to sbatch or kubectl, and take --help."""


def main(argv: Sequence[str]) -> int:
    """Run `stretto launch ...`; 0, or 2 when the command line or the configuration cannot be used."""
    where, *rest = argv or ("",)
    commands: dict[str, Callable[[Sequence[str]], int]] = {"local": _local, "slurm": _slurm, "k8s": _k8s}
    if where not in commands:
        asked = where in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else USAGE_ERROR
    try:
        return commands[where](rest)
    except (ConfigError, ValueError, OSError) as error:
        print(f"stretto launch {where}: {error}", file=sys.stderr)
        return USAGE_ERROR


def _local(argv: Sequence[str]) -> int:
    if not argv or not argv[0].isdecimal():
        raise ValueError("how many processes? For example: stretto launch local 8 --tp 2")
    from stretto.cli import train

    at = argv.index(MEGATRON) if MEGATRON in argv else len(argv)  # what follows there is not ours
    return train.main([*argv[1:at], "--nproc", argv[0], *argv[at:]])


def _slurm(argv: Sequence[str]) -> int:
    words, train, out, submit = _split(argv)
    job = replace(tyro.cli(SlurmJob, args=words, prog="stretto launch slurm"), train=train)
    _check(job.train, job.ranks)
    return _deliver(job.script(), out, ["sbatch"] if submit else None)


def _k8s(argv: Sequence[str]) -> int:
    words, train, out, submit = _split(argv)
    job = replace(tyro.cli(KubernetesJob, args=words, prog="stretto launch k8s"), train=train)
    _check(job.train, job.ranks)
    return _deliver(job.manifest(), out, ["kubectl", "apply", "-f", "-"] if submit else None)


def _split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...], Path | None, bool]:
    """(options of the job, options of the run, file to write, whether to submit)."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    words, train = words[:at], tuple(words[at + 1 :])
    submit = "--submit" in words
    out: Path | None = None
    if "--out" in words:
        where = words.index("--out")
        if where + 1 == len(words):
            raise ValueError("--out: which file?")
        out = Path(words[where + 1])
        del words[where : where + 2]
    return [word for word in words if word != "--submit"], train, out, submit


def _check(train: tuple[str, ...], ranks: int) -> None:
    """Refuse a run here that would only be refused on the cluster, hours later."""
    parse_or_demo(list(train), world_size=ranks, translate=layer)


def _deliver(text: str, out: Path | None, submit: list[str] | None) -> int:
    if out is not None:
        out.write_text(text)
    if submit is not None:
        return subprocess.run(submit, input=text, text=True, check=False).returncode
    if out is None:
        print(text, end="")
    return 0
