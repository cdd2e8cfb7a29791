"""The text of the repository speaks of the project, to anybody, on any machine."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.pure


def _matches(texts: dict[str, str], pattern: str) -> list[str]:
    return [
        f"{name}:{number}: {found[0]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (found := re.search(pattern, line))
    ]


def test_no_path_of_somebody_s_machine(texts):
    assert _matches(texts, r"(?<![\w./*~-])/(work|root|home|Users|mnt)/\w+") == []


def test_nothing_is_left_for_later(texts):
    """What is missing is said in the documents, or is not there; a note in the code helps no user."""
    words = "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"])
    assert _matches(texts, rf"\b({words})\b") == []


def test_reasons_are_told_and_not_numbered(texts):
    """A number in a tracker explains nothing to a reader without it."""
    assert _matches(texts, r"(?i)\b(issue|ticket|pull request|PR)s? ?#?\d+") == []


def test_no_promise_is_claimed_without_a_test(texts):
    """Catches a promise that is called kept and leads to no test, and a test that names one nobody can look up."""
    rows = dict(re.findall(r"^\| (P\d+) \|.*\| ([^|]+) \|$", texts["docs/promises.md"], re.MULTILINE))
    assert [p for p, status in rows.items() if status != "not yet" and "](../tests/" not in status] == []
    named = {p for n, t in texts.items() if n.startswith("tests/") for p in re.findall(r"\bP\d\d?\b", t)}
    assert sorted(named - set(rows)) == []


def test_every_file_ends_in_one_newline(texts):
    assert [n for n, t in texts.items() if t and (not t.endswith("\n") or t.endswith("\n\n"))] == []
