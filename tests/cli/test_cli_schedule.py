"""`stretto schedule`: words in, text and files out, without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from stretto.cli.schedule import main
from stretto.cli.schedule_timeline import coloured
from stretto.schedule import GENERATORS, schedule_for, simulate

pytestmark = pytest.mark.pure


def test_draw_writes_every_kind_of_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = [tmp_path / f"zbv{ending}" for ending in (".svg", ".png", ".json", ".csv", ".txt")]
    words = [word for path in out for word in ("--out", str(path))]
    assert main(["draw", "zbv", "--pp", "4", "--microbatches", "8", "--width", "150", *words]) == 0
    assert "bubble 5.9%" in capsys.readouterr().out
    assert all(path.stat().st_size > 200 for path in out)
    for path in out[3:]:
        assert main(["check", str(path)]) == 0
        assert "complete, in place, no deadlock" in capsys.readouterr().out


def test_an_error_shows_the_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "crossed.csv"
    table.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    assert main(["check", str(table)]) == 2
    error = capsys.readouterr().err
    assert "deadlock: 0B0 waits for 1B0" in error
    assert "rank 0   0F0  [0B0]  0F1   0B1" in error


def test_one_of_a_kind_is_not_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "1f1b", "--pp", "1", "--microbatches", "1"]) == 0
    assert "2 actions take 1 microbatch through 1 stage on 1 rank;" in capsys.readouterr().out
    assert main(["list", "--pp", "1", "--microbatches", "2"]) == 0
    assert "1 rank, 2 microbatches;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draw", "zvb"], "no schedule is named 'zvb'; did you mean zbv?"),
        (["draw", "zbv", "--vpp", "3"], "zbv has 2 stages on a rank, not 3"),
        (["draw"], "draw takes one schedule, got 0"),
        (["check", "none.csv"], "none.csv"),
        (["simulate", "1f1b", "--forward", "1,2"], "times are given for 2 stages, but there are 4"),
        (["simulate", "1f1b", "--forward", "1,1,1,1,1"], "times are given for 5 stages, but there are 4"),
        (["list", "--forward", "1,1,1,1,1"], "times are given for 5 stages, which is no multiple of --pp 4"),
        (["list", "zbv"], "list takes no schedule, got zbv"),
        (["simulate", "zbv", "--out", "x.svg"], "simulate does not read --out, which is for draw and search"),
        (["draw", "zbv", "--exact", "3"], "draw does not read --exact"),
        (["simulate", "zbv", "--attention", "0.3"], "simulate does not read --attention"),
        (["simulate", "zbv", "--memory", "2"], "--memory is for search and for the schedule auto"),
        (["simulate", "auto", "--memory", "0.1"], "keeps within 0 activations of a stage"),
        (["simulate", "1f1b", "--forward", "-1"], "times are finite and not negative"),
        (["draw", "1f1b", "--out", "x.gif"], "written as .svg or .png"),
        (["draw", "1f1b", "--out", "nowhere/x.svg"], "cannot write nowhere/x.svg"),
        (["draw", "1f1b", "--microbatches", "99999999"], "= 399,999,996 forwards, must be <= 1,048,576"),
        (["draw", "1f1b", "--forward", "0"], "are all 0: one of them must take time"),
        (["simulate", "1f1b", "--forward", "1,2,3,4", "--input-gradient", "1,2"], "give as many of each"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_any_width_and_any_unit_of_time_can_be_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a ruler without a mark, where few columns or large numbers leave no room for one of its steps."""
    for words in (["--width", "3"], ["--forward", "1e15"], ["--forward", "1e-15"]):
        assert main(["draw", "1f1b", *words]) == 0
        assert "rank 3" in capsys.readouterr().out


def test_simulate_takes_costs_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "1f1b", "--pp", "2", "--microbatches", "4"]
    assert main([*words, "--forward", "1,3", "--input-gradient", "1,3", "--weight-gradient", "1,3"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("a step takes 39,")  # 1 + 4 * 9 + 2


def test_auto_is_searched_for_the_times_and_the_memory_that_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a search for the textbook's times, so that a table calls another order the quickest for these."""
    words = ["--pp", "4", "--vpp", "2", "--forward", ",".join(["0.5"] * 7 + ["0.7"]), "--weight-gradient", "0.35"]
    for more in ([], ["--memory", "3"]):
        assert main(["search", *words, *more]) == 0
        found = re.search(r"in a v: .*a step takes ([\d.]+),", capsys.readouterr().out)
        assert main(["simulate", "auto", *words, *more]) == 0
        made = re.search(r"a step takes ([\d.]+),", capsys.readouterr().out)
        assert found is not None
        assert made is not None
        assert found[1] == made[1]


def test_those_are_listed_that_have_as_many_stages_as_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--pp", "2", "--microbatches", "4", "--forward", "1,1.3", "--width", "140"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"auto", "1f1b", "zb-h1", "interleaved"} <= set(names)
    assert "zbv" not in names


def test_all_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--pp", "2", "--microbatches", "4", "--width", "140"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in GENERATORS)


def test_a_row_of_the_list_is_at_most_two_lines_of_eighty(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: what a schedule is in a column of sixteen letters, so that the list is longer than a screen."""
    assert main(["list", "--pp", "4", "--microbatches", "8", "--width", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 2 * len(GENERATORS) + 4
    assert max(map(len, lines)) <= 80


def test_colours_show_every_microbatch() -> None:
    text = coloured(simulate(schedule_for("1f1b", 2, 4)), 100).plain
    assert [text.splitlines()[0].count(str(mb)) for mb in range(1, 4)] == [2, 2, 2]


def test_torch_is_not_imported() -> None:
    code = "import sys; from stretto.cli.schedule import main; main(['list']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
