"""`stretto launch`: run on this machine, or write what a cluster needs to run, and submit it on request."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from stretto.arguments import ConfigError, Resolved, parse
from stretto.arguments.command_line import MEGATRON, Sources, flags
from stretto.arguments.form import Form
from stretto.arguments.help import say_help
from stretto.arguments.setting import setting, settings_in
from stretto.arguments.sources import SourceKind
from stretto.cli.command import USAGE_ERROR, chosen, options
from stretto.cli.megatron import layer
from stretto.cli.words import FORMS as TRAIN
from stretto.cli.words import of_run
from stretto.launch.kubernetes import KubernetesJob
from stretto.launch.slurm import SlurmJob
from stretto.terminal import hand_on, say

_OUT = "file to write; unset: standard output"
_OF_RUN: Final = frozenset({*flags(), MEGATRON, *(s.flag for s in settings_in(Sources))})
_TAIL = " -- [settings of stretto train], as in -- --tp 8"


@dataclass(frozen=True)
class Local:
    """Train with so many processes of this machine."""

    processes: int = setting(1, "how many", positional=True, at_least=1)


@dataclass(frozen=True)
class Slurm(SlurmJob):
    """Write a batch script for SLURM; what the run takes follows after --."""

    out: str | None = setting(None, _OUT, path=True, named="FILE")
    submit: bool = setting(False, "also hand it to sbatch")


@dataclass(frozen=True)
class Kubernetes(KubernetesJob):
    """Write a JobSet for Kubernetes; what the run takes follows after --. Its API is jobset.sigs.k8s.io."""

    out: str | None = setting(None, _OUT, path=True, named="FILE")
    submit: bool = setting(False, "also hand it to kubectl")


FORMS: Final = (
    of_run("launch local", Local),
    Form("stretto launch slurm", Slurm, tail=_TAIL),
    Form("stretto launch k8s", Kubernetes, tail=_TAIL),
)


def main(argv: Sequence[str]) -> int:
    """Run `stretto launch ...`; 0, or 2 when the command line or the configuration cannot be used."""
    form, rest = chosen(FORMS, argv)
    commands: dict[type, Callable[[Sequence[str]], int]] = {Local: _local, Slurm: _slurm, Kubernetes: _k8s}
    try:
        return commands[form.own](rest)
    except (ConfigError, ValueError, OSError) as error:
        say(f"{form.name}: {error}")
        return USAGE_ERROR


def _local(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv[:1]):
        say_help(FORMS[0])
    if not argv or not argv[0].isdecimal():
        raise ValueError("how many processes? For example: stretto launch local 8 --tp 2")
    from stretto.cli import train

    at = argv.index(MEGATRON) if MEGATRON in argv else len(argv)  # what follows there is not ours
    return train.main([*argv[1:at], "--nproc", argv[0], *argv[at:]])


def _slurm(argv: Sequence[str]) -> int:
    job: Slurm = _read(FORMS[1], argv)
    return _deliver(job.script(), job.out, ["sbatch"] if job.submit else None)


def _k8s(argv: Sequence[str]) -> int:
    job: Kubernetes = _read(FORMS[2], argv)
    return _deliver(job.manifest(), job.out, ["kubectl", "apply", "-f", "-"] if job.submit else None)


def _read(form: Form, argv: Sequence[str]) -> Any:
    """The job of the words before `--`, which trains with those behind it. Raises ConfigError where it could not."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    _require_own(form, words[:at])
    job = replace(options(form, words[:at]), train=tuple(words[at + 1 :]))
    resolved = _check(job.train, job.ranks)
    job = replace(job, device=resolved.args.run.device)
    if resolved.sources["run.device"].kind is SourceKind.DEFAULT:
        say(f"{form.name}: the run is on CPUs, so the job asks for no GPUs; for GPUs say --device cuda")
    if resolved.sources["checkpoint.out"].kind is SourceKind.DEFAULT:
        # Two scripts must not go on with each other's run. First, as what follows --megatron is not ours.
        job = replace(job, train=("--out", job.directory, *job.train))
    return job


def _require_own(form: Form, words: Sequence[str]) -> None:
    """Raise ValueError for a setting of the run among the options of the job: it belongs behind the dashes."""
    own = {s.flag for s in settings_in(form.own)}
    for word in words:
        flag = word.partition("=")[0]
        if flag in _OF_RUN and flag not in own:
            raise ValueError(f"{flag} is a setting of the run, which follow after --: {form.name} ... -- {flag} ...")


def _check(train: tuple[str, ...], ranks: int) -> Resolved:
    """The run, which is rejected here if it would only be rejected on the cluster, hours later.

    Its data, its tokenizer, its model and its directory lie there: nobody looks for them here.
    """
    translate = partial(layer, processes=ranks)
    return parse(list(train), world_size=ranks, translate=translate, files=False, form=TRAIN[0])


def _deliver(text: str, out: str | None, submit: list[str] | None) -> int:
    if out is not None:
        try:
            Path(out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error
    if submit is not None:
        try:
            return subprocess.run(submit, input=text, text=True, check=False).returncode
        except OSError as error:
            raise ValueError(f"--submit: {submit[0]} cannot be started here: {error.strerror}") from error
    if out is None:
        hand_on(text)
    return 0
