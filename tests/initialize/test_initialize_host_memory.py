"""How much memory a host has: the machine's, or the least that a control group leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stretto.initialize.host_memory import host_memory

pytestmark = pytest.mark.pure

GIB = 2**30


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {}, 128),
        ("0::/\n", {"memory.max": "max"}, 128),
        ("0::/\n", {"memory.max": str(64 * GIB)}, 64),
        ("0::/job/step\n", {"job/memory.max": str(32 * GIB), "job/step/memory.max": "max"}, 32),
        ("0::/job/step\n", {"job/memory.max": str(32 * GIB), "job/step/memory.max": str(16 * GIB)}, 16),
        # In a container the path is the host's, and the limit stands at the root.
        ("0::/kubepods/pod7\n", {"memory.max": str(48 * GIB)}, 48),
        ("5:cpu:/a\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": str(8 * GIB)}, 8),
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 128),
        ("0::/\n", {"memory.max": str(512 * GIB)}, 128),
    ],
)
def test_the_least_of_all_limits_counts(groups: str, limits: dict[str, str], expected: int, tmp_path: Path) -> None:
    """Catches: a limit of a group above left out; one that is larger than the machine; version 1 not read."""
    files = {"proc/self/cgroup": groups, "proc/meminfo": f"MemTotal:  {128 * 2**20} kB\nMemFree: 1 kB\n"}
    for name, text in {**files, **{f"sys/fs/cgroup/{name}": text for name, text in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == expected * GIB


def test_this_machine_has_some() -> None:
    found = host_memory()
    assert found is None or found > 2**28
