"""Kernels compile for Hopper: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with torch for GPUs, and with what development installs on Linux")
pytestmark = pytest.mark.gloo


@pytest.mark.parametrize("name", ["swiglu", "rms_norm", "rope", "rope back", "fp8 add", "fp8 both", "fp8 rows"])
def test_they_compile_and_move_sixteen_bytes_at_a_time(name: str) -> None:
    ptx = compiled(name)
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx
    assert "ld.global.b16" not in ptx


@pytest.mark.parametrize("name", ["rms_norm weight", "fp8 largest", "fp8 scale"])
def test_what_writes_little_compiles_and_reads_sixteen_bytes_at_a_time(name: str) -> None:
    assert "ld.global.v4" in compiled(name)


def compiled(name: str) -> str:
    """The PTX of a kernel for Hopper."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, str(Path(__file__).with_name("kernels_ptx.py")), name]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=120).stdout
