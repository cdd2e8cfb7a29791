"""What is timed with the engine and without trains the same."""

from __future__ import annotations

import json

import pytest

from benchmarks.engine import PLAIN, main

pytestmark = pytest.mark.gloo  # no other processes, but it imports torch


@pytest.mark.parametrize(
    ("dtype", "lr", "apart"), [("fp32", 1e-2, 1e-5), pytest.param("bf16", 1e-3, 1e-3, marks=pytest.mark.nightly)]
)
def test_the_loop_loses_alike_with_the_engine_and_without(tmp_path, capsys, dtype, lr, apart):
    """Catches another learning rate, decay or clipping, gradients of a step left in the next, a microbatch lost."""
    out = tmp_path / "found.json"
    words = f"--shape D0 --device cpu --dtype {dtype} --steps 4 --turns 2 --warmup 2 --lr {lr} --out"
    assert main([*words.split(), str(out)]) == 0
    found = json.loads(out.read_text())
    lost = {name: each[-1] for name, each in found["losses"].items()}
    assert lost.keys() == {PLAIN, "shard none", "shard fsdp"} == found["ms"].keys()
    assert lost == pytest.approx(dict.fromkeys(lost, lost[PLAIN]), abs=apart)
    assert lost[PLAIN] < 6.2  # of log 512 = 6.24: updates count
    assert all(ms["count"] == 4 for ms in found["ms"].values())
    assert "more than plain" in capsys.readouterr().out
