"""One rank of one peer: answers the conductor's requests, one line of JSON each, until there are no more.

    python -m benchmarks.train.worker PEER < requests > answers

What libraries print goes to standard error, so that answers stay whole.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.train import ceiling
from benchmarks.train.flops import product_flops
from benchmarks.train.measure import step_times
from benchmarks.train.memory import itemised
from benchmarks.train.peers import Peer, RunRejectedError, create
from benchmarks.train.shapes import SHAPES, Job
from benchmarks.train.trace import trace_step
from benchmarks.train.waterfall import waterfall

CEILING = "ceiling"
"""In the place of a peer's name: measures rates."""


class Worker:
    """A peer, and what can be asked of it. Every request returns what JSON can say."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.peer: Peer | None = None

    def setup(self, job: dict[str, Any]) -> dict[str, Any]:
        """Make the peer; where it runs, and what it says of itself."""
        self.job = Job(**{**job, "shape": SHAPES[job["shape"]]})
        self.rank = int(os.environ["RANK"])
        self.device = torch.device(self.job.device, self.rank) if self.job.device == "cuda" else torch.device("cpu")
        if self.job.device == "cuda":
            if torch.cuda.device_count() < self.job.nproc:
                raise RunRejectedError(
                    f"torch sees {torch.cuda.device_count()} CUDA devices, {self.job.nproc} are needed"
                )
            torch.cuda.set_device(self.device)
        if self.name != CEILING:
            self.peer = create(self.name)
            self.peer.setup(self.job)
            self.rest()
            if self.job.device == "cuda":
                torch.cuda.reset_peak_memory_stats()  # initial values are drawn in fp32 and more
        return {
            "device": device_name(self.device),
            "versions": versions(),
            "about": self._peer.about() if self.peer else {},
        }

    def steps(self, count: int, warm: int) -> dict[str, Any]:
        """Milliseconds of `count` steps after `warm` others, and what they lost last; memory is given back."""
        step_times(self._peer.step, warm, self.device)
        losses = []
        times = step_times(lambda: losses.append(self._peer.step().detach()), count, self.device)
        loss = losses[-1].item() if losses else None
        losses.clear()
        peak = self._peer.peak_bytes
        return {"ms": times, "loss": loss, "peak": peak}

    def about(self) -> dict[str, Any]:
        """What the peer says of itself, when it has compiled what it compiles."""
        return dict(self._peer.about())

    def memory(self) -> dict[str, float]:
        """The items of `benchmarks.train.memory`."""
        return itemised(self._peer)

    def waterfall(self, step_ms: float, tflops: float, keep: str) -> dict[str, Any]:
        """Of one step; `keep` is a file for the whole trace, or ""."""
        pp, shape = self.job.size("pp"), self.job.shape
        head = pp == 1 or self.rank == pp - 1
        tokens = shape.tokens / (self.job.nproc / pp)  # a stage sees all tokens of its replica
        flops = product_flops(shape, tokens, layers=shape.layers // pp, head=head)
        try:
            kernels, window = trace_step(self._peer.step, self.device, Path(keep) if keep and self.rank == 0 else None)
        except RuntimeError as error:  # no profiler here: the times stand all the same
            return {"problem": str(error)}
        found = waterfall(kernels, window, step=step_ms, product_flops=flops, tflops=tflops, pipeline=pp > 1)
        return {"items_ms": found.items, "sum_ms": found.total, "step_ms": step_ms, "holds": found.holds}

    def ceiling(self, seconds: float) -> dict[str, Any]:
        """The rates of the first device, at work alone."""
        return ceiling.measure(self.job, self.device, lambda line: print(line, file=sys.stderr), seconds=seconds)

    def close(self) -> None:
        """Leave."""
        if self.peer is not None:
            self.peer.close()

    @property
    def _peer(self) -> Peer:
        if self.peer is None:
            raise RuntimeError(f"{self.name} was not set up")
        return self.peer

    def rest(self) -> None:
        """Between requests a peer holds what it must keep, and no more: the others need the memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def serve(worker: Worker, requests: IO[str], answers: IO[str]) -> None:
    """Answer until the requests end. What goes wrong is an answer too; then nothing else is answered."""
    for line in requests:
        request = json.loads(line)
        what = request.pop("do")
        try:
            answer = {"ok": getattr(worker, what)(**request)}
            worker.rest()
        except RunRejectedError as error:
            answer = {"rejected": str(error)}
        except ImportError as error:
            answer = {"rejected": f"{error} ({error.name} is not installed here, or lacks what this peer needs)"}
        except Exception as error:  # noqa: BLE001  # a peer's own failure, of any kind, must not end the run
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "ok" not in answer:
            return


def device_name(device: torch.device) -> str:
    """As a report calls it."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"


def versions() -> dict[str, str | None]:
    """Of what a benchmark ran with."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda
    if torch.version.cuda:
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in (
        "stretto",
        "triton",
        "torchtitan",
        "megatron-core",
        "transformer-engine",
        "flash-attn",
        "transformers",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def work(worker: Worker) -> None:
    """Answer the conductor on what was standard output; what others print goes to the log.

    A rank that failed may leave others in a collective: the conductor ends them.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(worker, sys.stdin, answers)


if __name__ == "__main__":
    work(Worker(sys.argv[1]))
