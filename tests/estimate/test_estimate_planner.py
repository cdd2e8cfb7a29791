"""P19. Layouts are ranked by the times of their steps, of which as few as can be are simulated; what several share is
computed once.

Faults to catch: a setting that blocks follow from left out of the key of a memo; the last stage taken for one like
those before; a search for the leanest layout that stops at the first that does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stretto.arguments.schema import Arguments, BatchConfig, ModelConfig, ParallelConfig, RunConfig, TuningConfig
from stretto.cli import plan as command
from stretto.cli.plan import main
from stretto.estimate import fullest, planner
from stretto.estimate.block_tape import block_moments
from stretto.estimate.blocks import uncut
from stretto.estimate.chips import CHIPS, Chip
from stretto.estimate.memo import Memo
from stretto.estimate.memory import _like
from stretto.estimate.moments import stage_activations
from stretto.estimate.passes import StepTime
from stretto.estimate.planner import Fitting, Found
from stretto.estimate.recompute import policy_of
from stretto.estimate.stages import stage_blocks
from stretto.estimate.steady import _unsharded, steady
from stretto.estimate.step_time import least_step_time, step_time
from stretto.estimate.stored import stored_tensors

pytestmark = pytest.mark.pure

CHIP = CHIPS["h200"]


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> list[Fitting]:
    """What of a run with experts fits, over every schedule and every way to shard."""
    found: list[Fitting] = []
    monkeypatch.setattr(planner, "_quickest", lambda fit, *_: tuple(found.extend(fit) or ()))
    words = ["--preset", "qwen3-30b-a3b", "--nproc", "16", "--micro-batch", "1", "--ep", "4", "--global-batch", "64"]
    main([*words, "--hbm", "120"])
    return found


def test_the_ranking_is_that_of_all_times(fitting: list[Fitting], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a layout that is passed over since its bound is above its time; ties in another order; a simulation
    of every layout."""
    times = {id(each): step_time(each.args, CHIP).total for each in fitting}
    assert len({each.args.parallel.schedule for each in fitting}) == 3
    assert {each.args.parallel.sharding for each in fitting} == {"none", "zero1", "fsdp"}
    assert all(least_step_time(each.args, CHIP) <= times[id(each)] for each in fitting)
    asked = []

    def counted(args: Arguments, chip: Chip, memo: Memo) -> StepTime:
        asked.append(args)
        return step_time(args, chip, memo)

    monkeypatch.setattr(planner, "step_time", counted)
    ranked = planner._quickest_first(fitting, CHIP, lambda _: False, Memo())
    plain = sorted(fitting, key=lambda each: (times[id(each)], each.memory))
    assert next(ranked) is plain[0]
    assert len(asked) < len(fitting) / 2
    assert [id(each) for each in ranked] == [id(each) for each in plain[1:]]


