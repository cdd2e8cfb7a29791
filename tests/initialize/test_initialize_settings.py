"""Settings of the process, for the time of a run."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stretto.initialize import settings
from stretto.initialize.group import largest
from stretto.testing import Pool
from stretto.world import World

pytestmark = pytest.mark.gloo


def test_lists_of_cores() -> None:
    assert settings.parse_cpus("0-3,8\n") == {0, 1, 2, 3, 8}
    assert settings.parse_cpus("\n") == frozenset()


def test_cores_near_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x9B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    device = torch.device("cuda", 0)
    assert settings.cpus_near(device, tmp_path) == frozenset()
    for path, text in {
        "bus/pci/devices/0000:9b:00.0/numa_node": "1\n",
        "devices/system/node/node1/cpulist": "4-7\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    assert settings.cpus_near(device, tmp_path) == {4, 5, 6, 7}
    (tmp_path / "bus/pci/devices/0000:9b:00.0/numa_node").write_text("-1\n")  # a machine of one node
    assert settings.cpus_near(device, tmp_path) == frozenset()


def test_affinity_holds_inside_and_is_put_back() -> None:
    before = os.sched_getaffinity(0)
    if len(before) != os.cpu_count():
        pytest.skip("this process may not use all cores")
    one = frozenset({min(before)})
    with settings.affinity(one):
        assert os.sched_getaffinity(0) == one
        with settings.affinity(frozenset(before)):  # chosen already: not touched
            assert os.sched_getaffinity(0) == one
    assert os.sched_getaffinity(0) == before


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "1")
    monkeypatch.delenv("THEIRS", raising=False)
    with settings.variables(MINE="2", THEIRS="3"):
        assert (os.environ["MINE"], os.environ["THEIRS"]) == ("1", "3")
    assert os.environ["MINE"] == "1"
    assert "THEIRS" not in os.environ


def agree(world: World) -> int:
    return largest(world, 75 if world.rank == 1 else 0)


def test_all_ranks_return_the_largest_exit_code(pool: Pool) -> None:
    assert pool.run(3, agree) == [75] * 3
    assert pool.run(1, agree) == [0]


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_precision_of_products_holds_inside_and_is_put_back(tf32: bool, precision: str) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with settings.matmul_precision(tf32=tf32):
            assert torch.get_float32_matmul_precision() == precision
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_an_allocator_that_the_user_has_configured_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    assert settings.allocator() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv(name, "max_split_size_mb:64")
    assert settings.allocator() == {}


def test_variables_that_are_set_are_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MINE", "1")
    with caplog.at_level("INFO", "stretto"), settings.variables(MINE="2", THEIRS="3"):
        assert caplog.messages == ["set THEIRS=3"]
