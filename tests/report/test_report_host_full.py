"""P19: a host that has too little memory is named before a run takes any, with changes that would fit.

Faults to catch: the copy that checkpoints are written from left out; ranks of a node counted as one; copies that
data-parallel ranks do not write counted.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.cli import explain, plan
from stretto.estimate.host import fullest_node
from stretto.report.host_full import host_full

pytestmark = pytest.mark.gloo  # a run of two ranks

GIB = 2**30
LLAMA = ["--preset", "llama3-8b", "--tp", "1", "--pp", "1", "--device", "cuda", "--micro-batch", "1"]
OFFLOAD = [*LLAMA, "--optimizer-cpu-offload"]


def test_eight_billion_parameters_beside_a_gpu() -> None:
    """Masters and moments, and as much once more for checkpoints: more than 128 GiB."""
    args = parse([*OFFLOAD, "--nproc", "1", "--global-batch", "8"], files=False).args
    need = fullest_node(args)
    assert need.optimizer == pytest.approx(12 * 8_030_261_248, rel=1e-3)
    assert need.staging == pytest.approx(12 * 8_030_261_248, rel=1e-3)
    text = host_full(args, fullest_node, 1, 128 * GIB)
    assert text is not None
    assert "has 128.0 GiB of memory, and its 1 rank needs 179.5: optimizer 89.7, staging 89.7" in text
    assert "--no-async-save (89.7 GiB)" in text
    assert host_full(args, fullest_node, 1, 180 * GIB) is None


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (["--nproc", "1"], 128),
        (["--nproc", "8", "--sharding", "none"], 512),
        (["--nproc", "8", "--sharding", "none"], 128),
        (["--nproc", "8", "--sharding", "zero1", "--recompute", "offload"], 100),
    ],
)
def test_what_it_names_fits(words: list[str], limit: int) -> None:
    """Catches: a change that a run rejects, or whose figure is that of another."""
    args = parse([*OFFLOAD, "--global-batch", "64", *words], files=False).args
    text = host_full(args, fullest_node, 8, limit * GIB)
    assert text is not None
    named = re.findall(r"(--[a-z0-9 -]+) \(([\d.]+) GiB", text)
    assert 1 <= len(named) <= 3
    for change, size in named:
        base = [w for w in OFFLOAD if w != "--optimizer-cpu-offload" or "--no-optimizer-cpu-offload" not in change]
        flags = change.split()
        kept = [w for n, w in enumerate(words) if w not in flags and (n == 0 or words[n - 1] not in flags)]
        found = fullest_node(parse([*base, "--global-batch", "64", *kept, *flags], files=False).args).total
        assert float(size) == pytest.approx(found / GIB, abs=0.06)
        assert found <= limit * GIB


def test_ranks_of_a_node_count_together_and_equal_pieces_once() -> None:
    """Of eight equal ranks each has masters of its own, and one writes them; sharded, each has and writes its part."""
    words = [*OFFLOAD, "--nproc", "16", "--global-batch", "16"]
    alone = 12 * 8_030_261_248
    whole = fullest_node(parse([*words, "--gpus-per-node", "8", "--sharding", "none"], files=False).args)
    assert (whole.optimizer, whole.staging) == (pytest.approx(8 * alone, rel=1e-3), pytest.approx(alone, rel=1e-3))
    sharded = fullest_node(parse([*words, "--gpus-per-node", "8", "--sharding", "zero1"], files=False).args)
    assert sharded.optimizer == pytest.approx(alone / 2, rel=1e-3)
    assert sharded.staging == pytest.approx(alone / 2, rel=1e-3)
    several = fullest_node(
        parse([*words, "--sharding", "zero1", "--dp-shard", "8", "--gpus-per-node", "16"], files=False).args
    )
    assert several.optimizer == pytest.approx(2 * alone, rel=1e-3)
    assert several.staging == pytest.approx(alone, rel=1e-3)


def test_explain_warns_and_plan_passes_over(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a layout that is proposed though its host is too small."""
    assert explain.main([*OFFLOAD, "--nproc", "1", "--global-batch", "8", "--host-memory", "128"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the host has 128.0 GiB of memory, and its 1 rank needs 179.5" in said
    assert explain.main([*OFFLOAD, "--nproc", "1", "--global-batch", "8", "--host-memory", "200"]) == 0
    assert "takes 179.5 GiB of 200.0 of its memory" in " ".join(capsys.readouterr().out.split())
    words = [*OFFLOAD[:2], *OFFLOAD[6:], "--nproc", "8", "--global-batch", "64", "--tp", "1", "--recompute", "block"]
    assert plan.main([*words, "--host-memory", "128"]) == 1
    assert re.search(
        r"devices would do, but hosts have 128.0 GiB: --pp 1 .* needs least, 179.5",
        " ".join(capsys.readouterr().out.split()),
    )
    assert plan.main([*words, "--host-memory", "200", "--top", "1"]) == 0
    assert " none " not in capsys.readouterr().out.splitlines()[2], "masters eight times over"


def test_a_run_is_rejected_before_it_takes_memory(tmp_path: Path) -> None:
    """Catches: ranks that go on where another's host is too small."""
    out = tmp_path / "run"
    program = f"""
import sys
from stretto.cli import main, this_machine
this_machine.host_memory = lambda: 10_000_000
words = "train --preset tiny --layers 8 --hidden 128 --ffn 512 --nproc 2 --dp 2 --tp 1 --pp 1 --out"
sys.exit(main([*words.split(), {str(out)!r}]))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "stretto train: the host has 0.0 GiB of memory, and its 2 ranks need 0." in ended.stderr
    assert ended.stderr.count("the host has") == 1
    assert not out.exists()
