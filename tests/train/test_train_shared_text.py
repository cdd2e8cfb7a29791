"""Few ranks of a job look at its text; all train on the same."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stretto.arguments.schema import Arguments, DataConfig
from stretto.data.corpus import Corpus
from stretto.data.errors import DataError
from stretto.data.text import Text
from stretto.testing import Pool
from stretto.train.consensus import RunRejectedError
from stretto.train.shared_text import shared_text
from stretto.world import World

pytestmark = pytest.mark.gloo


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    (tmp_path / "songs").mkdir()
    for n in range(20):
        (tmp_path / "songs" / f"{n}.txt").write_text(f"verse {n}\n" * 20)
    return replace(
        Arguments(), data=DataConfig(data=f"{tmp_path / 'songs'}", cache=f"{tmp_path / 'cache'}", held_out=0.3)
    )


def looks(
    world: World, args: Arguments, hosts: int, cache_of_each: bool, slow: float = 0.0
) -> tuple[int, str, list[int]]:
    """How often this rank looked at a corpus, the tokens that it then has, and what it knows of its documents."""
    host = world.rank * hosts // world.size
    if cache_of_each:
        args = replace(args, data=replace(args.data, cache=f"{args.data.cache}-{host}"))
    looked = 0
    name, open_, begin = socket.gethostname, Corpus.open, Text.open

    def counted(*words: object) -> Corpus:
        nonlocal looked
        looked += 1
        time.sleep(slow)
        return open_(*words)  # type: ignore[arg-type]

    def of_this_host(args: Arguments, *more: object, known: object = None) -> Text:
        if known is not None and cache_of_each and f"cache-{host}" not in str(known):
            raise DataError("it is not here")  # another host's file system
        return begin(args, *more, known=known)  # type: ignore[arg-type]

    socket.gethostname, Corpus.open, Text.open = lambda: f"n{host}", counted, of_this_host  # type: ignore[method-assign, assignment]
    try:
        text = shared_text(args, world)
    finally:
        socket.gethostname, Corpus.open, Text.open = name, open_, begin  # type: ignore[method-assign]
    documents = [store.header.documents for store in (*text.mix.stores, *(each.store for each in text.eval_sets))]
    return looked, text.mix.stores[0].header.digest, documents


def test_one_rank_of_a_shared_file_system_looks(pool: Pool, arguments: Arguments) -> None:
    """Catches ranks that walk the corpus each, or train on other tokens; and a wait that ends before the look does."""
    found = pool.run(4, looks, arguments, 2, False, 0.5)
    assert [looked for looked, *_ in found] == [1, 0, 0, 0]
    assert len({(digest, tuple(documents)) for _, digest, documents in found}) == 1


def test_where_hosts_have_caches_of_their_own_one_rank_of_each_looks(pool: Pool, arguments: Arguments) -> None:
    found = pool.run(6, looks, arguments, 3, True)
    assert [looked for looked, *_ in found] == [1, 0, 1, 0, 1, 0]
    assert len({digest for _, digest, _ in found}) == 1


def rejected(world: World, args: Arguments) -> str:
    with pytest.raises(RunRejectedError) as error:
        shared_text(args, world)
    return str(error.value)


def test_what_rank_0_cannot_use_ends_all_with_its_words(pool: Pool, arguments: Arguments, tmp_path: Path) -> None:
    """Catches ranks that wait for a text that rank 0 has given up."""
    for path in (tmp_path / "songs").iterdir():
        path.write_bytes(b"\xff\xfe\x00")
    said = set(pool.run(3, rejected, arguments))
    assert len(said) == 1
    assert "songs" in said.pop()
