"""Models by their names in the cache of `huggingface_hub`, as that library lays it out."""

from __future__ import annotations

from pathlib import Path

import pytest

from stretto.interop.errors import InteropError
from stretto.interop.hub import located

pytestmark = pytest.mark.pure


def test_a_name_is_the_snapshot_that_main_refers_to(tmp_path: Path) -> None:
    """Catches: a later snapshot of another branch taken."""
    kept = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"
    for commit in ("aaa", "bbb"):
        (kept / "snapshots" / commit).mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("aaa\n")
    for env in ({"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub")}):
        assert located("Qwen/Qwen3-0.6B", env) == kept / "snapshots" / "aaa"
    (kept / "refs" / "main").unlink()
    assert located("Qwen/Qwen3-0.6B", {"HF_HOME": str(tmp_path)}).name in ("aaa", "bbb")


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert located(str(tmp_path), {}) == tmp_path
    assert located("/no/such", {}) == Path("/no/such")
    assert located("../other", {}) == Path("../other")


def test_a_model_that_is_not_there_is_told_how_to_get(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match=r"`hf download Qwen/Qwen3-0[.]6B` brings it there"):
        located("Qwen/Qwen3-0.6B", {"XDG_CACHE_HOME": str(tmp_path)})
    (tmp_path / "huggingface" / "hub" / "models--Qwen--Qwen3-0.6B" / "snapshots").mkdir(parents=True)
    with pytest.raises(InteropError, match="has no snapshot"):
        located("Qwen/Qwen3-0.6B", {"XDG_CACHE_HOME": str(tmp_path)})
