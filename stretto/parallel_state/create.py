"""Create, warm up and destroy one process group, known to torch like any other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup, _register_process_group
from torch.distributed import HashStore, PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d

from stretto.parallel_state.plan import GroupOptions, PlannedGroup
from stretto.world import World

ABORT_SECONDS = 5.0
"""How long a failing rank tries to leave its groups in order."""

_MB = 2**20


@dataclass(frozen=True)
class GroupCost:
    """What one group took: milliseconds to connect and run its first collective, megabytes (2**20 bytes).

    Megabytes are those of the GPU, or of this process on a CPU; None where the system does not tell.
    """

    name: str
    size: int
    milliseconds: float
    megabytes: float | None

    def __str__(self) -> str:
        return f"{self.name} {_price(self.milliseconds, self.megabytes)}"


def costs_line(costs: Sequence[GroupCost]) -> str:
    """All groups on one line: "groups 51 ms, 4.8 MB: tp[0-1] 6 ms, 4.7 MB; pp[0,4] 44 ms, 0.1 MB"."""
    if not costs:
        return "groups none: this rank is alone on every axis"
    known = [cost.megabytes for cost in costs if cost.megabytes is not None]
    total = _price(sum(cost.milliseconds for cost in costs), sum(known) if known else None)
    return f"groups {total}: " + "; ".join(map(str, costs))


def _price(milliseconds: float, megabytes: float | None) -> str:
    return f"{milliseconds:.0f} ms" + ("" if megabytes is None else f", {megabytes:.1f} MB")


def create_group(
    world: World, planned: PlannedGroup, name: str, store: Store, timeout: timedelta
) -> tuple[ProcessGroup, GroupCost]:
    """Connect a group of ranks of the world and run a first collective; exactly its members call this.

    `name` is unlike that of any other group of these processes, earlier ones included, and the same on all
    members; `store` is a part of the world's store that belongs to it alone.

    `torch.distributed.new_group` cannot promise either: told to involve the members only, it names a group
    after how many the process has, which differs between ranks as soon as one is in more groups than another
    (its members then wait for each other under different names), and recurs when a group was destroyed (they
    then find its stale addresses). And where the default group is bound to a GPU it splits that group's
    communicator, for which it needs all ranks of the job.
    """
    start, memory = time.perf_counter(), _memory(world.device)
    members = [world.ranks[rank] for rank in planned.ranks]
    rank = planned.ranks.index(world.rank)
    group = ProcessGroup(store, rank, len(members))
    kinds = _back_ends(world, planned.options)
    for device, kind in kinds.items():
        part = PrefixStore(f"{device}/", store)
        backend: dist.ProcessGroupNCCL | dist.ProcessGroupGloo
        if kind == dist.Backend.NCCL:
            backend = _nccl(part, rank, name, members, planned.options, timeout)
        else:
            backend = dist.ProcessGroupGloo(part, rank, len(members), timeout=timeout)
        backend._set_sequence_number_for_group()
        group._register_backend(torch.device(device), dist.Backend.backend_type_map[kind], backend)
    group._set_default_backend(dist.Backend.backend_type_map[kinds[world.device.type]])
    group._set_group_name(c10d.GroupName(name))
    group._set_group_desc(str(planned))
    if kinds[world.device.type] == dist.Backend.NCCL:
        # Connect now, in the order of creation, and not in that of the first collectives.
        group.bound_device_id = world.device
        group._get_backend(world.device).eager_connect_single_device(world.device)
    _register(group, name, kinds, store, members)
    _warm_up(group, world.device)
    after = _memory(world.device)
    megabytes = None if memory is None or after is None else max(0, after - memory) / _MB
    return group, GroupCost(str(planned), len(members), (time.perf_counter() - start) * 1e3, megabytes)


def fake_group(planned: PlannedGroup, rank: int) -> ProcessGroup:
    """A group that pretends: its collectives return at once, and no peer is needed."""
    place = planned.ranks.index(rank)
    group = ProcessGroup(HashStore(), place, len(planned.ranks))
    kind = ProcessGroup.BackendType.CUSTOM
    # torch's type stubs miss the constructors of the fake back end.
    fake: Any = FakeProcessGroup
    backend = fake._create_internal(place, len(planned.ranks), fake.Options())
    group._register_backend(torch.device("cpu"), kind, backend)
    group._set_default_backend(kind)
    group._set_group_name(c10d.GroupName(str(planned)))
    group._set_group_desc(str(planned))
    return group


def destroy_groups(groups: Sequence[ProcessGroup]) -> None:
    """End groups, the last one first: their connections, their threads, and torch's memory of them."""
    for group in reversed(groups):
        if group in c10d._world.pg_map:
            dist.destroy_process_group(group)


def abort_groups(groups: Sequence[ProcessGroup]) -> None:
    """End groups whose peers may never answer again, without waiting for what is under way on them.

    From a thread of its own, for at most `ABORT_SECONDS`: even an abort may wait for a peer that is gone.
    """

    def abort() -> None:
        for group in reversed(groups):
            group.abort()
        destroy_groups(groups)

    thread = threading.Thread(target=abort, name="stretto-abort", daemon=True)
    thread.start()
    thread.join(ABORT_SECONDS)


def back_end(world: World) -> str:
    """What the world uses for tensors on its device."""
    return dist.BackendConfig(dist.Backend(world.backend)).get_device_backend_map()[world.device.type]


def _back_ends(world: World, options: GroupOptions) -> Mapping[str, str]:
    """Back end by kind of device: one for the world's device, and Gloo for CPU tensors where asked for."""
    own = {world.device.type: options.backend or back_end(world)}
    return {**own, "cpu": dist.Backend.GLOO} if options.cpu else own


def _nccl(
    store: Store, rank: int, name: str, members: list[int], options: GroupOptions, timeout: timedelta
) -> dist.ProcessGroupNCCL:
    settings = dist.ProcessGroupNCCL.Options(is_high_priority_stream=options.high_priority)
    settings._timeout = timeout
    settings.group_name = c10d.GroupName(name)
    settings.global_ranks_in_group = members
    if options.min_ctas is not None:
        settings.config.min_ctas = options.min_ctas
    if options.max_ctas is not None:
        settings.config.max_ctas = options.max_ctas
    return dist.ProcessGroupNCCL(store, rank, len(members), settings)


def _register(group: ProcessGroup, name: str, kinds: Mapping[str, str], store: Store, members: list[int]) -> None:
    """Enter the group where `torch.distributed` looks for its rank, its store, and what to destroy."""
    tables = c10d._world
    config = ",".join(f"{device}:{kind}" for device, kind in kinds.items())
    tables.pg_map[group] = (config if len(kinds) > 1 else "".join(kinds.values()), store)
    tables.pg_names[group] = c10d.GroupName(name)
    tables.pg_backend_config[group] = config
    tables.pg_group_ranks[group] = {rank: place for place, rank in enumerate(members)}
    # A tag of its own would stay behind in torch's table of tags when the group is destroyed.
    tables.pg_to_tag[group] = ""
    tables.tags_to_pg.setdefault("", []).append(group)
    _register_process_group(c10d.GroupName(name), group)


def _warm_up(group: ProcessGroup, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> int | None:
    """Bytes in use: on the GPU by anyone, on a CPU by this process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
