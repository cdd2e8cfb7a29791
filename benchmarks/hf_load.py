"""How long the weights of a Hugging Face model take into a model of ours, beside transformers and reading the bytes.

    python -m benchmarks.hf_load --preset qwen3-0.6b

It writes a model of that shape with random weights in bf16 to a temporary directory, reads it once so that all find it
in the page cache, and then each takes it in a process of its own. Peaks are of the process, less what it had before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

WAYS: Mapping[str, Callable[[Path], None]]


def ours(directory: Path) -> None:
    """Into whole logical tensors of fp32, as master weights are."""
    import torch

    from stretto.interop.config import read_config
    from stretto.interop.load import load_weights
    from stretto.interop.shapes import logical_shapes
    from stretto.params import Slice

    config = read_config(directory)
    shapes = logical_shapes(config.model, 16)
    found = {name: torch.empty(shape) for name, shape in shapes.items()}
    slices = [Slice(name, x, tuple(x.shape), (0,) * x.dim(), True) for name, x in found.items()]
    load_weights(directory, config, shapes, slices)


def transformers(directory: Path) -> None:
    """`from_pretrained`, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def read(directory: Path) -> None:
    """The bytes of the files, into a buffer that is used again."""
    buffer = bytearray(1 << 24)
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


WAYS = MappingProxyType({"read": read, "ours": ours, "transformers": transformers})


def main() -> None:
    """Print seconds, GB/s and peak of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="qwen3-0.6b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        _one(asked.way, asked.directory)
        return
    with tempfile.TemporaryDirectory(prefix="stretto-hf-") as name:
        size = _write(Path(name), asked.preset)
        read(Path(name))
        for way in WAYS:
            words = [sys.executable, "-m", "benchmarks.hf_load", "--way", way, "--directory", name]
            runs = [
                json.loads(subprocess.run(words, capture_output=True, check=True, text=True).stdout.splitlines()[-1])
                for _ in range(asked.repeat)
            ]
            best = min(runs, key=lambda run: float(run["seconds"]))
            rate, peak = size / best["seconds"] / 1e9, best["mb"]
            print(f"{way:12} {best['seconds']:6.2f} s  {rate:5.2f} GB/s  peak {peak:6.0f} MB")


def _one(way: str, directory: Path) -> None:
    import torch

    torch.set_num_threads(1)
    WAYS[way](directory) if way == "read" else _warm(way)
    before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    WAYS[way](directory)
    seconds = time.perf_counter() - since
    print(json.dumps({"seconds": seconds, "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3}))


def _warm(way: str) -> None:
    """What is imported once is no part of it."""
    if way == "transformers":
        from transformers import AutoModelForCausalLM  # noqa: F401
        from transformers.models.qwen3 import modeling_qwen3  # noqa: F401
    else:
        import stretto.interop.load
        import stretto.interop.shapes  # noqa: F401


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

    def source(wanted: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        return {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in wanted.items()}

    files = export(directory / "model", config.raw, named, source, limit=10**9)
    for file in [*files, *(directory / "model").glob("*.json")]:
        file.rename(directory / file.name)
    return sum((directory / file.name).stat().st_size for file in files)


if __name__ == "__main__":
    main()
