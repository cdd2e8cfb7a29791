"""What `stretto layout` prints and draws."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from stretto.cli.layout import main
from stretto.layout import Layout, Topology
from stretto.layout.colours import colour
from stretto.layout.draw import picture
from stretto.layout.picture import Rect, Words
from stretto.layout.ranks import ranges
from stretto.layout.terminal import show

pytestmark = pytest.mark.pure


def printed(layout: Layout, topology: Topology, rank: int | None = None, **console: object) -> str:
    screen = Console(record=True, width=160, file=StringIO(), **console)  # type: ignore[arg-type]
    show(screen, layout, topology, rank)
    return screen.export_text(styles=bool(console))


def test_a_rank_and_its_ranges() -> None:
    text = printed(Layout.of(tp=8, pp=4, dp=16), Topology(8), 37)
    assert re.search(r"tp +8 +1 +inside a node +5 +32-39", text)
    assert re.search(r"pp +4 +128 +4 nodes +0 +37, 165, 293, 421", text)
    assert "36  288:2" in text  # the node of a peer is shown even where most nodes are left out


def test_stages_are_shown_where_a_rank_holds_several() -> None:
    layout = Layout.of(pp=4, vpp=2, shape="v")
    assert re.search(r"of the 8 stages\n0 +0, 7 *\n1 +1, 6 *\n", printed(layout, Topology(8)))
    said = [shape.text for shape in picture(layout, Topology(8), rank=1).shapes if isinstance(shape, Words)]
    assert any("8 stages in a v" in text and "stages 1, 6, its peers" in text for text in said)


def test_experts_have_a_view_of_their_own() -> None:
    assert "experts" in printed(Layout.of(tp=2, dp=4, ep=4), Topology(4))
    assert "experts" not in printed(Layout.of(tp=2, dp=4), Topology(4))


def test_cells_have_the_colour_of_their_coordinate() -> None:
    text = printed(Layout.of(tp=2), Topology(2), color_system="truecolor", force_terminal=True)
    for rank in range(2):
        red, green, blue = colour(rank, 2)
        assert re.search(rf"48;2;{red};{green};{blue}m *{rank} ", text)


def test_without_colours_cells_say_their_coordinate() -> None:
    """Catches: the same grid for every axis where a pipe or NO_COLOR takes the colours."""
    text = printed(Layout.of(tp=2, dp=2), Topology(4))
    assert "0:0  1:1  2:0  3:1" in text
    assert "0:0  1:0  2:1  3:1" in text


def test_groups_in_few_words() -> None:
    assert ranges((0, 1, 2, 3)) == "0-3"
    assert ranges((3, 5)) == "3, 5"
    assert ranges(tuple(range(0, 160, 8)), 6) == "0, 8, 16, 24, .., 152"


def test_a_picture_has_a_cell_for_every_rank_and_axis() -> None:
    layout = Layout.of(tp=2, dp=2, pp=2, ep=2)
    shapes = picture(layout, Topology(4), rank=3).shapes
    said = [shape.text for shape in shapes if isinstance(shape, Words)]
    assert said.count("7") == 5  # tp, dp, pp, ep, edp
    own = [shape for shape in shapes if isinstance(shape, Rect) and shape.stroke > 1]
    assert len(own) == 5


def test_pictures_of_many_ranks_stay_small() -> None:
    drawn = picture(Layout.of(tp=8, dp=1024, pp=16), Topology(8))
    assert len(drawn.shapes) < 3 * 256 * 9 + 200
    assert any("the first 256 of 16,384 nodes" in s.text for s in drawn.shapes if isinstance(s, Words))


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, png = tmp_path / "a.svg", tmp_path / "a.png"
    assert main(["--tp", "2", "--dp", "2x2", "--out", str(svg), str(png)]) == 0
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["--tp", "2", "--out", str(tmp_path / "a.gif")]) == 2
    assert "written as .svg or .png, not '.gif'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tp", "0"], "tp=0"),
        (["--tp", "two"], "tp='two'"),
        (["--dp", "3", "--ep", "2"], "does not divide"),
        (["--rank", "9"], "rank 9 is outside"),
        (["--order", "tp-pp", "--dp", "2"], "leaves out dp=2"),
        (["--gpus-per-node", "0", "--out", "x.svg"], "--gpus-per-node: 0 is out of range"),
    ],
    ids=str,
)
def test_bad_input_is_one_message(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(words)
    except SystemExit as ended:  # as the words themselves are read
        code = ended.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_orders_are_proposed_and_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tp", "8", "--dp", "4", "--order", "best", "--propose"]) == 0
    assert "tp-cp-ep-dp-pp" in capsys.readouterr().out
    assert main(["--tp", "16", "--dp", "2"]) == 0
    assert "tp=16 spans 2 nodes" in " ".join(capsys.readouterr().out.split())
