"""Which layouts of a run fit a device, and how long their steps take: those that the rules let through, ranked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import product
from math import inf
from types import MappingProxyType
from typing import Any, Final, Literal

from stretto.arguments import ConfigError
from stretto.arguments.elsewhere import graphed
from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Value
from stretto.estimate.chips import Chip
from stretto.estimate.host import HostMemory, fullest_node
from stretto.estimate.memo import Memo
from stretto.estimate.memory import fullest
from stretto.estimate.passes import StepTime
from stretto.estimate.step_time import least_step_time, step_time

Try = Callable[[Mapping[str, Value]], Arguments | None]
"""The run with these settings, by path; None where a rule rejects them."""

SIZES: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "parallel.tp": (1, 2, 4, 8),
        "parallel.pp": (1, 2, 4, 8, 16, 32, 64),
        "parallel.ep": (1, 2, 4, 8, 16, 32, 64, 128),
        "batch.micro_batch": (1, 2, 4, 8),
    }
)
"""What is tried of settings that the user leaves open; dp follows."""
SCHEDULES: Final[tuple[dict[str, Value], ...]] = (
    {"parallel.schedule": "1f1b"},
    {"parallel.schedule": "interleaved", "parallel.vpp": 2},
    {"parallel.schedule": "zbv"},
)
SHARDING: Final[tuple[Literal["none", "zero1", "fsdp"], ...]] = ("none", "zero1", "fsdp")
RECOMPUTE: Final[tuple[Literal["none", "selective", "block"], ...]] = ("none", "selective", "block")


@dataclass(frozen=True)
class Plan:
    """A layout that runs: what it sets, what the fullest rank holds in bytes, what its step takes."""

    settings: Mapping[str, Value]
    args: Arguments
    memory: int
    time: StepTime

    @property
    def rate(self) -> float:
        """Tokens a second of a GPU."""
        b, world = self.args.batch, self.args.run.nproc or 1
        return b.global_batch * b.seq_len / world / self.time.total


@dataclass(frozen=True)
class Fitting:
    """A layout that fits, of which nobody has asked yet how long its step takes."""

    settings: Mapping[str, Value]
    args: Arguments
    memory: int

    @property
    def cut(self) -> tuple[int, ...]:
        """How it cuts the model."""
        p = self.args.parallel
        return p.tp, p.pp, p.ep


@dataclass(frozen=True)
class Limits:
    """Bytes that there are."""

    device: float
    host: float = inf
    """For all ranks of a node."""


@dataclass(frozen=True)
class Found:
    """What was tried."""

    fit: tuple[Plan, ...]
    """Of what fits, the quickest first."""
    fitting: int
    """How many fit."""
    leanest: Plan | None
    """Of what does not, the one that lacks least; told where nothing fits."""
    tried: int
    host: tuple[Mapping[str, Value], HostMemory] | None = None
    """Of what fits a device and no host, what needs least of that, if there is any."""


def plan(run: Arguments, attempt: Try, fixed: frozenset[str], chip: Chip, limits: Limits, *, most: int) -> Found:
    """Try layouts of `run` on as many ranks as it has, all but what is `fixed`, against `limits`.

    Of the `most` quickest at most two cut the model alike: the others differ by recomputation or microbatch. Steps are
    those of `step_time`, memory that of `ledger`, which knows nothing of an allocator's fragments: leave some.
    """
    tried, fit, leanest, memo, limit = 0, list[Fitting](), None, Memo(), limits.device
    host: tuple[Mapping[str, Value], HostMemory] | None = None
    for variants in _candidates(run, attempt, fixed):
        tried += len(variants)
        for settings, args in reversed(variants):  # the leanest first: where it does not fit, none does
            best = inf if leanest is None else leanest.memory
            try:
                memory = fullest(args, enough=limit if fit else max(limit, best), memo=memo)
            except ConfigError:  # of a budget of activations that none of its recomputation keeps
                continue
            if memory <= limit:
                need = HostMemory() if limits.host == inf else fullest_node(args, memo)
                if need.total <= limits.host:
                    fit.append(Fitting(settings, args, memory))
                elif host is None or need.total < host[1].total:
                    host = settings, need
                continue
            if memory < best:
                leanest = Plan(settings, args, memory, StepTime())
            if args is variants[-1][1]:
                break
    return Found(_quickest(fit, attempt, chip, limit, most, memo), len(fit), None if fit else leanest, tried, host)


def _quickest(fit: list[Fitting], attempt: Try, chip: Chip, limit: float, most: int, memo: Memo) -> tuple[Plan, ...]:
    """Resolved with all that they set, so that what follows from sharding and recomputation counts, too."""
    shown, alike = list[Plan](), Counter[tuple[int, ...]]()
    for each in _quickest_first(fit, chip, lambda each: alike[each.cut] == 2, memo):
        if len(shown) == most:
            break
        if (args := attempt(each.settings)) is None:
            continue
        memory = fullest(args, memo=memo)
        if memory <= limit:
            alike[each.cut] += 1
            shown.append(Plan(each.settings, args, memory, step_time(args, chip, memo)))
    return tuple(sorted(shown, key=lambda p: (p.time.total, p.memory)))


def _quickest_first(
    fit: list[Fitting], chip: Chip, passed_over: Callable[[Fitting], bool], memo: Memo
) -> Iterator[Fitting]:
    """By the time of their steps, then by memory. A step is simulated only when it may be the next: none is quicker
    than without its bubble."""
    waiting = [(least_step_time(each.args, chip, memo), 0, each.memory, n) for n, each in enumerate(fit)]
    heapify(waiting)
    while waiting:
        _, simulated, memory, n = heappop(waiting)
        if passed_over(fit[n]):
            continue
        if simulated:
            yield fit[n]
        else:
            heappush(waiting, (step_time(fit[n].args, chip, memo).total, 1, memory, n))


Variant = tuple[Mapping[str, Value], Arguments]


def _candidates(run: Arguments, attempt: Try, fixed: frozenset[str]) -> Iterator[list[Variant]]:
    """Layouts are resolved, with what follows from them; sharding and recomputation are put in."""
    p, world = run.parallel, run.run.nproc or 1

    def sizes(path: str, now: int) -> tuple[int, ...]:
        return (now,) if path in fixed else SIZES[path]

    for tp, pp in product(sizes("parallel.tp", p.tp), sizes("parallel.pp", p.pp)):
        dp, rest = divmod(world, tp * pp * p.cp)
        if rest or pp > run.model.layers or tp > (p.gpus_per_node or world) or dp * pp > run.batch.global_batch:
            continue
        ways: tuple[dict[str, Value], ...] = SCHEDULES if pp > 1 else ({},)
        seen = list[Arguments]()  # ways that differ in what is fixed alone are one
        experts = sizes("parallel.ep", p.ep) if run.model.experts else (p.ep,)
        for way, ep, size in product(ways, experts, sizes("batch.micro_batch", run.batch.micro_batch)):
            if (tp * p.cp * dp) % ep or run.batch.global_batch % (dp * size):
                continue  # a rule says so too, but looks for a way out of it, which takes its time
            said: dict[str, Value] = {"parallel.tp": tp, "parallel.pp": pp, "parallel.dp": dp}
            said |= {"batch.micro_batch": size} | way | ({"parallel.ep": ep} if run.model.experts else {})
            said |= {"parallel.sequence_parallel": True} if tp > 1 else {}
            said = {path: value for path, value in said.items() if path not in fixed}
            if (args := attempt(said)) is not None and args not in seen:
                seen.append(args)
                yield list(_variants(args, said, fixed))


def _variants(args: Arguments, said: Mapping[str, Value], fixed: frozenset[str]) -> Iterator[Variant]:
    """From most to least memory."""
    mode, way, p = args.parallel.sharding or "none", args.run.recompute, args.parallel
    chosen = "run.recompute" in fixed or args.run.activation_budget is not None
    modes = SHARDING if (p.dp or 1) * p.cp > 1 else SHARDING[:1]
    for sharding, recompute in product(
        (mode,) if "parallel.sharding" in fixed else modes, (way,) if chosen else RECOMPUTE
    ):
        parallel: Any = replace(p, sharding=sharding)
        run: Any = replace(args.run, recompute=recompute)
        more: dict[str, Value] = {"parallel.sharding": sharding} if sharding != mode else {}
        more |= {"run.recompute": recompute} if recompute != way else {}
        yield {**said, **more}, graphed(replace(args, parallel=parallel, run=run))
