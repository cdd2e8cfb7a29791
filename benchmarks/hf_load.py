"""How long the weights of a Hugging Face model take in and out, beside the disk, transformers and torch's own reader.

    python -m benchmarks.hf_load --results benchmarks/results/cpu/hf_load.json

It writes a model of that shape with random weights in bf16 to a temporary directory. Each way takes it in a process
of its own, in turns: from the disk, whose pages were dropped by `posix_fadvise` (that none is in the page cache is
looked up by `mincore`), then all once more from the page cache. Peaks are of the process, less what it had before, the
tensors that it fills among that; seconds of the processor are of all its threads, user and kernel. Ways out write the
same bytes and wait until they are on the disk. Shares of the disk are those of the same turn, and their median counts.
The processes are forks of one that has imported everything. No turn begins that would not end within `--seconds`, if
it took as long as the one before; the first is made in any case.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import mmap
import os
import platform
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

IN = ("read", "ours fp32", "transformers fp32", "ours bf16", "transformers bf16", "torch bf16")
OUT = ("write", "ours out", "transformers out")
_ALL = (
    *("torch.distributed.checkpoint", "safetensors.torch", "transformers", "stretto.arguments"),
    *("transformers.models.gemma3.modeling_gemma3", "transformers.models.qwen3.modeling_qwen3"),
    *("stretto.interop.config", "stretto.interop.load", "stretto.interop.export", "stretto.interop.shapes"),
    "stretto.interop.write",
)


def read(directory: Path) -> Callable[[], object]:
    """The bytes of the files, into a buffer that is used again."""

    def work() -> None:
        buffer = bytearray(1 << 24)
        for file in directory.glob("*.safetensors"):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    return work


def ours(directory: Path, dtype: str) -> Callable[[], object]:
    """Into whole logical tensors, of fp32 as master weights are, or of bf16."""
    import torch

    from stretto.interop.config import read_config
    from stretto.interop.load import load_weights
    from stretto.interop.shapes import logical_shapes
    from stretto.params import Slice

    config = read_config(directory)
    shapes = logical_shapes(config.model, 16)
    found = {name: torch.ones(shape, dtype=getattr(torch, dtype)) for name, shape in shapes.items()}
    slices = [Slice(name, x, tuple(x.shape), (0,) * x.dim(), True) for name, x in found.items()]
    return lambda: load_weights(directory, config, shapes, slices)


def transformers(directory: Path, dtype: str) -> Callable[[], object]:
    """`from_pretrained`; the tensors that it fills are its own."""
    import torch
    from transformers import AutoModelForCausalLM

    def work() -> object:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        for x in model.parameters():  # it maps the files: what is not touched was not read
            x.data.view(-1)[:: 4096 // x.element_size()].sum()
        return model

    return work


def torchs(directory: Path) -> Callable[[], object]:
    """`HuggingFaceStorageReader` of torch.distributed.checkpoint, into tensors of the dtype of the files."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors import safe_open
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {n: torch.ones(opened.get_slice(n).get_shape(), dtype=torch.bfloat16) for n in opened.keys()}  # noqa: SIM118
    return lambda: dcp.load(found, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)


def written(directory: Path, way: str, to: Path) -> Callable[[], object]:
    """Out of memory into `to`, and onto the disk."""
    import torch

    from stretto.interop.config import read_config
    from stretto.interop.export import export, plan
    from stretto.interop.shapes import logical_shapes

    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    config = read_config(directory)
    shapes = logical_shapes(config.model, 4096)
    named = plan(config, shapes, torch.bfloat16, None)
    source = {} if way != "ours out" else {n: torch.ones(shape, dtype=torch.bfloat16) for n, shape in shapes.items()}
    model: Any = None
    if way == "transformers out":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    def work() -> None:
        to.mkdir()
        if way == "write":
            chunk = memoryview(bytearray(1 << 24))
            with (to / "x.safetensors").open("wb", buffering=0) as stream:
                for begin in range(0, size, len(chunk)):
                    stream.write(chunk[: size - begin])
        elif way == "ours out":
            export(to, config.raw, named, lambda wanted: {n: source[n] for n in wanted}, limit=10**9)
        else:
            model.save_pretrained(to, max_shard_size="1GB")
        for file in to.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    return work


def way_of(name: str, directory: Path, to: Path) -> Callable[[], object]:
    """What is timed, ready to run."""
    kind, _, dtype = name.partition(" ")
    if name in OUT:
        return written(directory, name, to)
    if kind == "read":
        return read(directory)
    if kind == "torch":
        return torchs(directory)
    return (ours if kind == "ours" else transformers)(directory, {"fp32": "float32", "bf16": "bfloat16"}[dtype])


