"""The training loop never makes the device wait for the host (P30).

Faults to catch: figures of a step that are read before the next one is launched; a host read anywhere else in a step;
an evaluation that reads each batch; a number of the host that is put into one element; a step that counts as done when
it was launched; a step whose figures are late, and that counts as done when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from stretto.arguments import parse
from stretto.data.feed import Feed
from stretto.data.lost import Lost
from stretto.data.store import TokenStore, write_store
from stretto.data.text import EvalSet
from stretto.layout import Layout
from stretto.testing import Pool
from stretto.train.loop import Loop
from stretto.train.readback import Readback
from stretto.train.record import Everyone
from stretto.train.run import trainer_of
from stretto.train.step import Stepper
from stretto.verify import build
from stretto.world import World

WORDS = "--hidden 32 --heads 4 --layers 2 --vocab 61 --seq-len 16 --global-batch 4 --micro-batch 2 --steps 50"


class HostReads(TorchFunctionMode):
    """Counts what would make the host wait for a GPU."""

    READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS or (name == "__setitem__" and _of_the_host(*args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _of_the_host(into: torch.Tensor, index: Any, value: Any) -> bool:
    """Whether one element gets a number of the host: torch makes a tensor of it there, and waits for its copy."""
    return not isinstance(value, torch.Tensor) and not into[index].dim()


@contextmanager
def loop(world: World, directory: Path, words: str = "") -> Iterator[Loop]:
    """A loop of one rank that has made its first step."""
    args = parse(f"{WORDS} --tp 1 --pp 1 --dp 1 --nproc 1 {words}".split()).args
    path = directory / "text.tokens"
    with write_store(path, vocab_size=61, eod=0, fingerprint="test") as writer:
        writer.add(torch.arange(16 * 12).remainder(61).numpy(), 16 * 12)
    text = TokenStore.open(path)
    with build(args, Layout.of(), world) as session:
        trainer = trainer_of(
            args, session.built, Feed(text, seq_len=16, seed=0), [EvalSet("held_out", text, Lost(), None)]
        )
        made = trainer.loop(args.run.steps, Everyone([]))
        made.advance()
        yield made


@pytest.mark.gloo
def test_figures_are_read_after_the_next_step_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    step, read = Stepper.step, Readback.read

    def noted_step(*args: Any, **kwargs: Any) -> Any:
        told.append("launch")
        return step(*args, **kwargs)

    def noted_read(self: Readback) -> list[float]:
        told.append("read")
        return read(self)

    with loop(World.single(), tmp_path) as made:
        monkeypatch.setattr(Stepper, "step", noted_step)
        monkeypatch.setattr(Readback, "read", noted_read)
        for _ in range(3):
            made.advance()
    assert told == ["launch", "launch", "read", "launch", "read"]


@pytest.mark.gloo
def test_nothing_else_is_read_by_the_host(tmp_path: Path) -> None:
    with loop(World.single(), tmp_path) as made:
        made.advance()  # first sizes are seen, and numbers drawn, in the steps before
        with HostReads() as reads:
            made.advance()
            assert reads.found == ["tolist"]
            reads.found.clear()
            made.evaluate()
            assert reads.found == ["tolist"]


class Distant:
    """A device that takes a second for each step, whose host launches it at once: time is what the device has done."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def wait(self, until: float) -> bool:
        """Whether the host had to."""
        waited = self.host < until
        self.host = max(self.host, until)
        return waited


@pytest.mark.gloo
@pytest.mark.parametrize("proven", [True, False])
def test_steps_take_what_the_device_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proven: bool) -> None:
    """Also around evaluations, where all is waited for, and nothing is launched ahead; and where figures are late."""
    device, told = Distant(), list[float]()

    class Read(Readback):
        def __init__(self, *scalars: Any) -> None:
            super().__init__(*scalars)
            device.free = self.done = max(device.free, device.host) + 1
            device.host += 0.01

        def read(self) -> list[float]:
            self.ago = 0.0 if device.wait(self.done) else None
            return super().read()

    class LateRead(Read):
        def read(self) -> list[float]:
            device.wait(device.free)
            self.ago = device.host - self.done
            return Readback.read(self)

    with loop(World.single(), tmp_path, f"--log-every {3 if proven else 1} --eval-every 6") as made:
        monkeypatch.setattr("stretto.train.loop.Readback", Read)
        monkeypatch.setattr("stretto.train.loop.LateReadback", LateRead)
        monkeypatch.setattr(Stepper, "proven", proven)
        monkeypatch.setattr(made, "evaluate", lambda: None)
        monkeypatch.setattr(made.meter, "_clock", lambda: device.host)
        monkeypatch.setattr(made.listener, "stepped", lambda record: told.append(record.ms_per_step))
        made.meter.resume()
        made.meter.new_line()
        for _ in range(18):
            made.advance()
    assert told == pytest.approx([1000.0] * len(told), rel=0.02), told
    assert len(told) >= 17


def _without_synchronising(world: World, directory: Path) -> None:
    with loop(world, directory, "--device cuda --dtype bf16") as made:
        made.advance()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                made.advance()
            made.evaluate()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_no_step_waits_for_the_gpu(gpus: Pool, tmp_path: Path) -> None:
    gpus.run(1, _without_synchronising, tmp_path)
