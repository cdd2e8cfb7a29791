"""Stretto as its users run it: settings, groups, `build`, and the loop of `stretto train` with its listeners."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from torch import Tensor

from benchmarks.train.data import Rows
from benchmarks.train.peers import RunRejectedError, peak_of
from benchmarks.train.shapes import Job
from stretto.arguments import ConfigError, parse
from stretto.initialize import initialize
from stretto.report.progress import LiveProgress
from stretto.train.build import build
from stretto.train.groups import state_of
from stretto.train.metrics_file import JsonLines
from stretto.train.record import Everyone, Listener, RunRecord
from stretto.train.run import trainer_of
from stretto.world import World


def words_of(job: Job) -> list[str]:
    """The command line of `stretto train` for a job; the job's own words come last and win."""
    shape, size = job.shape, job.size
    said: dict[str, Any] = {
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "kv-heads": shape.kv_heads,
        "ffn": shape.ffn,
        "vocab": shape.vocab,
        "activation": shape.activation,
        "norm": "rms",
        "position": "rope",
        "dropout": 0.0,
        **settings_of(job),
        "tp": size("tp"),
        "pp": size("pp"),
    }
    more = ["--no-tied", *(["--sequence-parallel"] if size("tp") > 1 else [])]
    return [*as_words(said), *more, *shlex.split(job.words)]


def settings_of(job: Job) -> dict[str, Any]:
    """What a job says beside its model and layout, by the names of the command line."""
    shape = job.shape
    return {
        "seq-len": shape.seq_len,
        "micro-batch": shape.micro_batch,
        "global-batch": shape.global_batch,
        "lr": job.lr,
        "lr-schedule": "constant",
        "warmup-steps": 0,
        "steps": 100_000,
        "seed": job.seed,
        "dtype": job.dtype,
        "device": job.device,
        "nproc": job.nproc,
    }


def as_words(said: Mapping[str, Any]) -> list[str]:
    """`--name value` of each."""
    return [word for name, value in said.items() for word in (f"--{name}", str(value))]


class Peer:
    """See `benchmarks.train.peers.Peer`. A variant is more words of the command line."""

    def __init__(self, variant: str = "") -> None:
        self._more = shlex.split(variant)
        self._stack = ExitStack()

    def setup(self, job: Job, world: World | None = None) -> None:
        """In `world`, or in that of the launch environment."""
        self.job = job
        try:
            resolved = parse([*words_of(job), *self._more], env={}, world_size=job.nproc, files=False)
        except ConfigError as error:
            raise RunRejectedError(str(error)) from error
        self.args = args = resolved.args
        run = args.run
        if world is None:
            context = initialize(
                device=run.device, threads=args.threads, deterministic=args.deterministic, tf32=run.tf32
            )
            world = self._stack.enter_context(context)
        self.state = self._stack.enter_context(state_of(args, resolved.layout, world))
        self.built = build(args, self.state)
        self._stack.callback(self.built.weights.close)
        feed = Rows(job, self.state.axis("dp").rank).feed
        listener = self._listener()
        listener.started(RunRecord(run.steps))
        trainer = trainer_of(args, self.built, feed, ())
        self.loop = trainer.loop(run.steps, listener)

    def _listener(self) -> Listener:
        """What a run has on rank 0: the file of metrics, and a line for each step, which nobody sees."""
        if self.state.world.rank:
            return Everyone([])
        files = Path(self._stack.enter_context(TemporaryDirectory()))
        unseen = Console(file=self._stack.enter_context((files / "progress").open("w")))
        lines = LiveProgress(unseen, "lines")
        told = Everyone([JsonLines(files / "metrics.jsonl", after=0), lines])
        self._stack.callback(told.close)
        return told

    def step(self) -> Tensor:
        return self.loop.advance().loss / self.job.nproc  # every rank has the whole one

    def held(self) -> dict[str, list[Tensor]]:
        buckets = self.built.weights.all_buckets
        state = [piece.tensor for piece in self.built.optimizer.slices()]
        sharding = self.built.weights.sharding
        weights = [bucket.shard if sharding.params else bucket.weights for bucket in buckets]
        gradients = [bucket.grad if sharding.grads else bucket.grads for bucket in buckets]
        held = {"weights": weights, "gradients": gradients, "optimizer": state}
        in_fp8 = [tensor for each in self.built.fp8 for tensor in each.held()]
        return held | ({"weights in 8 bits": in_fp8} if self.built.fp8 else {})

    def about(self) -> dict[str, Any]:
        timed = "the training loop: feed, step, metrics.jsonl and a line of progress"
        words = [*words_of(self.job), *self._more]
        mode = [] if "--sharding" in words else ["--sharding", self.args.parallel.mode]  # defaults change
        return {"words": [*words, *mode], "timed": timed}

    @property
    def peak_bytes(self) -> int:
        return peak_of(self.job.device) + self.state.peer_bytes

    def close(self) -> None:
        self._stack.close()
