"""What is rejected, and what the rejection says."""

from __future__ import annotations

from typing import Any

import pytest

from stretto.layout import Layout

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 0}, ["tp=0", "at least 1"]),
        ({"pp": -2}, ["pp=-2"]),
        ({"dp": True}, ["dp=True", "whole number"]),
        ({"dp": 2.0}, ["dp=2.0"]),
        ({"dp": (4, 0)}, ["dp=(4, 0)"]),
        ({"dp": ()}, ["dp=()"]),
        ({"tp": 2, "dp": 2, "order": "tp-pp"}, ["leaves out dp=2"]),
        ({"tp": 2, "order": "tp-cp-ep-dp-pp-tp"}, ["names tp more than once"]),
        ({"order": "tp-cp-ep-dp-pp-vp"}, ["names 'vp'", "tp, cp, ep, dp, pp"]),
        ({"dp": 6, "ep": 4}, ["1*4 = 4 does not divide tp*cp*dp = 1*1*6 = 6", "ep=2 or 3 or 6 would"]),
        ({"tp": 3, "etp": 2}, ["2*1 = 2 does not divide", "no ep does with etp=2"]),
        ({"dp": (4, 2), "ep": 8}, ["2 outer replicas", "8/8 = 1"]),
        ({"tp": 2, "dp": 4, "pp": 2, "ep": 4, "order": "tp-ep-pp-dp"}, ["2 ranks apart", "put pp last"]),
        ({"dp": 2, "etp": 2, "order": "dp-pp"}, ["no place for etp=2"]),
        ({"pp": 2, "vpp": 0}, ["vpp=0", "at least 1"]),
        ({"pp": 2, "vpp": True}, ["vpp=True"]),
        ({"pp": 2, "shape": "v"}, ["shape='v' has no effect with one stage on a rank; take vpp=2"]),
        ({"pp": 2, "vpp": 2, "shape": "w"}, ["shape='w': stages go in a 'loop' or a 'v'"]),
        ({"dp": 2, "ep": 2, "expert_order": "edp-pp"}, ["expert_order='edp-pp' leaves out ep=2"]),
    ],
    ids=str,
)
def test_bad_sizes_and_orders(sizes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the words are checked below
        Layout.of(**sizes)
    for word in words:
        assert word in str(error.value)


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)tp=0.*cp=-1"):
        Layout.of(tp=0, cp=-1)
    with pytest.raises(ValueError, match=r"(?s)leaves out dp=3.*does not divide"):
        Layout.of(dp=3, ep=2, order="tp-ep-pp")


def test_bad_questions() -> None:
    layout = Layout.of(tp=2, dp=2, ep=2)
    for ask, words in (
        (lambda: layout.group(4, "tp"), "outside the layout's ranks 0..3"),
        (lambda: layout.coords(-1), "outside the layout's ranks"),
        (lambda: layout.group(0, "tq"), "unknown axis 'tq'; the axes are tp, cp, dp"),
        (lambda: layout.size("tp", "ep"), "mixes dense axes"),
        (lambda: layout.rank(tp=2), "tp=2 is outside 0..1"),
        (lambda: layout.rank(xx=2), "unknown axis 'xx'"),
        (lambda: layout.rank(tp=1, ep=0), "of ranks"),
    ):
        with pytest.raises(ValueError, match=words):
            ask()
