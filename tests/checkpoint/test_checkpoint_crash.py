"""P16: a process that is killed at any moment of a save leaves the checkpoint before it as the newest.

The writer saves values 0, 1, 2, ... for ever, value v as step v // 2: every second save replaces one of its own step.
After a kill the newest whole checkpoint must hold the last value whose save returned, or the one that was under way.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from stretto.checkpoint import latest_complete, load, prune, save
from stretto.params import Slice
from stretto.testing import Pool, WorkerDiedError
from stretto.world import World

pytestmark = pytest.mark.gloo

ALONE = World.single()
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"}


def piece(world: World, value: float) -> Slice:
    tensor = torch.full((1000,), value, dtype=torch.float64)
    return Slice("model/w", tensor, (1000 * world.size,), (1000 * world.rank,), True)


def save_value(world: World, directory: Path, value: int) -> None:
    save(directory, value // 2, [piece(world, value)], {"value": value}, world)
    if world.rank == 0:
        prune(directory, keep=2)


def newest_value(directory: Path) -> int:
    """Of the newest whole checkpoint; every element of it, and its JSON, must be of the same save."""
    found = latest_complete(directory)
    assert found.path is not None, found.skipped
    size = 1000 * json.loads((found.path / "COMPLETE").read_text())["world_size"]
    whole = Slice("model/w", torch.full((size,), -1.0, dtype=torch.float64), (size,), (0,), True)
    value = load(found.path, [whole], ALONE)["value"]
    assert torch.equal(whole.tensor, torch.full((size,), float(value), dtype=torch.float64))
    return int(value)


def in_a_child(body: Callable[[], None]) -> int:
    """Fork, run, exit; the child's process id."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid


def save_forever(directory: Path, start: int, done: int) -> None:
    for value in count(start):
        save_value(ALONE, directory, value)
        os.write(done, value.to_bytes(4, "little"))


def kill_many_times(world: World, directory: Path, kills: int) -> int:
    """Kill a writer after random delays; the number of kills that met a save under way."""
    chance = random.Random(1)
    last, cut = 0, 0
    save_value(ALONE, directory, last)
    for _ in range(kills):
        confirmed, done = os.pipe()
        pid = in_a_child(lambda start=last + 1, done=done: save_forever(directory, start, done))
        os.close(done)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(confirmed, "rb") as stream:
            values = stream.read()
        last = int.from_bytes(values[-4:], "little") if values else last
        cut += any(not (p / "COMPLETE").exists() for p in directory.iterdir())
        assert newest_value(directory) - last in (0, 1)
        last = newest_value(directory)
    return cut


@pytest.mark.nightly
def test_sigkill_at_random_moments(pool: Pool, tmp_path: Path) -> None:
    [cut] = pool.run(1, kill_many_times, tmp_path, 60)
    assert cut >= 5  # otherwise the test has tested nothing


def save_and_stop_before_event(directory: Path, value: int, stop: int) -> None:
    """Exit hard before the `stop`th time that anything below `directory` is opened, renamed, removed or made."""
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        # shutil.rmtree names files relative to an open directory
        if event in EVENTS and (str(args[0]).startswith(str(directory)) or not str(args[0]).startswith("/")):
            seen += 1
            if seen == stop:
                os._exit(9)

    sys.addaudithook(hook)
    save_value(ALONE, directory, value)


def stop_everywhere(world: World, directory: Path, value: int) -> int:
    """The number of moments tried, each from the same state; the last one is beyond the end of the save."""
    for before in range(value):
        save_value(ALONE, directory / "before", before)
    for stop in count(1):
        here = shutil.copytree(directory / "before", directory / str(stop))
        pid = in_a_child(lambda here=here, stop=stop: save_and_stop_before_event(here, value, stop))
        stopped = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert newest_value(here) in ((value - 1, value) if stopped else (value,)), stop
        save_value(ALONE, here, value + 1)  # what the crash left is no hindrance
        assert newest_value(here) == value + 1
        assert len(list(here.iterdir())) <= 2  # nor is it left there for ever
        if not stopped:
            return stop
    raise AssertionError("unreachable")


@pytest.mark.parametrize("value", [3, 4], ids=["replacing", "new and pruning"])
def test_a_stop_before_any_change_of_the_directory(pool: Pool, tmp_path: Path, value: int) -> None:
    [moments] = pool.run(1, stop_everywhere, tmp_path, value, timeout=120)
    assert moments > 10


def save_until_killed(world: World, directory: Path, start: int, victim: int, delay: float) -> None:
    if world.rank == victim:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    for value in count(start):
        save_value(world, directory, value)
        if world.rank == 0:
            (directory / f"confirmed-{value}").touch()


def test_one_of_two_ranks_is_killed(pool: Pool, tmp_path: Path) -> None:
    chance = random.Random(2)
    last = 0
    pool.run(2, save_value, tmp_path, last)
    for victim in (0, 1, 1, 0):
        with pytest.raises(WorkerDiedError):
            pool.run(2, save_until_killed, tmp_path, last + 1, victim, chance.uniform(0.1, 0.3))
        confirmed = [int(p.name.split("-")[1]) for p in tmp_path.glob("confirmed-*")]
        assert newest_value(tmp_path) - max(last, *confirmed, 0) in (0, 1)
        last = newest_value(tmp_path)
