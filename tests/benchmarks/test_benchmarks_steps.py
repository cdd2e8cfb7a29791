"""Cases of `benchmarks.steps` are runs that exist, on tokens that are there."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.steps import CASES, read, words_of, write_corpus
from stretto.arguments import parse
from stretto.data.indexed import IndexedTokens

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("small", [False, True])
def test_every_case_is_a_run(name: str, small: bool) -> None:
    """Faults: a case that a rule rejects, or that a preset gives another layout."""
    case = CASES[name]
    options = Namespace(small=small, words="", device="cpu" if small else "cuda", log_every=2)
    found = parse(words_of(case, Path("/tmp"), options), env={}, files=False, world_size=case.nproc)
    assert found.layout.world == case.nproc


@pytest.mark.parametrize("name", ["olmoe", "olmoe-natural", "32k-packed"])
def test_a_corpus_has_its_tokens(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    write_corpus(tmp_path / "tokens", vocab=500, rows=3, length=64, case=case)
    found = IndexedTokens.at(str(tmp_path / "tokens.bin"))
    assert found is not None
    _, begins = found.offsets()
    ids = np.fromfile(tmp_path / "tokens.bin", "<i4")
    assert begins[-1] == len(ids) == 3 * 65
    assert ids.min() >= 0
    assert ids.max() < 500


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read(file) == []
    file.write_text('{"step": 2}\n{"ste')
    assert read(file) == [{"step": 2}]
