"""Messages that pass behind products: these stay what they are, and there is one to do while a message is on its way.

Here a window is a mailbox over Gloo, which has the order of one over copy engines and none of its speed; that one is
tested in `tests/peer_buffer`.

Faults to catch: rows of another rank multiplied in place of this one's; a first part of a product that waits for the
message; a weight gradient that is not deferred; a message of the backward that nothing passes behind; what is gathered
again waited for at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensor_parallel_full import compare, draw, mine, set_full
from torch import Tensor, nn

from stretto.collectives import all_gather_async, reduce_scatter_async, reduce_scatter_rows_async
from stretto.layout import Layout
from stretto.parallel_state import ParallelState
from stretto.params import Init, collect
from stretto.tensor_parallel import Build, ColumnParallelLinear, Lazy, Pointwise, RowParallelLinear, formulas
from stretto.testing import Pool
from stretto.world import AsyncTensor, Axis, Rows, Work, World

pytestmark = pytest.mark.gloo

S, B, H, INNER = 24, 2, 6, 36
INIT = Init(std=1.0)


class Arrival:
    """The work of a message, which notes when it is waited for."""

    def __init__(self, work: Work | None, log: list[str], name: str) -> None:
        self.work, self.log, self.name = work, log, name

    def wait(self) -> None:
        self.log.append(f"take {self.name}")
        assert self.work is not None
        self.work.wait()

    def is_completed(self) -> bool:
        raise AssertionError("nobody asks")


class Mailbox:
    """A `PeerBuffer` over the group of an axis; rows are asked for in the order in which they could leave."""

    def __init__(self, axis: Axis, log: list[str], least: int = 0) -> None:
        self.axis, self.log, self.least = axis, log, least

    def takes(self, size: int) -> bool:
        return size >= self.least

    def gather(self, x: Tensor) -> AsyncTensor:
        self.log.append("begin gather")
        coming = all_gather_async(x, self.axis)
        return AsyncTensor(coming.tensor, Arrival(coming.work, self.log, "gather"))

    def scatter(self, rows: Rows, like: Tensor) -> AsyncTensor:
        parts: dict[int, Tensor] = {}
        for n in range(1, self.axis.size):
            to = (self.axis.rank + n) % self.axis.size
            out = torch.full(like.shape, torch.nan, dtype=like.dtype)
            rows(to, out)
            self.log.append(f"rows for {n}")
            parts[to] = out
        self.log.append("begin scatter")
        parts[self.axis.rank] = rows(self.axis.rank, None)
        coming = reduce_scatter_async(torch.cat([parts[r] for r in range(self.axis.size)]), self.axis)
        return AsyncTensor(coming.tensor, Arrival(coming.work, self.log, "scatter"))


class Sums:
    """Accumulators that deferred as `MainGradients` do, and note what they add."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.totals = log, dict[nn.Parameter, Tensor]()
        self.names: dict[nn.Parameter, str] = {}
        self.deferred: list[tuple[nn.Parameter, Callable[[Tensor, bool], object]]] = []

    def expect(self, weight: nn.Parameter) -> None:
        self.names[weight] = f"dW{len(self.names)}"

    def add(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        self.log.append(self.names[weight])
        first_microbatch = weight not in self.totals
        write(self.totals.setdefault(weight, torch.full_like(weight, torch.nan, requires_grad=False)), first_microbatch)

    def defer(self, weight: nn.Parameter, write: Callable[[Tensor, bool], object]) -> None:
        self.flush()
        self.deferred.append((weight, write))

    def flush(self) -> None:
        if self.deferred:
            self.add(*self.deferred.pop())


class Block(nn.Module):
    """x + down(act(up(norm(x)))), the weight of the norm fixed."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.norm = Pointwise.of(formulas.RMS_NORM, build, eps=1e-5)
        self.act = Pointwise.of(formulas.GELU, build)
        self.gain = torch.linspace(0.5, 1.5, H, dtype=torch.float64)
        self.up = ColumnParallelLinear(H, INNER, build, bias=True, init=INIT)
        self.down = RowParallelLinear(INNER, H, build, bias=True, init=INIT)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor | Lazy = self.norm(x, self.gain)
        return x + self.down(self.act(self.up(normed)))


def model(build: Build, layers: int) -> nn.Sequential:
    made = nn.Sequential(*(Block(build) for _ in range(layers)))
    set_full(made)
    return made


def gradients(made: nn.Module, sums: Sums | None) -> dict[str, Tensor]:
    """Of what is cut: each rank's own part. Biases of rows are partial under sequence parallelism, and left out."""
    found = {}
    for item in collect(made):
        if item.name.endswith("down.bias"):
            continue
        grad = sums.totals.get(item.param, item.param.grad) if sums else item.param.grad
        assert grad is not None, item.name
        found[item.name] = grad
    return found


def trained(build: Build, layers: int = 2, times: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    sums = build.accumulators
    assert sums is None or isinstance(sums, Sums)
    made = model(build, layers)
    x = mine(draw((S, B, H), "x"), build.tp, build.sequence_parallel).clone().requires_grad_()
    for _ in range(times):
        y = made(x)
        y.backward(mine(draw((S, B, H), "dy"), build.tp, build.sequence_parallel))
    if sums is not None:
        sums.flush()
    assert x.grad is not None
    return y.detach(), x.grad, gradients(made, sums)


@pytest.mark.parametrize("tp", [2, 3, 4, pytest.param(8, marks=pytest.mark.nightly)])
def test_behind_each_other_or_not_the_numbers_are_the_same(pool: Pool, tp: int) -> None:
    """With a window and without, made again or kept, over one microbatch and three: outputs and all gradients."""
    pool.run(tp, _same_numbers)


def _same_numbers(world: World) -> None:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        for recompute in (False, True):
            for times in (1, 3):
                plain = Build(state.axis("tp"), True, torch.float64, recompute=recompute)
                y, dx, grads = trained(plain, times=times)
                for least in (0, 10**9):  # by the window, and past it
                    log: list[str] = []
                    axis = replace(plain.tp, peer_buffer=Mailbox(plain.tp, log, least))
                    found = trained(replace(plain, tp=axis, accumulators=Sums(log)), times=times)
                    what = f"again={recompute} times={times} least={least}"
                    compare(what, {"y": found[0], "dx": found[1]}, {"y": y, "dx": dx})
                    compare(what, found[2], grads)
                    assert any("begin" in event for event in log) == (least == 0)


def test_something_passes_while_each_message_is_under_way(pool: Pool) -> None:
    """Forward: a part of the product. Backward: the weight gradient of the product before, as soon as there is one."""
    for log in pool.run(2, _events):
        assert log == [
            *["begin gather", "own rows", "take gather", "other rows"],  # up 0
            *["other rows", "rows for 1", "begin scatter", "own rows", "take scatter"],  # down 0
            *["begin gather", "own rows", "take gather", "other rows"],
            *["other rows", "rows for 1", "begin scatter", "own rows", "take scatter"],
            *["begin gather", "take gather"],  # the gradient of what left down 1; no weight gradient is there yet
            *["rows for 1", "begin scatter", "dW3", "take scatter"],  # that of what entered up 1, behind that of down 1
            *["begin gather", "dW2", "take gather"],
            *["rows for 1", "begin scatter", "dW1", "take scatter"],
            "dW0",  # the end of the step
        ]


@pytest.mark.parametrize("tp", [4, 8])
def test_on_more_ranks_rows_leave_one_rank_after_another(pool: Pool, tp: int) -> None:
    """Each rank's rows leave as they are there, those of the next rank first; the weight gradient passes as on two."""
    leave = [*(f"rows for {n}" for n in range(1, tp)), "begin scatter"]
    for log in pool.run(tp, _mailbox_events):
        assert log == [
            *["begin gather", "take gather", *leave, "take scatter"] * 2,
            *["begin gather", "take gather", *leave, "dW3", "take scatter"],
            *["begin gather", "dW2", "take gather", *leave, "dW1", "take scatter"],
            "dW0",
        ]


def _mailbox_events(world: World) -> list[str]:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        log: list[str] = []
        tp = state.axis("tp")
        trained(Build(replace(tp, peer_buffer=Mailbox(tp, log)), True, torch.float64, accumulators=Sums(log)))
        return log


def _events(world: World) -> list[str]:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        log: list[str] = []
        tp = state.axis("tp")
        axis = replace(tp, peer_buffer=Mailbox(tp, log))
        with _Noted(log):
            trained(Build(axis, True, torch.float64, accumulators=Sums(log)))
        return log


class _Noted(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes products of a half of the tokens: those of `overlap`."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left = args[1] if func._overloadpacket is torch.ops.aten.addmm else args[0]
            if left.shape[0] == S * B // 2:
                waiting = self.log and self.log[-1] in ("begin gather", "begin scatter")
                self.log.append("own rows" if waiting else "other rows")
        return func(*args, **(kwargs or {}))


def test_what_is_made_again_is_gathered_behind_what_comes_next(pool: Pool) -> None:
    """It is taken where it is multiplied: after another gradient and the next message have begun."""
    for log in pool.run(2, _events_again):
        backward = log[log.index("dW3") :]
        recompute = backward.index("begin gather")
        assert backward[recompute : recompute + 4] == ["begin gather", "begin gather", "dW2", "take gather"]


def _events_again(world: World) -> list[str]:
    with ParallelState.build(Layout.of(tp=world.size), world) as state:
        log: list[str] = []
        tp = state.axis("tp")
        trained(
            Build(
                replace(tp, peer_buffer=Mailbox(tp, log)), True, torch.float64, recompute=True, accumulators=Sums(log)
            )
        )
        return log


def test_a_sum_in_parts_needs_a_window() -> None:
    with pytest.raises(ValueError, match="no peer buffer"):
        reduce_scatter_rows_async(lambda _, __: torch.ones(1), torch.ones(2), Axis("tp", 0, (0, 1)))
