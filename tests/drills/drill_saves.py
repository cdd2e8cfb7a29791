"""Drills of asynchronous saves: SIGKILL of a trainer or of its writer at a random moment, of which a save is the most.

    python tests/drills/drill_saves.py [--count 200] [--seed 0]

A trainer saves values 1, 2, 3, ... on a disk that takes 2 ms for a page, so that most kills land between two bytes of
a file. A drill passes when the newest whole checkpoint is at least as new as the last one that was told of, and every
number in it is of one save.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from stretto.checkpoint import CheckpointError, Saver, latest_complete, load
from stretto.checkpoint.directory import Retention
from stretto.checkpoint.writer_process import HOOKS
from stretto.params import Slice
from stretto.testing import Pool
from stretto.world import World

SIZE = 20_000
LONGEST = 0.6
"""Seconds until the kill, at most: some ten saves."""


@dataclass(frozen=True)
class Verdict:
    """How a drill ended."""

    seed: int
    victim: str
    told: int
    found: int
    cut: bool
    """The kill met a save under way."""
    wrong: str = ""


def slices(value: float) -> list[Slice]:
    return [Slice(f"model/{name}", torch.full((SIZE,), value), (SIZE,), (0,), True) for name in "ab"]


def save_forever(directory: Path, told: int, begun: int) -> None:
    """Save on and on; each value to `begun` before it begins, to `told` as it is told of.

    The first number in `begun` is the pid of the writer, once it has the first save. A value that went to `begun` after
    its save began would be missing there if the kill came between the two.
    """
    os.environ[HOOKS], os.environ["PYTHONPATH"] = "slow_disk", str(Path(__file__).parent)
    saver = Saver(World.single(), retention=Retention(2))
    for value in count(1):
        if value > 1:
            os.write(begun, value.to_bytes(4, "little"))
        saver.begin(directory, value, slices(float(value)), {"value": value})
        time.sleep(0.05)
        if value == 1:
            assert saver._writer is not None
            os.write(begun, saver._writer.pid.to_bytes(4, "little"))
        for _ in range(random.randrange(4)):  # steps
            time.sleep(0.01)
        for saved in saver.poll():
            os.write(told, saved.step.to_bytes(4, "little"))


def drill(directory: Path, seed: int) -> Verdict:
    """One kill, and what there is afterwards."""
    chance = random.Random(seed)
    victim = chance.choice(["trainer", "writer"])
    (told, tell), (begun, begin) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            random.seed(seed)
            save_forever(directory, tell, begin)
        except CheckpointError:
            code = 0  # its writer was killed
        finally:
            os._exit(code)
    os.close(tell)
    os.close(begin)
    writer = int.from_bytes(os.read(begun, 4), "little")
    time.sleep(chance.uniform(0.0, LONGEST))
    os.kill(pid if victim == "trainer" else writer, signal.SIGKILL)
    os.waitpid(pid, 0)
    until = time.monotonic() + 20
    while alive(writer) and time.monotonic() < until:  # of a trainer that was killed: it finishes what it has
        time.sleep(0.005)
    values, starts = read_all(told), read_all(begun)
    last = int.from_bytes(values[-4:], "little") if values else 0
    newest = int.from_bytes(starts[-4:], "little") if starts else 1
    found = latest_complete(directory)
    cut = bool(found.skipped) or any(not (p / "COMPLETE").exists() for p in directory.glob("step-*"))
    value, wrong = 0, "its writer did not end" if alive(writer) else ""
    if found.path is not None:
        held = slices(-1.0)
        value = load(found.path, held, World.single())["value"]
        if any(not torch.equal(s.tensor, torch.full((SIZE,), float(value))) for s in held):
            wrong = "numbers of several saves"
    if not last <= value <= newest:
        wrong = f"{value} is there, {last} was told of, {newest} was begun"
    return Verdict(seed, victim, last, value, cut or value < newest, wrong)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is nobody's to wait for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def drilled(world: World, directory: Path, seeds: Iterable[int]) -> list[Verdict]:
    """A drill for each seed, in a directory of its own."""
    verdicts = []
    for seed in seeds:
        verdicts.append(drill(directory / str(seed), seed))
        shutil.rmtree(directory / str(seed), ignore_errors=True)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pool = Pool(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            seeds = range(args.seed, args.seed + args.count)
            [verdicts] = pool.run(1, drilled, Path(folder), seeds, timeout=60.0 * args.count)
    finally:
        pool.close()
    for verdict in verdicts:
        if verdict.wrong:
            print(verdict)
    cut, wrong = sum(v.cut for v in verdicts), sum(bool(v.wrong) for v in verdicts)
    by = {name: sum(v.victim == name for v in verdicts) for name in ("trainer", "writer")}
    who = f"{by['trainer']} trainers, {by['writer']} writers killed"
    print(f"{len(verdicts)} drills ({who}): {cut} met a save under way, {wrong} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
