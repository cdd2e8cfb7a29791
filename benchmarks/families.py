"""Whole training steps of published models, in the loop of `stretto train` and in `transformers`, in turns.

    python -m benchmarks.families [--families qwen3-0.6b,llama3.2-1b,gemma3-1b] [--out FILE.json]
    python -m benchmarks.families --families qwen3-0.6b --device cpu --small        a trial of the benchmark

Each peer is a process of its own (`benchmarks.family_peers`). All begin with the weights of one directory, so the
losses of the first step must agree within bf16's rounding; all set up at once, and then take turns on the device.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.family_peers import PEERS, words_of
from benchmarks.train.conductor import GoneError, Team
from benchmarks.train.data import write_tokens
from benchmarks.train.measure import Spread
from benchmarks.train.shapes import Job, Shape
from stretto.arguments import parse
from stretto.arguments.schema import ModelConfig
from stretto.interop.export import export, plan
from stretto.interop.shapes import logical_shapes
from stretto.interop.write import write_config

MICRO = {"gemma3-1b": 2}
"""Sequences of a step, in one microbatch, where they are not 4: logits of 262,144 entries fill the memory."""

LOSSES = 0.02
"""How far the first losses, each a mean over thousands of tokens, may lie apart."""


def write_model(directory: Path, model: ModelConfig, seq_len: int) -> None:
    """A Hugging Face model with random weights: pieces of one pool of normal values, which are drawn once."""
    config = write_config(model, seq_len=seq_len, dtype="bfloat16")
    shapes = logical_shapes(model, seq_len)
    pool = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * model.init_std).bfloat16()
    at = 0

    def source(wanted: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        nonlocal at
        found = {}
        for name, shape in wanted.items():
            at += 1_000_003
            x = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 1:
                x.fill_(0.0 if model.norm_zero_centered or name.endswith("bias") else 1.0)
            else:
                rolled = pool.roll(at % len(pool))
                for part in x.view(-1).split(len(pool)):
                    part.copy_(rolled[: len(part)])
            found[name] = x
        return found

    export(directory, config.raw, plan(config, shapes, torch.bfloat16, None), source, limit=10**10)


@dataclass
class Run:
    """One family, whose peers are teams of one rank."""

    family: str
    options: argparse.Namespace
    say: Callable[[str], None]
    found: dict[str, Any] = field(default_factory=lambda: {"peers": {}})
    teams: dict[str, Team] = field(default_factory=dict)

    def run(self, scratch: Path, keep: Callable[[dict[str, Any]], None]) -> None:
        """Measure every peer that can be."""
        options = self.options
        micro = options.micro_batch or MICRO.get(self.family, 4)
        sizes = dict.fromkeys(("layers", "hidden", "heads", "kv_heads", "ffn"), 1)
        shape = Shape(self.family, "", vocab=1, activation="swiglu", seq_len=options.seq_len, micro_batch=micro,
                      global_batch=micro, **sizes)  # fmt: skip
        job = Job(shape, "one", 1, options.device, options.dtype, True, str(scratch / "tokens"), options.stretto)
        model = parse(words_of(self.family, job, options.small), env={}, files=False).args.model
        shape = Shape(**{**asdict(shape), "vocab": model.vocab})
        write_tokens(scratch / "tokens", shape)
        write_model(scratch / "model", model, options.seq_len)
        self.say(f"{self.family}: weights and tokens written")
        asked = {**vars(job), "family": self.family, "directory": str(scratch / "model"), "small": options.small}
        asked["shape"] = asdict(shape)
        self.found |= {"tokens": shape.tokens, "micro_batch": micro, "seq_len": shape.seq_len}
        logs = options.out.parent if options.out else scratch
        names = options.peers.split(",")
        for name in names:  # all start and set up at once
            self.teams[name] = Team(name, 1, options.device, logs, options.limit, "benchmarks.family_peers")
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: self._ask(name, "about", "setup", **asked), names))
        for name in names:
            self._ask(name, "first", "first")
        each = -(-options.steps // 2)
        for order in (names, list(reversed(names))):
            for name in order:
                entry = self.found["peers"][name]
                if (got := self._ask(name, "turn", "steps", count=each, warm=3)) is None:
                    continue
                entry["all_ms"] = [*entry.get("all_ms", ()), *got["ms"]]
                spread = Spread.of(entry["all_ms"])
                entry |= {"ms": asdict(spread), "tokens_per_s": shape.tokens / spread.median * 1e3}
                entry["peak_bytes"] = max(entry.get("peak_bytes", 0), got["peak"])
                self.say(f"{self.family}, {name}: {spread.median:.2f} ms, {entry['tokens_per_s']:,.0f} tokens/s")
                keep(self.found)
        keep(self.found)

    def end(self) -> None:
        """No peer runs on."""
        while self.teams:
            self.teams.popitem()[1].end()

    def _ask(self, name: str, key: str, what: str, **request: Any) -> dict[str, Any] | None:
        """The answer, which is kept under this key; None where the peer is gone, which is said once."""
        entry = self.found["peers"].setdefault(name, {})
        if "gone" in entry:
            return None
        try:
            (answer,) = self.teams[name].ask(what, **request)
        except GoneError as gone:
            entry["gone"] = str(gone)
            self.teams.pop(name).end()
            self.say(f"{self.family}: {str(gone).splitlines()[0]:.300}")
            return None
        entry[key] = answer
        if "seconds" in answer:
            self.say(f"{self.family}, {name}: {what} in {answer['seconds']:.1f} s")
        found: dict[str, Any] = answer
        return found


def show(family: str, found: dict[str, Any], console: Console) -> None:
    """One line for each peer, beside the first."""
    title = f"{family}: {found['tokens']:,} tokens a step, sequences of {found['seq_len']:,}"
    table = Table("", "tokens/s", "beside", "ms (p10 .. p90)", "peak GiB", "first loss", "compile s", title=title)
    peers, first = found["peers"], None
    for name, entry in peers.items():
        if "ms" not in entry:
            table.add_row(name, entry.get("gone", "not measured").splitlines()[0][:80])
            continue
        first, ms = first or entry, entry["ms"]
        apart = abs(entry["first"]["loss"] - first["first"]["loss"])
        table.add_row(
            name,
            f"{entry['tokens_per_s']:,.0f}",
            f"{entry['tokens_per_s'] / first['tokens_per_s']:.3f}",
            f"{ms['median']:.2f} ({ms['p10']:.2f} .. {ms['p90']:.2f})",
            f"{entry['peak_bytes'] / 2**30:.1f}",
            f"{entry['first']['loss']:.4f}" + (" DIFFERENT" if apart > LOSSES else ""),
            f"{entry['first']['seconds']:.0f}",
        )
    console.print(table)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families")
    add = parser.add_argument
    add("--families", default="qwen3-0.6b,llama3.2-1b,gemma3-1b", help="presets")
    add("--peers", default="stretto,hf-compiled,hf", help=f"of {', '.join(PEERS)}")
    add("--stretto", default="", metavar="WORDS", help="more settings of stretto train")
    add("--seq-len", type=int, default=4096)
    add("--micro-batch", type=int, default=0, help="sequences of a step; 0: as many as fit")
    add("--steps", type=int, default=16, help="measured steps of each peer, in two turns")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--dtype", choices=("bf16", "fp32"), default="bf16")
    add("--small", action="store_true", help="two narrow layers, a trial of the benchmark")
    add("--limit", type=float, default=150.0, help="seconds for one answer of a peer")
    add("--scratch", type=Path, help="where the weights are written")
    add("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {line}", flush=True)

    found: dict[str, Any] = {"command": shlex.join(["python", "-m", "benchmarks.families", *argv]), "families": {}}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    for family in options.families.split(","):

        def keep(known: dict[str, Any], family: str = family) -> None:
            found["families"][family] = known
            for entry in known["peers"].values():
                found.update({key: entry["about"][key] for key in ("device", "versions") if "about" in entry})
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")

        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            run = Run(family, options, say)
            try:
                run.run(Path(scratch), keep)
            except Exception as error:  # noqa: BLE001  # of any kind: the other families go on
                say(f"{family}: {type(error).__name__}: {str(error).splitlines()[0]:.300}")
                continue
            finally:
                run.end()
        show(family, run.found, Console(width=140))
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