def main() -> None:
    """Print seconds, GB/s and peak of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma3-270m")
    parser.add_argument("--repeat", type=int, default=5, help="turns, at most")
    parser.add_argument("--seconds", type=float, default=210.0, help="for all turns")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--scratch", help="where the model is written: a directory on the disk in question")
    parser.add_argument("--ways", default=",".join((*IN, *OUT)), help="which, separated by commas")
    parser.add_argument("--disk-only", action="store_true", help="nothing from the page cache")
    asked = parser.parse_args()
    for name in _ALL:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="stretto-hf-", dir=asked.scratch) as name:
        size = int(_in_a_fork(lambda: {"bytes": _write(Path(name), asked.preset)})["bytes"])
        runs: dict[str, list[dict[str, float]]] = {}
        ways, began, longest = asked.ways.split(","), time.monotonic(), 0.0
        jobs = [(way, True) for way in ways]
        jobs += [(way, False) for way in ways if way in IN and not asked.disk_only]
        for turn in range(asked.repeat):  # a slow minute of the machine is one of all
            since = time.monotonic()
            if turn and since - began + longest > asked.seconds:
                break
            for way, cold in jobs:
                drop(Path(name)) if cold else read(Path(name))()
                key = f"{way}, {'disk' if cold else 'page cache'}"
                runs.setdefault(key, []).append(_in_a_fork(partial(_one, way, Path(name))))
            longest = max(longest, time.monotonic() - since)
            _tell(asked, size, runs)


def _tell(asked: argparse.Namespace, size: int, runs: Mapping[str, list[dict[str, float]]]) -> None:
    """The median of each way so far; a run that is cut short has told of what it did."""
    found = {}
    for key, each in runs.items():
        way, _, state = key.partition(", ")
        seconds = [run["seconds"] for run in each]
        plain = [run["seconds"] for run in runs.get(f"{'write' if way in OUT else 'read'}, {state}", each)]
        share = statistics.median(disk / own for disk, own in zip(plain, seconds, strict=False))
        middle = statistics.median(seconds)
        cpu = statistics.median(run["cpu"] for run in each) / size * 1e9
        found[key] = {"seconds": middle, "gb_per_s": size / middle / 1e9, "of_the_disk": share, "all": seconds}
        found[key] |= {"cpu_s_per_gb": cpu, "peak_mb": statistics.median(run["mb"] for run in each)}
        line = f"{key:30} {middle:6.2f} s {size / middle / 1e9:6.2f} GB/s  {share:5.2f} of the disk"
        print(f"{line}  {cpu:5.2f} s of CPU a GB  peak {found[key]['peak_mb']:6.0f} MB")
    print(flush=True)
    if asked.results:
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks.hf_load --preset {asked.preset} --repeat {asked.repeat}"
        machine = {"command": command, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        turns = max(map(len, runs.values()))
        load = {"preset": asked.preset, "bytes": size, "turns": turns, "load_average": os.getloadavg()}
        asked.results.write_text(json.dumps({**machine, **load, "ways": found}, indent=1) + "\n")


def drop(directory: Path) -> None:
    """Take the files out of the page cache, for certain. Raises RuntimeError where some page stays."""
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if left := cached(file):
            raise RuntimeError(f"{left} pages of {file} stay in the page cache: its reads would not be the disk's")


def cached(file: Path) -> int:
    """How many pages of a file are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    size, page = file.stat().st_size, mmap.PAGESIZE
    descriptor = os.open(file, os.O_RDONLY)
    at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    os.close(descriptor)
    pages = (ctypes.c_ubyte * -(-size // page))()
    wrong = libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), pages)
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    if wrong:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(each & 1 for each in pages)


def _in_a_fork(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What a process gives that begins as this one stands: everything is imported, no thread was started."""
    reads, writes = os.pipe()
    if not (pid := os.fork()):
        try:
            os.write(writes, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001  a fork must not go on as its parent
            traceback.print_exc()
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads) as said:
        text = said.read()
    os.waitpid(pid, 0)
    found: dict[str, float] = json.loads(text)
    return found


def _one(way: str, directory: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="out-", dir=directory) as to:
        work = way_of(way, directory, Path(to) / "to")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, cpu, since = _memory("VmRSS"), time.process_time(), time.perf_counter()
        kept = work()
        seconds, cpu = time.perf_counter() - since, time.process_time() - cpu
        peak = (_memory("VmHWM") - before) / 1e6
        del kept
        return {"seconds": seconds, "mb": peak, "cpu": cpu}


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def _write(directory: Path, preset: str) -> int:
    """A model with random weights; its bytes."""
    import torch

    from stretto.arguments import parse
    from stretto.interop.export import export, plan
    from stretto.interop.shapes import logical_shapes
    from stretto.interop.write import write_config

    model = parse(["--preset", preset], env={}, files=False).args.model
    config = write_config(model, seq_len=4096, dtype="bfloat16")
    shapes = logical_shapes(model, 4096)
    named = plan(config, shapes, torch.bfloat16, None)

    drawn = torch.randn(1 << 24).bfloat16()  # again and again: drawing all takes longer than the rest

    def source(wanted: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        found = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in wanted.items()}
        for each in found.values():
            for part in each.view(-1).split(len(drawn)):
                part.copy_(drawn[: len(part)])
        return found

    files = export(directory / "model", config.raw, named, source, limit=10**9)
    for file in [*files, *(directory / "model").glob("*.json")]:
        file.rename(directory / file.name)
    return sum((directory / file.name).stat().st_size for file in files)


if __name__ == "__main__":
    main()
