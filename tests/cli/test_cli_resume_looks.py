"""Under a launcher rank 0 looks for the checkpoint to go on from, and tells the others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from stretto.arguments import ConfigError, Record
from stretto.cli import resume
from stretto.cli.resume import Resumed
from stretto.initialize.environment import Launch
from stretto.initialize.roll_call import Server

pytestmark = pytest.mark.gloo

FOUND = Resumed(Path("/run/checkpoints/step-00000004"), 4, Record({"run": {"steps": 8}}, ("run.nproc",), "there"))


@pytest.mark.parametrize("found", [[FOUND], []], ids=["one", "none"])
def test_one_rank_looks_and_all_go_on_from_there(monkeypatch: pytest.MonkeyPatch, found: list[Resumed]) -> None:
    """Catches ranks that ask the file system each, or go on from elsewhere."""
    looks: list[str] = []
    store = HashStore()

    def look(out: str, *, required: bool) -> list[Resumed]:
        looks.append(out)
        return found

    monkeypatch.setattr(resume, "newest", look)
    with ThreadPoolExecutor(3) as pool:
        heard = list(pool.map(lambda rank: hear(rank, store), range(3)))
    for each in heard:
        assert [(r.path, r.step, r.record.arguments, r.record.derived) for r in each] == [
            (r.path, r.step, r.record.arguments, r.record.derived) for r in found
        ]
    assert looks == ["/run"]


def test_what_ends_rank_0_ends_all(tmp_path: Path) -> None:
    """Catches ranks that begin anew where rank 0 has found nothing that it was to go on from."""
    store = HashStore()
    with pytest.raises(ConfigError, match="no complete checkpoint in"):
        hear(0, store, str(tmp_path))
    with pytest.raises(ConfigError, match="rank 0 cannot go on"):
        hear(1, store, str(tmp_path))


def hear(rank: int, store: HashStore, out: str = "/run") -> list[Resumed]:
    """What one rank of three hears."""
    launch = Launch("torchrun", rank=rank, size=3)
    return resume._newest_of_rank_0((store, Server("n1")), launch, out, True)
