"""Names and documents use the words of the field: what a private word is called instead stands beside it.

Injected once: a function `begin_gather`, a parameter `twin` and the word "refused" in a document; each is found.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]

IN_NAMES = {
    "under_?way": "an asynchronous result with .wait()",
    "^begin_(?!of)": "..._async",
    "max_reduce": "all_reduce_max",
    "^direct_?grad": "main_grad",
    "meanwhile": "overlap_with",
    "put_off|^later$": "defer",
    "^early$|^armed$": "first_microbatch, ready",
    "twin": "reference",
    "nudge": "perturbed",
    "traffic": "collective_trace",
    "judge|^broken$|cure[sd]?$|concession": "validate, violation, suggested fix, override",
    "refus": "reject, usage error",
    "trunk|^stage_?part$": "backbone, stage spec",
    "by_hand": "hand_written",
    "narrow": "quantize",
    "^turn_|^turned$": "apply_rotary",
    "^light$|^again$": "selective, recompute",
    "^law|^house$|planted": "invariant, package, fault",
}
"""Patterns over public and private names, case ignored; torch's own `narrow` is no name of ours."""

IN_DOCUMENTS = {
    r"\btwins?\b": "single-process reference",
    r"\bnudge": "perturbed run",
    r"\brefus(e|ed|es|al|als|ing)\b": "reject",
    r"\bput(s|ting)? off\b": "defer",
    r"\bcures?\b|\bcured\b": "fix",
    r"\bmatrix products?\b": "GEMM",
    r"\bcompute[sd]? (\w+ )?once more\b": "recompute",
    r"\bthe house\b|\brooms? (on|of|that)\b": "package",
    r"\blaws?\b": "invariant",
    r"\b8-bit numbers\b": "FP8",
    r"\bplanted\b": "fault, mutant",
}

KEPT = {
    "stretto/layout/topology.py": {"traffic", "TRAFFIC"},  # bytes per axis: the field's own use
    "stretto/compat/megatron": {"BY_HAND"},  # what the user says by hand
}


def _names(path: Path) -> Iterator[str]:
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def old_names(name: str) -> list[str]:
    """What to write instead, for each pattern that the name matches."""
    bare = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_")
    return [instead for pattern, instead in IN_NAMES.items() if re.search(pattern, bare)]


@pytest.mark.parametrize("name", ["begin_gather", "_twin", "UnderWay", "DirectGradients", "refuse", "narrow_rows"])
def test_an_old_name_is_found(name: str) -> None:
    assert old_names(name)


def test_names_are_the_field_s_words() -> None:
    found = []
    for path in sorted((ROOT / "stretto").rglob("*.py")):
        file = str(path.relative_to(ROOT))
        kept = set().union(*(names for start, names in KEPT.items() if file.startswith(start)))
        found += [f"{file}: {name}: {old_names(name)}" for name in set(_names(path)) - kept if old_names(name)]
    assert not found, "\n".join(found)


def test_documents_are_in_the_field_s_words() -> None:
    found = []
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]):
        if path.name == "CHANGELOG.md":  # tells of the past in the words of the past
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [
                f"{path.name}:{number}: {match.group()!r}: {instead}"
                for pattern, instead in IN_DOCUMENTS.items()
                for match in re.finditer(pattern, line, re.IGNORECASE)
            ]
    assert not found, "\n".join(found)
