"""`stretto verify --comms` and `stretto train --check-collectives`: right runs pass, faults end with 1 and a table.

The faults are in `cli_faults`; each is of a kind that only the one comparison sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import cli_faults
import pytest
from cli_programs import ENV, rows

from stretto.cli import main
from stretto.testing import Fresh

pytestmark = pytest.mark.gloo

STEP = ["verify", "--comms", "--preset", "tiny", "--vocab", "300", "--nproc", "4", "--tp", "2", "--sequence-parallel"]


def test_a_step_that_sends_what_it_should_exits_with_0(fresh: Fresh) -> None:
    ended = fresh.run(main, STEP, env=ENV)
    assert (ended.code, ended.err) == (0, "")
    assert "as expected: what the step sends" in ended.out
    assert re.search(r"tp +reduce_scatter +\d+ +\d+ +([\d,]+) +\1 +equal", ended.out)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            cli_faults.one_more_sum,
            [r"^ +dp +all_reduce .* 0 +not equal on 0-3", r"all ranks of each group agree"],
        ),
        (cli_faults.another_shape, [r"^ +1 .*\[\d+, 1\].*cli_faults\.py:\d+ +DIFFERS", r"differ in call \d+"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_step_that_does_not_exits_with_1(
    fresh: Fresh, program: Callable[[Sequence[str]], int], words: list[str]
) -> None:
    ended = fresh.run(program, STEP, env={**ENV, "COLUMNS": "160"})
    assert ended.code == 1, ended.err
    assert "DIFFERENT from what is expected" in ended.out
    for each in words:
        assert re.search(each, ended.out, re.MULTILINE), ended.out
    assert ended.out.count("not equal on") == (program is cli_faults.one_more_sum), ended.out


@pytest.fixture
def run(options: list[str], tmp_path: Path) -> list[str]:
    return [*options, "--sample-tokens", "0", "--out", str(tmp_path / "run")]


def test_a_checked_run_trains_as_ever(fresh: Fresh, run: list[str], tmp_path: Path) -> None:
    ended = fresh.run(main, [*run, "--nproc", "2", "--check-collectives"], env=ENV)
    assert (ended.code, ended.err) == (0, "")
    again = [*run[:-1], str(tmp_path / "unchecked"), "--nproc", "2"]
    assert fresh.run(main, again, env=ENV).code == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "unchecked") != []


def test_a_checked_run_ends_with_the_table_in_place_of_hanging(fresh: Fresh, run: list[str]) -> None:
    ended = fresh.run(cli_faults.one_call_more, [*run, "--nproc", "4", "--check-collectives"], env=ENV)
    assert ended.code not in (0, None)
    assert ended.err.count("call site") == 1, ended.err
    assert re.findall(r"^ +(\d+) .*cli_faults\.py:\d+ +DIFFERS", ended.err, re.MULTILINE) == ["2"], ended.err
    assert ended.seconds < 40


def test_a_flipped_bit_in_one_replica_ends_the_run_with_its_name(fresh: Fresh, run: list[str]) -> None:
    """Catches: replicas that part in silence; a checkpoint of them."""
    words = [*run, "--nproc", "2", "--tp", "1", "--pp", "1", "--check-replicas", "2"]
    ended = fresh.run(cli_faults.a_flipped_bit, words, env=ENV)
    assert ended.code == 1
    said = ended.err.splitlines()
    assert said[0] == "stretto train: replicas differ after step 4:"
    assert re.fullmatch(r"  model\.layers\.\d+\.mlp\.down_proj\.weight \(weights\): ranks 0-1 differ", said[1])
    assert "Traceback" not in ended.err
    assert not list(Path(run[-1]).glob("checkpoints/step-*"))
