"""P19. Layouts are ranked by the times of their steps, of which as few as can be are simulated."""

from __future__ import annotations

import pytest

from stretto.cli.plan import main
from stretto.estimate import planner
from stretto.estimate.chips import CHIPS, Chip
from stretto.estimate.planner import Fitting
from stretto.estimate.step_time import least_step_time, step_time

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

    def counted(args: object, chip: Chip) -> object:
        asked.append(args)
        return step_time(args, chip)  # type: ignore[arg-type]

    monkeypatch.setattr(planner, "step_time", counted)
    ranked = planner._quickest_first(fitting, CHIP, lambda _: False)
    plain = sorted(fitting, key=lambda each: (times[id(each)], each.memory))
    assert next(ranked) is plain[0]
    assert len(asked) < len(fitting) / 2
    assert [id(each) for each in ranked] == [id(each) for each in plain[1:]]


def test_what_is_passed_over_is_not_simulated(fitting: list[Fitting], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "step_time", None)
    assert not [*planner._quickest_first(fitting, CHIP, lambda _: True)]
