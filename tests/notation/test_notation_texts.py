"""Texts that settings hold are read as written, or rejected with an example, by `parse` as well."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from stretto.arguments import ConfigError, parse
from stretto.notation.corpora import LONGEST_PERIOD, Share, named, shares
from stretto.notation.param_groups import ParamGroup, parse_groups
from stretto.notation.profile import ProfileWindow
from stretto.notation.size import bytes_of

pytestmark = pytest.mark.pure


def share(path: str, weight: str | None) -> Share:
    return Share(path, None if weight is None else Fraction(weight))


READ = [
    ("a", [share("a", None)]),
    ("a:0.5", [share("a", None)]),
    ("a:0.7,b/c.jsonl:0.3", [share("a", "7/10"), share("b/c.jsonl", "3/10")]),
    ("a:2,b:1,c:1", [share("a", "1/2"), share("b", "1/4"), share("c", "1/4")]),
    ("a,b", [share("a", None), share("b", None)]),
    ("C:x:.5,b:.5", [share("C:x", "1/2"), share("b", "1/2")]),
]


@pytest.mark.parametrize(("text", "found"), READ)
def test_a_mix_is_read(text: str, found: list[Share]) -> None:
    assert list(shares(text, exists=lambda _: False)) == found


def test_a_path_that_is_there_is_no_mix(tmp_path: Path) -> None:
    (tmp_path / "a,b:0.5").mkdir()
    assert shares(f"{tmp_path}/a,b:0.5") == (Share(f"{tmp_path}/a,b:0.5", None),)


BAD = [
    ("a:0.5,b", "b without a weight, the others with one"),
    ("a:0.5,,b:0.5", "entry 2 of 3 names no path"),
    ("a:0.5,a:0.5", "a named twice"),
    ("a:0,b:1", "a with weight 0"),
    ("a:0", "a with weight 0"),
    ("a:0.123457,b:0.7", f"must be at most {LONGEST_PERIOD:,}; write them with fewer digits"),
]


@pytest.mark.parametrize(("text", "problem"), BAD)
def test_a_mix_that_is_none_is_told(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        shares(text, exists=lambda _: False)
    with pytest.raises(ConfigError, match=problem):
        parse(["--data", text])


@pytest.mark.parametrize("text", ["a", "=b", "a=", "held_out=b", "a=b,a=c", "a b=c", "../x=c"])
def test_validation_sets_need_a_name_each(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no name=path|named twice"):
        named(text)
    with pytest.raises(ConfigError, match=r"is no name=path|named twice"):
        parse(["--eval-data", text])


def test_what_is_no_group_is_named() -> None:
    assert parse_groups("a|b : lr = 2;") == (ParamGroup("a|b", lr=2.0),)
    for text in ("a", "a: lr", "a: lr=-1", "a: lr=nan", ": lr=1", "a: momentum=1", "a: lr=1, lr=2", "a|: lr=1"):
        with pytest.raises(ValueError, match=r"."):
            parse_groups(text)


def test_a_profile_is_a_window_of_steps() -> None:
    assert ProfileWindow.read("steps=10:13") == ProfileWindow(range(10, 13), range(1))
    assert ProfileWindow.read("steps=5, ranks=0:8") == ProfileWindow(range(5, 6), range(8))
    for wrong in ("10:13", "steps=13:10", "steps=0:2", "steps=1:2,ranks=3:3", "steps=a"):
        with pytest.raises(ConfigError, match=r"--profile steps=10:13|holds no step"):
            parse(["--profile", wrong], env={}, files=False)
    with pytest.raises(ConfigError, match="begins after the last step, 20"):
        parse(["--profile", "steps=30:32", "--steps", "20", "--warmup-steps", "2"], env={}, files=False)


def test_a_size_has_a_unit_of_a_thousand_or_of_1024() -> None:
    sizes = {"20": 20, "20GB": 20 * 10**9, "512MiB": 512 * 2**20, "1.5 k": 1500, "2TiB": 2**41}
    assert {text: bytes_of(text) for text in sizes} == sizes
    for text in ("GB", "20 miles", "-1GB", "1iB"):
        with pytest.raises(ValueError, match="is no size: say 20GB, 512MiB"):
            bytes_of(text)
