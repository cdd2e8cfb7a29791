"""The start-up line: who was slowest in each phase."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stretto.initialize.clock import process_began
from stretto.initialize.timeline import Phase, StartTimeline, line, merge, of_rank, phases_of
from stretto.testing import Pool
from stretto.world import World


@pytest.mark.pure
def test_the_slowest_rank_of_each_phase() -> None:
    ranks = [{"model": 1.0, "data": 0.5}, {"model": 4.0, "data": 0.25}, {"model": 1.0, "load": 2.0}]
    phases = phases_of(merge([of_rank(rank, seconds) for rank, seconds in enumerate(ranks)]))
    assert phases == [Phase("model", 4.0, 1, 1.0), Phase("data", 0.5, 0, 0.25), Phase("load", 2.0, 2, 0.0)]
    assert line(phases[:1], 4.5) == "start-up 4.5 s: model 4.0 s on rank 1, median 1.0 s"


@pytest.mark.pure
def test_a_phase_adds_up_also_when_it_fails() -> None:
    now = [0.0]
    timeline = StartTimeline(clock=lambda: now[0])
    with timeline.phase("a"):
        now[0] += 2
    with contextlib.suppress(ValueError), timeline.phase("a"):
        now[0] += 3
        raise ValueError("of the body")
    assert timeline.seconds == {"a": 5.0}


@pytest.mark.pure
def test_the_total_is_from_the_command_to_the_end_of_the_last_phase() -> None:
    """Catches: a start that is counted from the worker on; phases added up, without what lies between them."""
    now = [100.0]
    timeline = StartTimeline(clock=lambda: now[0], began=90.0)
    timeline.until_now("imports")
    now[0] += 2
    with timeline.phase("first step"):
        now[0] += 3
    now[0] += 50
    assert (timeline.seconds, timeline.total) == ({"imports": 10.0, "first step": 3.0}, 15.0)
    assert str(timeline) == "imports 10.0 s, first step 3.0 s"


@pytest.mark.pure
def test_a_process_knows_when_it_was_made() -> None:
    """Catches: an age in ticks, of the system, or of the first import. The kernel counts in hundredths of a second."""
    before = time.monotonic()
    code = "import time; time.sleep(0.3)\nfrom stretto.initialize.clock import process_began\nprint(process_began())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert before - 0.02 <= float(said.stdout) <= time.monotonic() - 0.3
    assert process_began() < before


@pytest.mark.pure
def test_a_process_whose_beginning_is_hidden_begins_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", hidden)
    before = time.monotonic()
    assert before <= process_began() <= time.monotonic()


def late(world: World, slow: int) -> list[Phase] | None:
    timeline = StartTimeline()
    with timeline.phase("data"):
        time.sleep(0.3 if world.rank == slow else 0.0)
    return timeline.gather(world)


@pytest.mark.gloo
def test_gathers_on_rank_0(pool: Pool) -> None:
    first, *others = pool.run(4, late, 2)
    assert [(phase.name, phase.rank) for phase in first] == [("data", 2)]
    assert first[0].seconds >= 0.3
    assert others == [None] * 3
