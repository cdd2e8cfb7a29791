"""Starts the ranks of every peer, lets the peers take turns on the same devices, and saves what is known so far.

Each rank is a process of its own, so that peers share nothing but the device: no allocator, no settings, no failure.
Only one peer works at a time; the others wait with their weights in place. Turns go forth and back (A B B A).
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from benchmarks.train.flops import rate
from benchmarks.train.measure import Spread
from benchmarks.train.shapes import Job

CEILING = "ceiling"


class GoneError(RuntimeError):
    """A peer rejected, failed, or took too long; the message says which and why."""


@dataclass(frozen=True)
class Plan:
    """What is asked of every peer."""

    job: Job
    peers: tuple[str, ...]
    words: dict[str, str]
    """Settings of one peer and its variants, by its name."""
    steps: int = 20
    turns: int = 2
    warmup: int = 10
    ceiling_seconds: float = 0.5
    """Of each rate; 0: no ceiling."""
    waterfall: bool = True
    memory: bool = True
    traces: Path | None = None
    limit: float = 240.0
    """Seconds for one answer: compilation is in the first."""


class Team:
    """The ranks of one peer."""

    def __init__(
        self,
        name: str,
        nproc: int,
        device: str,
        logs: Path,
        limit: float,
        program: str = "benchmarks.train.worker",
    ) -> None:
        """`program` is the module whose processes answer."""
        self.name, self.device, self.limit, self.program = name, device, limit, program
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.logs = [logs / f"{name}-{rank}.log" for rank in range(nproc)]
        self.ranks = [self._start(rank, nproc, port) for rank in range(nproc)]

    def _start(self, rank: int, nproc: int, port: int) -> subprocess.Popen[str]:
        # Ranks that share cores lose more by waiting for each other's threads than threads bring.
        extra: dict[str, str] = {"OMP_NUM_THREADS": "1"} if self.device == "cpu" else {}
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_PORT": port}
        paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])]
        extra["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        env = os.environ | extra | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()}
        with self.logs[rank].open("w") as log:
            command = [sys.executable, "-m", self.program, self.name]
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env, text=True, bufsize=1
            )

    def ask(self, what: str, **request: Any) -> list[Any]:
        """The answers of all ranks. Raises GoneError; the peer has then ended."""
        until = time.monotonic() + self.limit
        try:
            for rank in self.ranks:
                assert rank.stdin is not None
                print(json.dumps({"do": what, **request}), file=rank.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended: its answer, or the lack of one, says why
        waiting, answers = set(range(len(self.ranks))), dict[int, Any]()
        while waiting:
            for n in self._ready(waiting, until - time.monotonic(), what):
                out = self.ranks[n].stdout
                assert out is not None
                answer = json.loads(out.readline() or '{"failed": "the process ended"}')
                if "ok" not in answer:
                    self._gone(n, answer)
                answers[n] = answer["ok"]
                waiting.remove(n)
        return [answers[n] for n in sorted(answers)]

    def _ready(self, waiting: set[int], seconds: float, what: str) -> list[int]:
        by_file = {cast("IO[str]", self.ranks[n].stdout): n for n in waiting}
        ready, _, _ = select.select(list(by_file), [], [], max(seconds, 0))
        if not ready:
            self.end()
            raise GoneError(f"{self.name}: no answer to {what} within {self.limit:.0f} s; see {self.logs[0]}")
        return [by_file[file] for file in ready]

    def _gone(self, rank: int, answer: dict[str, str]) -> None:
        self.end()
        how, why = next(iter(answer.items()))
        raise GoneError(f"{self.name} {how}: {why}" + ("" if how == "rejected" else f"; see {self.logs[rank]}"))

    def end(self) -> None:
        """Kill what still runs."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.communicate()


