"""What a layer costs the host, forward and back: what a GPU must be kept waiting for where a model is small.

    python -m benchmarks.host_time [--device cuda] [--words "--recompute selective"] [--profile 20] [--out FILE]

Tensors are tiny, so nothing but the host takes time; on a CPU the tiny kernels are in it too. The step of a deep model
less that of a shallow one, over the layers between them and the microbatches. A GPU is given its work and not waited
for. `eager` launches each operation, `compiled` fuses what stands between GEMMs, `graphed` replays microbatches.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from stretto.arguments import parse
from stretto.initialize import initialize
from stretto.layout import Layout
from stretto.pipeline_parallel import GraphedExecutor
from stretto.train.build import build
from stretto.train.groups import state_of
from stretto.verify import Session, random_batch
from stretto.world import World

MODES = {
    "eager": "--no-compile --no-cuda-graphs",
    "compiled": "--compile --no-cuda-graphs",
    "graphed": "--compile --cuda-graphs",
}
LAYERS = (2, 8)
MICROBATCHES = 4
SIZES = "--hidden 128 --heads 2 --ffn 256 --vocab 512 --seq-len 64 --micro-batch 1 --activation swiglu --norm rms "
SIZES += "--position rope --dropout 0 --no-tied --nproc 1 --tp 1 --pp 1"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description="ms of the host for a layer")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--modes", default="", help="of eager, compiled, graphed; separated by commas")
    parser.add_argument("--words", default="", help="more settings of stretto train")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="the N operations that take most, instead")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = asked.device if asked.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    modes = asked.modes.split(",") if asked.modes else [m for m in MODES if m != "graphed" or device == "cuda"]
    found: dict[str, Any] = {"command": shlex.join(["python -m benchmarks.host_time", *sys.argv[1:]])}
    with initialize(device=device, threads=1) as world:
        found["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        for mode in modes:
            words = f"{MODES[mode]} --device {device} --dtype {'bf16' if device == 'cuda' else 'fp32'} {asked.words}"
            if asked.profile:
                _step_ms(words, LAYERS[-1], world, asked.steps, profile=asked.profile)
                continue
            shallow, deep = (_step_ms(words, layers, world, asked.steps) for layers in LAYERS)
            found[mode] = (deep - shallow) / (LAYERS[1] - LAYERS[0]) / MICROBATCHES
            print(f"{mode}: {found[mode]:.3f} ms a layer and microbatch; {deep:.1f} ms a step of {LAYERS[1]} layers")
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def _step_ms(words: str, layers: int, world: World, steps: int, *, profile: int = 0) -> float:
    """Median milliseconds that the host needs for forwards and backwards of a step."""
    said = f"{SIZES} --layers {layers} --global-batch {MICROBATCHES} {words}"
    args = parse(said.split(), env={}, files=False, world_size=1).args
    with state_of(args, Layout.of(), world) as state:  # not by `stretto.verify`: what it looks at is not recorded
        session, batch = Session(args, state, build(args, state)), random_batch(args, 0)
        for _ in range(5):
            session.step(batch)
        executor = session.built.stepper.executor
        if args.run.cuda_graphs and not (isinstance(executor, GraphedExecutor) and executor.recorded):
            sys.exit("python -m benchmarks.host_time: no microbatch was recorded as a CUDA graph")
        if profile:
            _profile(session, batch, profile)
            return 0.0
        return statistics.median([_gradients(session, batch) for _ in range(steps)])


def _gradients(session: Session, batch: Any) -> float:
    microbatches = session.microbatches(batch)
    if session.state.world.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    session.built.stepper.gradients(microbatches)
    return 1e3 * (time.perf_counter() - began)


def _profile(session: Session, batch: Any, rows: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            _gradients(session, batch)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60))


if __name__ == "__main__":
    main()