def test_what_is_passed_over_is_not_simulated(fitting: list[Fitting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "step_time", None)
    assert not [*planner._quickest_first(fitting, CHIP, lambda _: True, Memo())]


@pytest.mark.parametrize(
    "words",
    [
        "--preset llama3-8b --nproc 8 --tp 2 --seq-len 8192 --global-batch 64 --hbm 60 --micro-batch 1",
        "--preset llama3-8b --nproc 16 --seq-len 8192 --global-batch 64 --hbm 5 --micro-batch 1",
        "--preset deepseek-v2-lite --nproc 8 --hbm 60 --tp 1 --micro-batch 1 --ep 2",
        "--preset gemma2-2b --nproc 4 --cp 2 --hbm 25 --micro-batch 1 --freeze model.embed_tokens.*",
    ],
)
def test_the_answer_is_that_of_every_layout_by_itself(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: what one layout left in the memo taken for another's; a layout that fits and is cut short; a leanest one
    that is not, since the search stopped at its bound."""
    asked = list[tuple[Any, ...]]()
    monkeypatch.setattr(command, "plan", lambda *args, most: asked.append((*args, most)) or Found((), 0, None, 1))
    main(words.split())
    ((run, attempt, fixed, chip, limits, most),) = asked
    found = planner.plan(run, attempt, fixed, chip, limits, most=most)
    variants = list(planner._candidates(run, attempt, fixed))
    alone = [(fullest(args), settings, args) for each in variants for settings, args in reversed(each)]
    fit = [each for each in alone if each[0] <= limits.device]
    assert (found.tried, found.fitting) == (len(alone), len(fit))
    if not fit:
        assert found.leanest is not None
        assert found.leanest.memory == min(each[0] for each in alone)
        return
    assert found.leanest is None
    assert min(step_time(args, chip).total for _, _, args in fit) == found.fit[0].time.total
    for each in found.fit:
        assert (each.memory, each.time) == (fullest(each.args), step_time(each.args, chip))


@st.composite
def runs(draw: st.DrawFn) -> Arguments:
    """Of few models, so that several have much in common."""
    dense, freeze = draw(st.sampled_from([None, 0, 2])), draw(st.sampled_from([(), ("*.layers.1.*",)]))
    sparse: dict[str, Any] = {} if dense is None else {"experts": 4, "expert_ffn": 16, "first_dense": dense}
    model = ModelConfig(
        layers=9,
        hidden=64,
        heads=4,
        vocab=draw(st.sampled_from([64, 3000])),
        ffn=96,
        tied=draw(st.booleans()),
        window=8,
        global_layers=draw(st.sampled_from([(), (2, 5, 8)])),
        **sparse,
    )
    cp, pp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 4]))
    parallel: dict[str, Any] = {
        "schedule": draw(st.sampled_from(["1f1b", "interleaved", "zbv"])) if pp > 1 else "1f1b",
        "sharding": draw(st.sampled_from(["none", "zero1", "fsdp"])),
    }
    run: dict[str, Any] = {"recompute": draw(st.sampled_from(["none", "selective", "block"]))}
    size = draw(st.sampled_from([1, 2]))
    return Arguments(
        model=model,
        parallel=ParallelConfig(cp=cp, pp=pp, dp=draw(st.sampled_from([2, 4])), **parallel),
        batch=BatchConfig(global_batch=draw(st.sampled_from([16, 64])), micro_batch=size, seq_len=32),
        run=RunConfig(dtype="bf16", **run),
        tuning=TuningConfig(freeze=freeze),
    )


@given(st.lists(runs(), min_size=2, max_size=5))
def test_a_memo_changes_nothing(several: Sequence[Arguments]) -> None:
    """Catches: what one run left taken for another's, such as stages with other ends."""
    memo = Memo()
    for args in several:
        alone = fullest(args)
        assert fullest(args, memo=memo) == alone
        assert fullest(args, memo=memo, enough=alone) == alone
        assert alone - 1 < fullest(args, memo=memo, enough=alone - 1) <= alone
        assert step_time(args, CHIP, memo) == step_time(args, CHIP)


EVEN = Arguments(
    model=ModelConfig(layers=4, hidden=32, heads=4, vocab=64),
    parallel=ParallelConfig(pp=4, dp=1, stage_layers=(1, 1, 1, 1)),
    batch=BatchConfig(global_batch=4, micro_batch=1, seq_len=8),
)


@given(runs())
@example(EVEN)
def test_stages_that_are_alike_hold_the_same(args: Arguments) -> None:
    """Catches: kinds of layers in another order, an end of the pipeline or what is frozen left out."""
    for stage, like in zip(range(len(stage_blocks(args))), _like(args), strict=True):
        assert steady(args, stage, embedding=True) == steady(args, like, embedding=True)
        assert stage_activations(args, stage) == stage_activations(args, like)


@given(runs())
def test_what_is_left_out_of_a_key_changes_nothing(args: Arguments) -> None:
    """Catches: a setting that a block or the tensors of a stage follow from, which a planner changes."""
    for stage, held in enumerate(stage_blocks(args)):
        assert stored_tensors(args, stage) == stored_tensors(_unsharded(args), stage)
        for layer, parts in zip(held, policy_of(args, stage), strict=True):
            assert block_moments(args, layer, parts) == block_moments(uncut(args), layer, parts)
