"""Whole steps of `stretto train`, as a user runs it: measured, and beside what was estimated of them.

    python -m benchmarks.steps --cases olmoe,olmoe-ep2 [--out FILE.json] [--words "--recompute selective"]
    python -m benchmarks.steps --cases olmoe --small            a trial on a CPU

A case is a command line, run for `--steps` steps on a corpus made for it; what a step takes is the time from the line
of `metrics.jsonl` at `--warmup` to the last one, over the steps between (single lines are of the host's clock, which
runs ahead of the device). Cases of one group are compared with its first, for each GPU. Tokens are
uniform or Zipf-distributed, which makes routers' loads as uneven as text does.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from stretto.arguments import parse
from stretto.estimate.chips import CHIPS
from stretto.estimate.memory import fullest
from stretto.estimate.step_time import step_time


@dataclass(frozen=True)
class Case:
    """A run of `stretto train` on so many GPUs, with documents of so many tokens in the mean (0: whole rows)."""

    group: str
    nproc: int
    words: str
    tokens: str = "uniform"
    documents: int = 0


_SMALL = "--layers 12 --hidden 768 --heads 12 --vocab 50304 --activation swiglu --norm rms --position rope --no-tied "
_SMALL += "--dropout 0 --experts 32 --top-k 4 --expert-ffn 512 --seq-len 1024 --micro-batch 4 --global-batch 64"
"""Sixteen microbatches of what a GPU is through with before its host: 460 million parameters."""
_OLMOE = "--preset olmoe-7b --layers 4 --seq-len 4096 --micro-batch 4 --recompute selective"
# A bias of each expert in the choice, that moves until the loads are equal: after some hundred steps they are.
_BALANCED = f"{_OLMOE} --router-bias --router-bias-rate 0.0003"
_WIDE = "--preset llama3-8b --vocab 32768 --layers 4 --micro-batch 1 --recompute selective --seq-len"
# A copy for asynchronous saves would take as much of the host's memory as masters and moments do.
_OFFLOAD = "--optimizer-cpu-offload --no-async-save"
_FULL = f"--preset llama3-8b --seq-len 8192 --micro-batch 1 --recompute selective {_OFFLOAD}"
CASES = {
    "olmoe": Case("experts", 1, f"{_OLMOE} --global-batch 8"),
    "olmoe-natural": Case("experts", 1, f"{_OLMOE} --global-batch 8", "zipf"),
    "olmoe-balanced": Case("experts, balanced", 1, f"{_BALANCED} --global-batch 8"),
    "olmoe-balanced-ep2": Case(
        "experts, balanced", 2, f"{_BALANCED} --global-batch 16 --dp 2 --ep 2 --ep-copy-engines --sharding zero1"
    ),
    "olmoe-dp2": Case("experts", 2, f"{_OLMOE} --global-batch 16 --dp 2"),
    "olmoe-ep2": Case("experts", 2, f"{_OLMOE} --global-batch 16 --dp 2 --ep 2"),
    "olmoe-ep2-copy-engines": Case("experts", 2, f"{_OLMOE} --global-batch 16 --dp 2 --ep 2 --ep-copy-engines"),
    "olmoe-ep2-copy-engines-overlap": Case(
        "experts", 2, f"{_OLMOE} --global-batch 16 --dp 2 --ep 2 --ep-copy-engines --ep-comm-overlap"
    ),
    "olmoe-ep2-zero1": Case(
        "experts", 2, f"{_OLMOE} --global-batch 16 --dp 2 --ep 2 --ep-copy-engines --sharding zero1"
    ),
    "olmoe-ep2-overlap": Case("experts", 2, f"{_OLMOE} --global-batch 16 --dp 2 --ep 2 --ep-comm-overlap"),
    "olmoe-ep2-natural": Case("experts", 2, f"{_OLMOE} --global-batch 16 --dp 2 --ep 2", "zipf"),
    "moe-small": Case("small experts", 1, _SMALL),
    "moe-small-no-graphs": Case("small experts", 1, f"{_SMALL} --no-cuda-graphs"),
    "qwen3-moe": Case("qwen3", 1, "--preset qwen3-30b-a3b --layers 3 --seq-len 4096 --micro-batch 2 --global-batch 8"),
    "qwen3-moe-ep2": Case(
        "qwen3", 2, "--preset qwen3-30b-a3b --layers 3 --seq-len 4096 --micro-batch 2 --global-batch 16 --dp 2 --ep 2"
    ),
    "32k": Case("32k", 1, f"{_WIDE} 32768 --global-batch 2"),
    "32k-cp2": Case("32k", 2, f"{_WIDE} 32768 --global-batch 2 --cp 2"),
    "32k-cp2-zero1": Case("32k", 2, f"{_WIDE} 32768 --global-batch 2 --cp 2 --sharding zero1"),
    "32k-cp2-ring": Case("32k", 2, f"{_WIDE} 32768 --global-batch 2 --cp 2 --cp-comm ring"),
    "32k-packed": Case("32k packed", 1, f"{_WIDE} 32768 --global-batch 2 --packing", documents=4000),
    "32k-packed-cp2": Case("32k packed", 2, f"{_WIDE} 32768 --global-batch 2 --packing --cp 2", documents=4000),
    "32k-packed-cp2-zero1": Case(
        "32k packed", 2, f"{_WIDE} 32768 --global-batch 2 --packing --cp 2 --sharding zero1", documents=4000
    ),
    "128k": Case("128k", 1, f"{_WIDE} 131072 --global-batch 1"),
    "128k-cp2": Case("128k", 2, f"{_WIDE} 131072 --global-batch 1 --cp 2"),
    "128k-cp2-zero1": Case("128k", 2, f"{_WIDE} 131072 --global-batch 1 --cp 2 --sharding zero1"),
    "128k-packed": Case("128k packed", 1, f"{_WIDE} 131072 --global-batch 1 --packing", documents=16000),
    "128k-packed-cp2": Case("128k packed", 2, f"{_WIDE} 131072 --global-batch 1 --packing --cp 2", documents=16000),
    "128k-packed-cp2-zero1": Case(
        "128k packed", 2, f"{_WIDE} 131072 --global-batch 1 --packing --cp 2 --sharding zero1", documents=16000
    ),
    "512k": Case(
        "512k",
        1,
        "--preset llama3-8b --vocab 32768 --layers 4 --micro-batch 1 --seq-len 524288 --global-batch 1"
        " --ffn-chunks 16 --recompute offload",
    ),
    "qwen3-0.6b": Case("qwen3-0.6b", 1, "--preset qwen3-0.6b --seq-len 4096 --micro-batch 4 --global-batch 4"),
    "8b-offload": Case("8b offload", 1, f"{_FULL} --global-batch 1"),
    "8b-offload-8": Case("8b offload", 1, f"{_FULL} --global-batch 8"),
}
SMALL = "--hidden 64 --ffn 96 --heads 4 --kv-heads 2 --head-dim 16 --vocab 512 --seq-len 64 --layers 2"


def write_corpus(prefix: Path, vocab: int, rows: int, length: int, case: Case, seed: int = 0) -> None:
    """The `.bin` and `.idx` of documents, and `tokenizer.json` with as many entries."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    draw, total = np.random.default_rng(seed), rows * (length + 1)
    ids = draw.zipf(1.1, total) - 1 if case.tokens == "zipf" else draw.integers(0, vocab, total)
    np.random.default_rng(1).permutation(vocab)[ids % vocab].astype("<i4").tofile(f"{prefix}.bin")
    lengths = list[int]()
    while (left := total - sum(lengths)) > 0:
        mean = case.documents or length + 1
        drawn = round(draw.lognormal(np.log(mean) - 0.5, 1.0)) if case.documents else mean
        lengths.append(max(1, min(drawn, left, length)) if case.documents else min(mean, left))
    sizes = np.array(lengths, dtype="<i4")
    with Path(f"{prefix}.idx").open("wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(sizes), len(sizes) + 1))
        index.write(sizes.tobytes())
        index.write(((np.cumsum(sizes, dtype="<i8") - sizes) * 4).astype("<i8").tobytes())
        index.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    entries = {str(i): i for i in range(vocab - 1)} | {"<eos>": vocab - 1}
    tokenizer = Tokenizer(WordLevel(entries, unk_token="<eos>"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(prefix.parent / "tokenizer.json"))


def words_of(case: Case, directory: Path, options: argparse.Namespace) -> list[str]:
    """The command line of a case."""
    said = shlex.split("--tp 1 --pp 1 --dp 1 --cp 1 --ep 1 --no-sequence-parallel --sharding none")
    small = f"{SMALL} --expert-ffn 32 --no-ep-copy-engines" if "experts" in case.group else SMALL
    said += shlex.split(f"{case.words} {small if options.small else ''} {options.words}")
    said += [
        "--nproc",
        str(case.nproc),
        "--steps",
        "100000",
        "--log-every",
        str(options.log_every),
        "--device",
        options.device,
    ]
    said += ["--dtype", "bf16" if options.device == "cuda" else "fp32", "--eval-every", "0", "--sample-tokens", "0"]
    said += ["--no-tensorboard", "--progress", "lines", "--lr", "1e-5", "--warmup-steps", "0", "--save-every", "0"]
    said += ["--data", str(directory / "tokens.bin"), "--tokenizer", str(directory / "tokenizer.json")]
    return [*said, "--out", str(directory / "run")]


def read(file: Path) -> list[dict[str, Any]]:
    """Whole lines of `metrics.jsonl`, if it is there."""
    said = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in said[: said.rfind("\n") + 1].splitlines()]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `metrics.jsonl` says of a run, beside the estimate; or why there is none."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        words = words_of(case, Path(scratch), options)
        args = parse(words, env={}, files=False, world_size=case.nproc).args
        found: dict[str, Any] = {"group": case.group, "nproc": case.nproc, "words": shlex.join(words[:-6])}
        found["estimated_ms"] = 1e3 * step_time(args, CHIPS["h200"]).total
        found["ledger_gib"] = fullest(args) / 2**30
        length = args.batch.seq_len
        rows = max(args.batch.global_batch * 3, 2)
        write_corpus(Path(scratch) / "tokens", args.model.vocab_size, rows, length, case)
        began, log, file = time.monotonic(), Path(scratch) / "log", Path(scratch) / "run" / "metrics.jsonl"
        with log.open("w") as out:
            # No end of the run: its last save and evaluation are no steps.
            run = subprocess.Popen(
                [sys.executable, "-m", "stretto", "train", *words], stdout=out, stderr=out, start_new_session=True
            )
            lines: list[dict[str, Any]] = []
            try:
                while run.poll() is None and time.monotonic() - began < options.limit:
                    lines = read(file)
                    if lines and lines[-1].get("step", 0) >= options.steps:
                        break
                    time.sleep(0.1)
            finally:  # also where this process is ended: a run that is left behind would keep its GPUs
                with suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
                code = run.wait()
        if options.keep and file.exists():
            shutil.copytree(file.parent, options.keep / name, dirs_exist_ok=True)
        said = log.read_text()
        found["seconds"] = time.monotonic() - began
        found["start_up"] = next((line for line in said.splitlines() if line.startswith("start-up")), None)
        counted = [line for line in lines if line.get("step", 0) >= options.warmup and "ms_per_step" in line]
        if len(counted) < 2:
            return found | {"gone": f"exit {code}: " + " | ".join(said.strip().splitlines()[-6:])[-700:]}
        first, last = counted[0], counted[-1]
        taken = datetime.fromisoformat(last["time"]) - datetime.fromisoformat(first["time"])
        ms = 1e3 * taken.total_seconds() / (last["step"] - first["step"])
        tokens, times = args.batch.global_batch * length, [line["ms_per_step"] for line in counted[1:]]
        found |= {"ms": ms, "tokens_per_s_gpu": 1e3 * tokens / ms / case.nproc, "of_lines": times}
        return found | {"last": last}


def show(found: dict[str, Any], console: Console) -> None:
    """A row for each case."""
    columns = (
        "",
        "GPUs",
        "tokens/s/GPU",
        "of the first",
        "ms",
        "estimated ms",
        "peak GiB",
        "ledger GiB",
        "load max/mean",
    )
    table, firsts = Table(*columns), dict[str, float]()
    for name, row in found["cases"].items():
        if "gone" in row:
            table.add_row(name, str(row["nproc"]), row["gone"][-60:])
            continue
        first = firsts.setdefault(row["group"], row["tokens_per_s_gpu"])
        last = row["last"]
        table.add_row(
            name,
            str(row["nproc"]),
            f"{row['tokens_per_s_gpu']:,.0f}",
            f"{row['tokens_per_s_gpu'] / first:.3f}",
            f"{row['ms']:,.1f}",
            f"{row['estimated_ms']:,.1f}",
            f"{last['peak_gib']:.2f}",
            f"{row['ledger_gib']:.2f}",
            f"{last['expert_load']:.2f}" if "expert_load" in last else "",
        )
    console.print(table)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps")
    add = parser.add_argument
    add("--cases", default=",".join(CASES), help="separated by commas")
    add("--words", default="", help="more settings of stretto train, in every case")
    add("--steps", type=int, default=14)
    add("--log-every", type=int, default=2, help="steps of a line")
    add("--warmup", type=int, default=6, help="steps that do not count")
    add("--limit", type=float, default=90.0, help="seconds of a case")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--small", action="store_true", help="narrow and short, a trial of the benchmark")
    add("--scratch", type=Path)
    add("--keep", type=Path, metavar="DIR", help="keep there what runs write: metrics, and traces of --profile")
    add("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    import torch  # its versions, and the device

    found: dict[str, Any] = {"command": shlex.join(["python", "-m", "benchmarks.steps", *argv])}
    found["device"] = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    found |= {"versions": {"torch": torch.__version__, "python": sys.version.split()[0]}, "cases": {}}
    for name in options.cases.split(","):
        row = found["cases"][name] = measure(name, options)
        said = row.get("gone") or f"{row['tokens_per_s_gpu']:,.0f} tokens/s/GPU, {row['ms']:,.1f} ms"
        print(f"{name}: {said} ({row['seconds']:.0f} s)", flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    show(found, Console(width=140))
    return 1 if any("gone" in row for row in found["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