@dataclass
class Run:
    """A run under way; `found` is what the file says."""

    plan: Plan
    out: Path
    say: Callable[[str], None]
    found: dict[str, Any]
    teams: dict[str, Team] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    def run(self) -> None:
        """Everything of the plan. What a peer cannot do is said, and the others go on."""
        self.save()
        try:
            # All at once: they load their libraries while the first is at work.
            for name in (*([CEILING] if self.plan.ceiling_seconds else []), *self.plan.peers):
                nproc = 1 if name == CEILING else self.plan.job.nproc
                self.teams[name] = Team(name, nproc, self.plan.job.device, self.out.parent, self.plan.limit)
            if self.plan.ceiling_seconds:
                self._ceiling()
            for name in self.plan.peers:
                self._trying(name, self._start)
            for turn in range(self.plan.turns):
                for name in self._order(turn):
                    self._trying(name, self._turn)
            for name in list(self.teams):
                self._trying(name, self._look_inside)
        finally:
            for team in self.teams.values():
                team.end()

    def save(self) -> None:
        """Write what is known; a run that is cut leaves what was measured."""
        temporary = self.out.with_name(self.out.name + ".tmp")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        temporary.replace(self.out)

    def _order(self, turn: int) -> Sequence[str]:
        names = list(self.teams)
        return names[::-1] if turn % 2 else names

    def _trying(self, name: str, what: Callable[[str], None]) -> None:
        began = time.monotonic()
        try:
            what(name)
        except GoneError as gone:
            self.teams.pop(name, None)
            self._entry(name)["gone"] = str(gone)
            self.say(str(gone))
        self._entry(name).setdefault("seconds", {})[what.__name__.strip("_")] = time.monotonic() - began
        self.save()

    def _entry(self, name: str) -> dict[str, Any]:
        return cast("dict[str, Any]", self.found["peers"].setdefault(name, {}))

    def _setup(self, name: str) -> dict[str, Any]:
        words = next((said for peer, said in self.plan.words.items() if name.startswith(peer)), "")
        job = replace(self.plan.job, words=words)
        said = {**asdict(job), "shape": job.shape.name}
        first = cast("dict[str, Any]", self.teams[name].ask("setup", job=said)[0])
        self.found["device"] = f"{job.nproc} x {first['device']}"
        self.found["versions"] = first["versions"]
        return first

    def _ceiling(self) -> None:
        self.say("ceiling: GEMMs, attention and copy at their own rates")
        try:
            self._setup(CEILING)
            self.found["ceiling"] = self.teams[CEILING].ask("ceiling", seconds=self.plan.ceiling_seconds)[0]
            self.say(f"ceiling: {self.found['ceiling']['step_ms']:.1f} ms a step")
        except GoneError as gone:
            self.say(str(gone))
        if team := self.teams.pop(CEILING, None):
            team.end()
        self.save()

    def _start(self, name: str) -> None:
        """Set up and warm up."""
        self.say(f"{name}: setting up")
        self._entry(name)["about"] = self._setup(name)["about"]
        answers = self.teams[name].ask("steps", count=1, warm=self.plan.warmup - 1)
        self._entry(name)["about"] = self.teams[name].ask("about")[0]
        self._entry(name)["loss_after_warmup"] = sum(answer["loss"] for answer in answers)

    def _turn(self, name: str) -> None:
        """A part of the measured steps; the slower rank's time counts."""
        count = -(-self.plan.steps // self.plan.turns)
        answers = self.teams[name].ask("steps", count=count, warm=3)
        self.times.setdefault(name, []).extend(map(max, zip(*(answer["ms"] for answer in answers), strict=True)))
        spread = Spread.of(self.times[name])
        entry = self._entry(name)
        entry["ms"] = asdict(spread)
        entry["all_ms"] = self.times[name]
        entry["peak_bytes"] = [answer["peak"] for answer in answers]
        entry |= asdict(rate(self.plan.job.shape, spread.median, self.plan.job.nproc))
        if "ceiling" in self.found:
            entry["share_of_ceiling"] = self.found["ceiling"]["step_ms"] / spread.median
        self.say(f"{name}: {spread.median:.2f} ms a step, {entry['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU")

    def _look_inside(self, name: str) -> None:
        """Trace and memory, when all times are known: both disturb."""
        entry, team = self._entry(name), self.teams[name]
        if self.plan.waterfall and self.plan.job.device == "cuda" and "ceiling" in self.found:
            keep = str(self.plan.traces / f"{self.plan.job.shape.name}-{name}.json") if self.plan.traces else ""
            tflops = self.found["ceiling"]["best_tflops"]
            entry["waterfall"] = team.ask("waterfall", step_ms=entry["ms"]["median"], tflops=tflops, keep=keep)
            self.save()
        if self.plan.memory:
            entry["memory_bytes"] = team.ask("memory")
        team.ask("close")


def start(plan: Plan, out: Path, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Carry out a plan; `out` is written as it goes. Returns what it says in the end."""
    job = plan.job
    about = {**asdict(job), "shape": asdict(job.shape), "tokens": "random"}
    found: dict[str, Any] = {"command": command, "device": "", "versions": {}, "job": about, "peers": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    Run(plan, out, say, found).run()
    return found
