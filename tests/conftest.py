"""What all tests share: processes that are forked from one that has torch imported."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

POOL_SIZE = 8

# Whoever asks whether there are GPUs must not begin to use them: processes could not be forked any more.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# One thread computes in each process, as in the ranks of a pool: more would wait for each other, on a core that another
# test has, and take twice the time. A file is compiled once, not by each of the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Triton reads this as it is imported, whoever does so first: without a GPU its interpreter runs our kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# On a busy machine an example may take any time and still be right. At night there are ten times as many; in CI always
# the same, so that a change is judged by what it changes.
settings.register_profile("commit", deadline=None, max_examples=20)
settings.register_profile("nightly", deadline=None, max_examples=200, derandomize="CI" in os.environ)
settings.load_profile("commit")

_POOL: pytest.StashKey[object] = pytest.StashKey()
_GPUS: pytest.StashKey[object] = pytest.StashKey()
_FRESH: pytest.StashKey[object] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two run side by side (`-n 2 --dist loadgroup`), all worlds of eight go to one, for they fill two cores.

    They come first, then the files of few tests, which take long each; those of many short ones are left for the end,
    so that neither of the two waits long for the other (`--no-loadscope-reorder` keeps this order).
    """
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        group = "pool" if "pool" in getattr(item, "fixturenames", ()) else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    if "PYTEST_XDIST_WORKER" in os.environ:
        sizes = Counter(map(_group, items))
        items.sort(key=lambda item: (_group(item) != "pool", sizes[_group(item)]))


def _group(item: pytest.Item) -> str:
    """The tests with which it runs, one after the other."""
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return str(marker.args[0])


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork what selected tests want to fork from, now, while this process has run nothing yet."""
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())} & {"pool", "gpus", "fresh"}
    if not wanted or session.config.option.collectonly:
        return
    from stretto.testing import Fresh, Pool  # here, so that pure tests do not import torch

    if "pool" in wanted:
        session.config.stash[_POOL] = pool = Pool(POOL_SIZE)
        session.config.add_cleanup(pool.close)
    if "gpus" in wanted:
        import torch

        if count := torch.cuda.device_count():
            session.config.stash[_GPUS] = gpus = Pool(count, device="cuda")
            session.config.add_cleanup(gpus.close)
    if "fresh" in wanted:
        session.config.stash[_FRESH] = fresh = Fresh()
        session.config.add_cleanup(fresh.close)


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> object:
    """Eight local workers: `pool.run(n, fn, *args)` runs `fn(world, *args)` as the ranks of a world of n."""
    return request.config.stash[_POOL]


@pytest.fixture(scope="session")
def gpus(request: pytest.FixtureRequest) -> object:
    """A worker for each GPU, with NCCL beside Gloo, forked before any test has used one."""
    return request.config.stash[_GPUS]


@pytest.fixture(scope="session")
def fresh(request: pytest.FixtureRequest) -> object:
    """New processes: `fresh.run(fn, *args)` runs a function as a program, with its exit code and output."""
    return request.config.stash[_FRESH]


@pytest.fixture
def torchrun() -> list[str]:
    """It and its options for two ranks that meet at a port of their own; a program, or `-m` and a module, follows."""
    return [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is free, and not among those that the system gives away."""
    for candidate in range(21_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
        yield candidate
        return
