"""Checkpoints measured: what a save stalls training and takes in all, and how fast a load is.

    python -m benchmarks.checkpoints save [--gib 0.5] [--repeat 3]     beside torch.distributed.checkpoint's async_save
    python -m benchmarks.checkpoints save --device cuda --gib 16 --repeat 1    from a GPU, beside steps of training
    python -m benchmarks.checkpoints load [--gib 0.5] [--repeat 3]     in another layout, as a share of the disk's rate;
                                                                       seconds of the processor, for each GB of the file

What metadata costs at many ranks: `benchmarks.checkpoint_metadata`.

Results go to benchmarks/results with --results. What is compared runs in turns in one process, on a CPU unless
--device says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from stretto.checkpoint import Saver, load, save
from stretto.params import Slice
from stretto.world import World

ROWS, WIDTH = 4096, 1024
HERE = World.single()


def tensors(gib: float, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Matrices of 16 MiB, in fp32."""
    count = max(1, round(gib * 2**30 / (ROWS * WIDTH * 4)))
    return {f"model/layers.{i}.weight": torch.randn(ROWS, WIDTH, device=device) for i in range(count)}


def slices(held: dict[str, torch.Tensor]) -> list[Slice]:
    return [Slice(name, x, tuple(x.shape), (0, 0), True) for name, x in held.items()]


@contextmanager
def folder(scratch: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        yield Path(name)


def step(a: torch.Tensor) -> torch.Tensor:
    """What training does meanwhile."""
    return a @ a


def timed(begin: Callable[[], Any], end: Callable[[Any], Any]) -> tuple[float, float, float]:
    """Seconds until training goes on, seconds in all, and the steps of training per second meanwhile."""
    a, began, steps = torch.randn(512, 512), time.perf_counter(), 0
    under_way = begin()
    stall = time.perf_counter() - began
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        step(a)
        steps += 1
    end(under_way)
    return stall, time.perf_counter() - began, steps / 0.2


def saves(gib: float, repeat: int, scratch: Path | None) -> dict[str, Any]:
    held = tensors(gib)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    found: dict[str, list[tuple[float, float, float]]] = {}
    saver = Saver(HERE)
    saver.reserve(slices(held))
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    stager = DefaultStager(StagingOptions(False, True, False, False))
    with folder(scratch) as where:
        for n in range(repeat + 1):  # the first of each is thrown away: memory is taken, processes start

            def ours(n: int = n) -> None:
                saver.begin(where / "stretto", n, slices(held), {})

            def theirs(kind: AsyncCheckpointerType, name: str, n: int = n) -> Any:
                return dcp.async_save(
                    held, checkpoint_id=where / name / f"{n}", async_checkpointer_type=kind, async_stager=stager
                )

            ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
                "stretto": (ours, lambda _: saver.finish()),
                "torch async_save, thread": (lambda: theirs(AsyncCheckpointerType.THREAD, "thread"), _finished),
                "torch async_save, process": (lambda: theirs(AsyncCheckpointerType.PROCESS, "process"), _finished),
                "stretto, synchronous": (lambda n=n: save(where / "sync", n, slices(held), {}, HERE), lambda _: None),
            }
            for name, (begin, end) in ways.items():
                one = timed(begin, end)
                if n:
                    found.setdefault(name, []).append(one)
            for each in where.iterdir():
                shutil.rmtree(each)
    saver.close()
    dist.destroy_process_group()
    size = sum(x.nbytes for x in held.values())
    return {"bytes": size} | {
        name: dict(
            zip(
                ("stall_s", "total_s", "steps_per_s_meanwhile"),
                map(statistics.median, zip(*ones, strict=True)),
                strict=True,
            )
        )
        for name, ones in found.items()
    }


def _finished(response: Any) -> None:
    getattr(response, "upload_completion", response).result()


def loads(gib: float, repeat: int, scratch: Path | None) -> dict[str, Any]:
    """One rank of two reads its half, cut along the other dim than it was written."""
    held = tensors(gib)
    found: dict[str, list[tuple[float, float]]] = {}
    with folder(scratch) as where:
        path = save(where, 1, slices(held), {}, HERE)
        (file,) = path.glob("*.distcp")
        size = file.stat().st_size
        whole = {name: torch.ones_like(x) for name, x in held.items()}
        half = [Slice(n, torch.ones(ROWS, WIDTH // 2), (ROWS, WIDTH), (0, WIDTH // 2), True) for n in held]
        state = {name: torch.ones_like(x) for name, x in held.items()}

        def disk() -> None:
            with file.open("rb", buffering=0) as stream:
                buffer = bytearray(2**23)
                while stream.readinto(buffer):
                    pass

        def torchs() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(state, checkpoint_id=path, no_dist=True)

        ways: dict[str, Callable[[], Any]] = {
            "disk": disk,
            "stretto_same_layout": lambda: load(path, slices(whole), HERE),
            "stretto_other_layout": lambda: load(path, half, HERE),
            "torch_dcp_load": torchs,
        }
        for _ in range(repeat):  # in turns: a slow minute of the machine is one of all
            for name, way in ways.items():
                _forget(file)
                began, cpu = time.perf_counter(), time.process_time()
                way()
                found.setdefault(name, []).append((time.perf_counter() - began, time.process_time() - cpu))
        same = all(torch.equal(x[name], held[name]) for x in (whole, state) for name in held)
        same &= all(torch.equal(s.tensor, held[s.name][:, WIDTH // 2 :]) for s in half)
    share = [d / own for (d, _), (own, _) in zip(found["disk"], found["stretto_other_layout"], strict=True)]
    said: dict[str, Any] = {"bytes": size, "equal": same, "load_average": os.getloadavg()}
    for name, each in found.items():
        seconds, cpu = (statistics.median(column) for column in zip(*each, strict=True))
        said |= {f"{name}_GB_per_s": size / seconds / 1e9, f"{name}_cpu_s_per_GB": cpu / size * 1e9}
    return said | {"other_layout_share_of_disk": statistics.median(share)}


def _forget(file: Path) -> None:
    """Out of the page cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("save", "load"))
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--results", "--out", type=Path, help="a file of JSON that this is added to")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="save: beside steps of training on it")
    parser.add_argument("--step-ms", type=float, default=270.0, help="with --device: of a step")
    parser.add_argument("--ways", default="stretto,torch-thread", help="with --device: of these, torch-process")
    args = parser.parse_args()
    if args.device:
        from benchmarks.checkpoint_steps import beside_steps

        held = tensors(args.gib, args.device)
        found = beside_steps(held, folder(args.scratch), args.ways, args.repeat, args.step_ms)
    else:
        found = (saves if args.what == "save" else loads)(args.gib, args.repeat, args.scratch)
    if not args.device:
        print(json.dumps(found, indent=1))
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(args.results.read_text()) if args.results.exists() else {}
        flags = f"--gib {args.gib:g} --repeat {args.repeat}"
        if args.device:
            flags += f" --device {args.device} --step-ms {args.step_ms:g} --ways {args.ways}"
        known[f"{args.what} {args.device}" if args.device else args.what] = {
            "command": f"python -m benchmarks.checkpoints {args.what} {flags}",
            "cores": os.cpu_count(),
        } | found
        args.results.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
