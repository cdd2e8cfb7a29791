"""Process-wide settings of torch, made for the time of a run and put back after it."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Environment variables for libraries that read them at start-up. What the user has set stays."""
    mine = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(mine)
    for name, value in mine.items():
        logging.getLogger(__name__).info("set %s=%s", name, value)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def loopback() -> dict[str, str]:
    """Makes Gloo use the loopback interface: right on one machine, whatever its host name resolves to."""
    return {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").is_dir() else {}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Threads of one CPU operation: those of all local ranks together should not exceed the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeds(seed: int) -> Iterator[None]:
    """Begin the global generators of Python, NumPy and torch from a seed, for code that uses them.

    Stretto's own numbers do not: they are functions of (seed, name, index), see `stretto.random`. Those of the GPUs
    are not put back: asking for their state would touch each.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextmanager
def determinism() -> Iterator[None]:
    """Only kernels that give the same bits each time; an operation that has none raises.

    cuBLAS is reproducible with a fixed workspace alone (its manual, "Results reproducibility"), and cuDNN must
    not pick kernels by timing them. Memory that nobody has written is not filled, since nobody reads it.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    memory: Any = torch.utils.deterministic
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        with variables(CUBLAS_WORKSPACE_CONFIG=":4096:8"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def matmul_precision(*, tf32: bool) -> Iterator[None]:
    """Whether an fp32 GEMM may round its factors to TF32, which has 10 bits of mantissa in place of 23.

    Tensor cores multiply those; sums stay fp32. Only GPUs that have TF32 (Ampere and later) do anything else.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def allocator() -> dict[str, str]:
    """Lets blocks of GPU memory grow, so that sizes that change from step to step leave no gaps that nothing fits.

    Empty where the user has configured the allocator, under either of its names. The allocator reads it once, as a
    process first uses a GPU, and keeps it as long as the process lives.
    """
    said = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ)
    return {} if said else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def parse_cpus(text: str) -> frozenset[int]:
    """Cores of a Linux list: "0-3,8" -> {0, 1, 2, 3, 8}."""
    runs = [part.split("-") for part in text.strip().split(",") if part]
    return frozenset(cpu for run in runs for cpu in range(int(run[0]), int(run[-1]) + 1))


def cpus_near(device: torch.device, sysfs: Path = Path("/sys")) -> frozenset[int]:
    """Cores of the NUMA node that a GPU hangs on; empty where the system does not say."""
    gpu: Any = torch.cuda.get_device_properties(device)  # torch's stubs do not know its PCI address
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
        return parse_cpus((sysfs / f"devices/system/node/node{node}/cpulist").read_text()) if node >= 0 else frozenset()
    except (OSError, ValueError):
        return frozenset()


@contextmanager
def affinity(cpus: frozenset[int]) -> Iterator[None]:
    """Run on these cores, where this process may use all of them; a launcher's own choice stays.

    Copies between host and GPU, and the kernel launches of a busy host, are slower from the other socket.
    """
    whole = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == os.cpu_count()
    if not (cpus and whole):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus & before or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
