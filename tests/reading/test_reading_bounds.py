"""Files of others are read within bounds, or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.reading import DEEPEST, UnreadableError, parse_json, read_bytes, read_json, read_text, shallow, shown

pytestmark = pytest.mark.pure

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(JSON)
def test_json_of_ordinary_depth_is_what_it_says(value: object) -> None:
    assert parse_json(json.dumps(value).encode("utf-8-sig")) == value


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_one_kind_of_error(content: bytes) -> None:
    with suppress(UnreadableError):
        parse_json(content)


@pytest.mark.parametrize(("depth", "read"), [(DEEPEST, True), (DEEPEST + 1, False), (100_000, False)])
def test_depth_has_a_bound(depth: int, read: bool) -> None:
    """Catches: RecursionError, which is no ValueError, and depth that breaks whoever walks the value next."""
    content = b"[" * depth + b"]" * depth
    if read:
        assert parse_json(content)
        return
    with pytest.raises(UnreadableError, match=f"deeper than {DEEPEST}"):
        parse_json(content)


def test_tables_count_as_lists_do() -> None:
    value: object = 1
    for _ in range(DEEPEST):
        value = {"a": value}
    assert shallow(value) is value
    with pytest.raises(UnreadableError):
        shallow({"a": value})


def test_only_regular_files_of_bounded_size_are_opened(tmp_path: Path) -> None:
    """Catches: a pipe that blocks, a device that never ends, and a sparse file that is taken into memory."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**12)
    for name in ("pipe", "sparse", "nowhere", "a\0b", "x" * 300, "."):
        with pytest.raises(UnreadableError):
            read_bytes(tmp_path / name)
    with pytest.raises(UnreadableError):
        read_bytes(Path("/dev/zero"))
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbf[1]")
    assert (read_text(tmp_path / "file"), read_json(tmp_path / "file", 6)) == ("[1]", [1])
    with pytest.raises(UnreadableError, match="6 bytes, at most 5"):
        read_bytes(tmp_path / "file", 5)


@given(JSON | st.integers(-(10**500), 10**500) | st.text(min_size=200))
def test_a_quoted_value_is_short(value: object) -> None:
    assert len(shown(value)) <= 80


def test_a_value_of_any_size_is_quoted_at_once() -> None:
    """Catches: repr of a number of 10^5 digits, which raises, and of lists within lists."""
    deep: object = []
    for _ in range(10_000):
        deep = [deep, deep]
    assert len(shown(deep)) < 80
    assert shown(2**400_000) == "a number of 400001 bits"
    assert shown("abc") == "'abc'"
