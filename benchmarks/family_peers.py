"""One peer of `benchmarks.families`, in a process of its own: answers requests, as `benchmarks.train.worker` does.

    python -m benchmarks.family_peers PEER < requests > answers

All begin with the weights of one Hugging Face directory and read the same rows. `transformers` has bf16 weights with
flat fp32 masters, fp32 gradients and fused AdamW, which is quicker than autocast over fp32 weights; torchtitan has the
latter on one GPU.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.family_torchtitan import FamilyTorchtitan
from benchmarks.train.data import Rows
from benchmarks.train.measure import step_times, synchronize
from benchmarks.train.peers import RunRejectedError
from benchmarks.train.peers.stretto_peer import Peer as StrettoPeer
from benchmarks.train.peers.stretto_peer import as_words, settings_of
from benchmarks.train.peers.torch_masters import Masters
from benchmarks.train.shapes import Job, Shape
from benchmarks.train.worker import device_name, versions, work
from stretto.arguments import parse
from stretto.initialize import initialize
from stretto.train.build import build
from stretto.train.groups import state_of
from stretto.train.huggingface import init_from
from stretto.train.record import RunRecord
from stretto.train.run import trainer_of

CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PEERS = ("stretto", "stretto-selective", "hf", "hf-compiled", "hf-whole", "torchtitan")
"""`hf` is eager; `hf-compiled` and `torchtitan` compile each layer and the loss, `hf-whole` the whole model as one."""


def words_of(family: str, job: Job, small: bool) -> list[str]:
    """The command line of a run of this preset."""
    words = as_words({"preset": family, "min-lr": job.lr, **settings_of(job), "nproc": 1})
    if small:
        words += shlex.split("--layers 2 --hidden 64 --ffn 96 --vocab 512 --heads 4 --kv-heads 1 --head-dim 16")
        words += ["--global-layers", "1", "--window", "16"] if family.startswith("gemma") else []
    return [*words, *shlex.split(job.words)]


class Stretto(StrettoPeer):
    """`stretto train` of the preset, with the weights of the directory."""

    def __init__(self, family: str, directory: Path, small: bool, more: str) -> None:
        super().__init__(more)
        self.family, self.directory, self.small = family, directory, small

    def setup(self, job: Job, world: Any = None) -> None:
        del world
        self.job = job
        words = [*words_of(self.family, job, self.small), *self._more]
        resolved = parse(words, env={}, world_size=1, files=False)
        args = replace(resolved.args, checkpoint=replace(resolved.args.checkpoint, init_from=str(self.directory)))
        run = args.run
        world = self._stack.enter_context(
            initialize(device=run.device, threads=args.threads, deterministic=args.deterministic, tf32=run.tf32)
        )
        self.state = self._stack.enter_context(state_of(args, resolved.layout, world))
        self.built = build(args, self.state, draw=False)
        self._stack.callback(self.built.weights.close)
        init_from(args, self.built)
        listener = self._listener()
        listener.started(RunRecord(run.steps))
        self.loop = trainer_of(args, self.built, Rows(job, 0).feed, ()).loop(run.steps, listener)

    def about(self) -> dict[str, Any]:
        return {"words": [*words_of(self.family, self.job, self.small), *self._more]}


class Transformers:
    """`AutoModelForCausalLM` in a loop of plain PyTorch."""

    def __init__(self, directory: Path, way: str) -> None:
        self.directory, self.way, self._stack = directory, way, ExitStack()
        self.kernels: Callable[[], Any] = nullcontext

    def setup(self, job: Job) -> None:
        from transformers import AutoModelForCausalLM

        self.job, self.device = job, torch.device(job.device)
        flash = job.device == "cuda" and importlib.util.find_spec("flash_attn") is not None
        self.attention = "flash_attention_2" if flash else "sdpa"
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation=self.attention
        )
        model.config.use_cache = False
        model.get_input_embeddings().padding_idx = None  # Gemma's token 0 has no gradient else, and rows are random
        model = model.to(self.device).train()
        self.masters = Masters(model, dtype=torch.bfloat16 if job.dtype == "bf16" else torch.float32, lr=job.lr)
        self.model, self.rows = model, Rows(job, 0)
        if self.way == "compiled":
            for layer in model.model.layers:
                layer.compile()
            model._loss_function = torch.compile(model.loss_function)
        elif self.way == "whole":
            self.model = torch.compile(model)
        if job.device == "cuda" and self.way and not flash:
            self.kernels = lambda: sdpa_kernel(CUDNN_FIRST, set_priority=True)

    def step(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        batches = self.rows.next()
        for n, batch in enumerate(batches):
            tokens, labels = (t.to(self.device, non_blocking=True) for t in (batch.tokens, batch.labels))
            self.masters.begin(first=n == 0, last=n == len(batches) - 1)
            with self.kernels():
                loss = self.model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss
                loss = loss / len(batches)
                loss.backward()
            total += loss.detach()
        self.masters.step()
        return total

    def about(self) -> dict[str, Any]:
        import transformers

        return {"attention": self.attention, "way": self.way or "eager", "transformers": transformers.__version__}

    def close(self) -> None:
        self._stack.close()


def create(name: str, family: str, directory: Path, small: bool) -> Any:
    """The peer of this name. Raises RunRejectedError."""
    if name not in PEERS:
        raise RunRejectedError(f"unknown peer: there are {', '.join(PEERS)}")
    kind, _, way = name.partition("-")
    if kind == "stretto":
        return Stretto(family, directory, small, f"--recompute {way}" if way else "")
    if kind == "torchtitan":
        return FamilyTorchtitan(directory)
    return Transformers(directory, way)


class Worker:
    """What can be asked of a peer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, family: str, directory: str, small: bool, shape: dict[str, Any], **job: Any) -> dict[str, Any]:
        """Weights are there afterwards; no step was made."""
        began = time.monotonic()
        self.job = Job(shape=Shape(**shape), **job)
        self.device = torch.device(self.job.device)
        self.peer = create(self.name, family, Path(directory), small)
        self.peer.setup(self.job)
        name = device_name(self.device)
        return {
            "seconds": time.monotonic() - began,
            "device": name,
            "versions": versions(),
            "about": self.peer.about(),
        }

    def first(self) -> dict[str, float]:
        """The first step: its loss, before any update, and its seconds, in which things are compiled."""
        began = time.monotonic()
        loss = float(self.peer.step())
        return {"loss": loss, "seconds": time.monotonic() - began}

    def steps(self, count: int, warm: int) -> dict[str, Any]:
        """Milliseconds of `count` steps after `warm` others; the last loss, and the peak of memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step_times(self.peer.step, warm, self.device)
        losses: list[Tensor] = []
        times = step_times(lambda: losses.append(self.peer.step().detach()), count, self.device)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {"ms": times, "loss": float(losses[-1]), "peak": peak}

    def close(self) -> None:
        """Leave."""
        self.peer.close()

    def rest(self) -> None:
        """What was cached is given back: the others need the memory."""
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    work(Worker(sys.argv[1]))
