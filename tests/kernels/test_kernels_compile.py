"""Kernels compile for Hopper: the interpreter takes what the compiler rejects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")
pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each kernel, its PTX for Hopper; a process of its own, as this one may have made them for the
    interpreter."""
    out = tmp_path_factory.mktemp("ptx")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, str(Path(__file__).with_name("kernels_ptx.py")), str(out)]
    subprocess.run(command, check=True, env=env, timeout=240)
    return out


WIDE = [
    "swiglu",
    "rms_norm",
    "rope",
    "rope back",
    "merge",
    "head norm",
    "fp8 add",
    "fp8 both",
    "fp8 rows",
    "experts add",
    "experts scatter",
    "adamw",
    "embedding",
]


@pytest.mark.parametrize("name", [*WIDE, "swiglu weighted"])
def test_they_compile_and_move_sixteen_bytes_at_a_time(ptx: Path, name: str) -> None:
    code = (ptx / name).read_text()
    assert "ld.global.v4" in code
    assert "st.global.v4" in code
    assert "ld.global.b16" not in code


@pytest.mark.parametrize("name", ["rms_norm weight", "fp8 largest", "fp8 scale"])
def test_what_writes_little_compiles_and_reads_sixteen_bytes_at_a_time(ptx: Path, name: str) -> None:
    assert "ld.global.v4" in (ptx / name).read_text()


@pytest.mark.parametrize("name", ["experts count", "experts place"])
def test_a_sort_compiles(ptx: Path, name: str) -> None:
    assert ".entry" in (ptx / name).read_text()


def test_narrow_rows_come_several_at_a_time(ptx: Path) -> None:
    """Of a head's norm: sixteen bytes at a time, too, but for its weights."""
    code = (ptx / "rms_norm head").read_text()
    assert code.count("ld.global.v4") >= 8
    assert "st.global.v4" in code


def test_tiles_to_come_are_under_way_to_shared_memory(ptx: Path) -> None:
    """Sixteen bytes at a time; waiting for a tile leaves the next one under way."""
    code = (ptx / "head norm back").read_text()
    copies = [line for line in code.splitlines() if "cp.async.c" in line and "commit" not in line]
    assert copies
    assert all("cp.async.cg.shared.global" in line and "0x10" in line for line in copies)
    assert [int(n) > 0 for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", code)].count(True) == 2
    assert "st.global.v4" in code
    assert "ld.global.b16" not in code


def test_products_are_those_of_a_warpgroup_on_tiles_that_come_and_go_beside_them(ptx: Path) -> None:
    code = (ptx / "experts products").read_text()
    assert "wgmma.mma_async" in code
    assert "cp.async.bulk.tensor.2d" in code
    assert "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add" in code


@pytest.mark.parametrize(("name", "loads", "stores"), [("loss", 2, 0), ("loss capped", 2, 0), ("loss back", 2, 2)])
def test_logits_come_and_go_sixteen_bytes_at_a_time(ptx: Path, name: str, loads: int, stores: int) -> None:
    """Two for a thread. Only the end of a row, or the label, comes by itself."""
    code = (ptx / name).read_text()
    assert (code.count("ld.global.v4"), code.count("st.global.v4")) == (loads, stores)
    assert code.count("ld.global.b16") <= 2
