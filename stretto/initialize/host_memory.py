"""How much memory the processes of this host may have together: what it has, or what a container leaves of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes, by the kernel and by every control group that this process is in; None where neither says."""
    return min(_said(root), default=None)


def _said(root: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, AttributeError):
        yield _total(root / "proc/meminfo")
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _limits(root / "sys/fs/cgroup", path, "memory.max")
            elif "memory" in controllers.split(","):
                yield from _limits(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")


def _limits(groups: Path, path: str, name: str) -> Iterator[int]:
    """Of a group and all above it. In a container the path may be the host's, and then only the root is there."""
    inside = PurePosixPath(path.lstrip("/"))
    for group in (inside, *inside.parents):
        with suppress(OSError, ValueError):  # "max" is no limit
            yield int((groups / group / name).read_text())


def _total(meminfo: Path) -> int:
    """Of the machine."""
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = (line.split() for line in meminfo.read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[:1] == ["MemTotal:"])
