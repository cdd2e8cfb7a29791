"""P19: the time of a step from its arguments alone, beside the steps that GPUs have taken.

Faults to catch: weights that are gathered once a step where each microbatch gathers them; gradients that are sent
twice where each rank keeps a shard.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.estimates import RESULTS, Row, rows
from stretto.arguments import parse
from stretto.arguments.schema import Arguments
from stretto.estimate import count_parameters
from stretto.estimate.chips import CHIPS
from stretto.estimate.step_time import step_time
from stretto.schedule.sharding import MODES

pytestmark = pytest.mark.pure

H200 = CHIPS["h200"]
ROWS = list(rows())
WORST = {"h200x2/D4-halves.json": 0.10}
"""Sixteen small microbatches: each has a fixed cost that the estimate does not know."""


def run(*words: str) -> Arguments:
    return parse(["--device", "cuda", "--dtype", "bf16", *words], files=False).args


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.file}-{row.peer}" for row in ROWS])
def test_it_is_that_of_measured_steps(row: Row) -> None:
    """The rates are from these machines: the same dozen numbers of a chip give all sixteen steps."""
    assert abs(row.error) <= WORST.get(row.file, 0.05), row.estimated.said


@pytest.mark.parametrize(("preset", "apart"), [("olmoe-7b", 0.05), ("qwen3-30b-a3b", 0.1)])
def test_a_layer_of_experts_is_that_of_measured_ones(preset: str, apart: float) -> None:
    """Of 16,384 tokens: what four layers take beside four whose feed-forward is next to nothing."""
    cases = json.loads((RESULTS / "h200x2/experts.json").read_text())["cases"]
    words = f"--preset {preset} --dp 1 --ep 1 --nproc 1 --seq-len 4096 --micro-batch 4 --global-batch 4 --layers 4"
    sparse = step_time(run(*words.split(), "--sharding", "none"), H200)
    dense = step_time(
        run(*words.split(), "--sharding", "none", *["--experts", "0", "--balance-loss", "0", "--ffn", "8"]), H200
    )
    of_both = [t.gemms + t.attention + t.elementwise for t in (sparse, dense)]
    found = (of_both[0] - of_both[1]) / 4
    assert found * 1e3 == pytest.approx(cases[f"{preset} balanced"]["peers"]["stretto"]["ms"], rel=apart)


LAYOUTS = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))


@given(LAYOUTS, st.sampled_from(list(MODES)), st.sampled_from(["none", "selective", "block"]))
def test_its_parts_add_up_and_more_work_takes_longer(
    sizes: tuple[int, int, int], sharding: str, recompute: str
) -> None:
    tp, pp, dp = sizes
    words = ["--preset", "llama3-8b", "--tp", str(tp), "--pp", str(pp), "--dp", str(dp), "--nproc", str(tp * pp * dp)]
    words += ["--sharding", sharding if dp > 1 else "none", "--recompute", recompute, "--global-batch", "32"]
    found = step_time(run(*words), H200)
    assert found.total == pytest.approx(sum(getattr(found, f.name) for f in fields(found)))
    assert all(getattr(found, f.name) >= 0 for f in fields(found))
    assert (found.bubble > 0) == (pp > 1)
    assert (found.recomputation > 0) == (recompute != "none")
    assert (found.communication > 0) == (tp * dp > 1)
    assert step_time(run(*words, "--seq-len", "16384"), H200).total > 1.9 * found.total
    if dp > 1:
        assert step_time(run(*words[:-1], "64"), H200).gemms == pytest.approx(2 * found.gemms)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize(
    ("mode", "a_step", "a_microbatch"),
    [("none", 2 * 4, 0), ("zero1", 4 + 2, 0), ("zero2", 2, 4), ("fsdp", 0, 4 + 2 * 2)],
)
def test_each_mode_sends_what_its_page_says(mode: str, a_step: int, a_microbatch: int, m: int) -> None:
    """Bytes for a parameter: gradients in fp32, weights in bf16. Over a link so slow that nothing hides behind it."""
    slow = replace(H200, node=1.0, contention=0.0)
    words = f"--preset llama3-8b --tp 1 --dp 2 --nproc 2 --micro-batch 1 --global-batch {2 * m} --sharding {mode}"
    args = run(*words.split())
    half = count_parameters(args.model, args.batch.seq_len).total / 2
    assert step_time(args, slow).communication == pytest.approx((a_step + a_microbatch * m) * half, rel=1e-6)


STEPS = [("steps-olmoe", "olmoe"), ("steps-olmoe-ep2", "olmoe-ep2"), ("steps-8b-offload-8", "8b-offload-8")]


@pytest.mark.parametrize(("file", "case"), STEPS)
def test_whole_steps_are_close_and_halves_hide_the_exchange(file: str, case: str) -> None:
    """Loads of experts were unequal, which is not counted; nothing is fitted to these but the rate of the exchange, and
    of state that lies in the host's memory."""
    found = json.loads((RESULTS / f"h200x2/{file}.json").read_text())["cases"][case]
    words = found["words"].split()
    assert 1e3 * step_time(run(*words), H200).total == pytest.approx(found["ms"], rel=0.08)
    if "ep2" in case:
        halves = step_time(run(*words, "--ep-comm-overlap"), H200)
        assert halves.communication < step_time(run(*words), H200).communication
