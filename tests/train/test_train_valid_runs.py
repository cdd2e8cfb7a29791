"""Every configuration that the rules let through builds, on any of its ranks, and takes a step.

Groups pretend, so numbers are garbage; shapes, dtypes and the paths through the code are the real ones. What is true
of the numbers is shown elsewhere, with real processes. Red without any one of the rules on heads, key/value heads,
rotary pairs, the sequence under sequence parallelism, the batch, and the split into stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from stretto.arguments import ConfigError, Resolved, resolve
from stretto.arguments.layers import Layer
from stretto.arguments.setting import Value
from stretto.arguments.sources import COMMAND_LINE
from stretto.arguments.tree import settings
from stretto.batch import Batch
from stretto.data.feed import rows_of
from stretto.models import Microbatch
from stretto.parallel_state import ParallelState
from stretto.pipeline_parallel import Link
from stretto.train.build import build
from stretto.train.groups import group_options
from stretto.train.step import evaluate
from stretto.train.text import valid_tokens

pytestmark = pytest.mark.gloo

SMALL: dict[str, st.SearchStrategy[Any]] = {
    "model.layers": st.integers(1, 4),
    "model.hidden": st.sampled_from([6, 8, 12, 24]),
    "model.heads": st.sampled_from([1, 2, 3, 4, 6]),
    "model.kv_heads": st.sampled_from([None, 1, 2, 3]),
    "model.head_dim": st.sampled_from([None, 2, 3, 4]),
    "model.ffn": st.sampled_from([None, 12, 24, 7]),
    "model.vocab": st.sampled_from([2, 5, 24, 257]),
    "parallel.tp": st.sampled_from([1, 2, 3, 4]),
    "parallel.pp": st.integers(1, 4),
    "parallel.dp": st.integers(1, 3),
    "parallel.order": st.permutations(["tp", "cp", "dp", "pp"]).map("-".join),
    "parallel.stage_layers": st.none()
    | st.lists(st.sampled_from([0, 0.5, 1, 1.5, 2]), min_size=1, max_size=4).map(tuple),
    "parallel.bucket_mb": st.sampled_from([1e-4, 25.0]),
    "groups.timeouts": st.sampled_from([(), (("dp", 5),), (("pp", 5), ("tp", 6))]),
    "batch.seq_len": st.sampled_from([1, 4, 5, 12]),
    "batch.micro_batch": st.integers(1, 2),
    "batch.global_batch": st.sampled_from([4, 6, 12, 24]),
    "optimizer.clip_grad": st.sampled_from([0.0, 1.0]),
}
CHOSEN = {
    path: st.booleans() if s.kind is bool else st.sampled_from(s.choices)
    for path, s in settings().items()
    if (s.kind is bool or s.choices) and s.section in ("model", "parallel")
}
DTYPE = {"run.dtype": st.sampled_from(["fp32", "bf16", "fp64"])}


@st.composite
def valid_runs(draw: st.DrawFn) -> Resolved:
    """A run that the rules accept: settings drawn one by one, and what is wrong with them mended as they say."""
    said: dict[str, Value] = {path: draw(values) for path, values in {**SMALL, **CHOSEN, **DTYPE}.items()}
    for _ in range(12):
        try:
            return resolve([Layer(COMMAND_LINE, {path: value for path, value in said.items() if value is not None})])
        except ConfigError as error:
            fixes = [fix for v in error.violations for fix in v.fixes]
            assume(fixes)
            said.update(draw(st.sampled_from(fixes)))
    assume(False)
    raise AssertionError


@pytest.fixture(scope="module", autouse=True)
def _no_announcements() -> Iterator[None]:
    """A peer that pretends announces nothing, so nothing is held against the boundary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "expect", lambda *_: None)
        yield


@effort(
    max_examples=effort.default.max_examples,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(valid_runs(), st.data())
def test_what_the_rules_accept_builds_and_takes_a_step(run: Resolved, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, run.layout.world - 1), "rank")
    assert (run.args.groups.timeouts != ()) == bool(group_options(run.args, run.layout))
    with ParallelState.inspect(run.layout, rank) as state:
        built = build(run.args, state)
        batches = microbatches(run, state)
        built.stepper.step(batches, run.args.optimizer.lr)
        evaluate(built.evaluator, batches, state)
        built.weights.close()


def microbatches(run: Resolved, state: ParallelState) -> list[Microbatch]:
    """This rank's share of a global batch of random tokens."""
    batch, dp = run.args.batch, state.axis("dp")
    shape = (batch.micro_batch, batch.seq_len)
    mine = []
    for _ in rows_of(batch.global_batch, dp.rank, dp.size, batch.micro_batch):
        tokens, labels = torch.randint(run.args.model.vocab_size, (2, *shape))
        mine.append(Batch(tokens, labels, torch.ones(shape, dtype=torch.bool)))
    count = valid_tokens(mine, state)
    return [Microbatch(each, count) for each in mine]
