"""What goes into a store comes out of it, and a damaged one is noticed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists

from stretto.data.errors import DataError
from stretto.data.store import TokenStore, write_store

pytestmark = pytest.mark.pure

DOCUMENTS = lists(lists(integers(0, 256), max_size=50), max_size=20)


def write(path: Path, documents: list[list[int]], vocab_size: int = 257) -> TokenStore:
    with write_store(path, vocab_size=vocab_size, eod=vocab_size - 1, fingerprint="f") as writer:
        for ids in documents:
            writer.add(np.array(ids, dtype=np.int64), text_bytes=2 * len(ids))
    return TokenStore.open(path)


@given(documents=DOCUMENTS, vocab_size=integers(257, 10**5))
def test_documents_come_back(documents: list[list[int]], vocab_size: int) -> None:
    with TemporaryDirectory() as folder:
        store = write(Path(folder) / "a", documents, vocab_size)
        eod = vocab_size - 1
        assert [store.document(i).tolist() for i in range(len(documents))] == documents
        assert store.tokens.tolist() == [eod, *(t for ids in documents for t in (*ids, eod))]
        assert store.header.documents == len(documents)
        assert store.header.bytes == 2 * sum(map(len, documents))
        assert store.tokens.dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
        assert store.intact()


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65536, 2), (65537, 4)])
def test_the_largest_id_fits(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    store = write(tmp_path / "a", [[vocab_size - 2]], vocab_size)
    assert store.tokens.itemsize == itemsize
    assert store.document(0).tolist() == [vocab_size - 2]


def test_bytes_per_token_counts_the_predicted_tokens(tmp_path: Path) -> None:
    assert write(tmp_path / "a", [[1, 2, 3]]).bytes_per_token == 6 / 4  # three tokens and their eod
    assert write(tmp_path / "b", []).bytes_per_token == 0


def test_the_digest_is_of_the_tokens(tmp_path: Path) -> None:
    digests = [write(tmp_path / str(i), d).header.digest for i, d in enumerate([[[1], [2]], [[1], [2]], [[1, 2]]])]
    assert digests[0] == digests[1] != digests[2]


def test_an_id_outside_the_vocabulary_is_rejected_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"document 1: token ids -1\.\.300 lie outside the vocabulary of 257"):
        write(tmp_path / "a", [[1], [-1, 300]])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_old_store(tmp_path: Path) -> None:
    write(tmp_path / "a", [[7]])

    def interrupted() -> None:
        with write_store(tmp_path / "a", vocab_size=257, eod=256, fingerprint="g") as writer:
            writer.add(np.array([8]), 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert TokenStore.open(tmp_path / "a").document(0).tolist() == [7]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_store_in_use_is_replaced_and_not_overwritten(tmp_path: Path) -> None:
    in_use = write(tmp_path / "a", [[7]])
    write(tmp_path / "a", [[8]])
    assert in_use.document(0).tolist() == [7]


@given(keep=integers(0, 4096 + 32))
def test_a_store_cut_anywhere_is_noticed(keep: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        store = write(path, [[1, 2, 3], [4]])
        whole = path.read_bytes()
        assert len(whole) == store.header.file_bytes == 4096 + 16 + 24
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match="delete it"):
            TokenStore.open(path)


def test_a_missing_store_and_another_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the token store .*: No such file"):
        TokenStore.open(tmp_path / "a")
    write(tmp_path / "a", [[1]])
    raw = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(raw.replace(b"stretto tokens 2", b"stretto tokens 1"))
    with pytest.raises(DataError, match="no token store of format 'stretto tokens 2'"):
        TokenStore.open(tmp_path / "a")


def test_a_flipped_token_is_found_by_reading_all(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3]])
    with (tmp_path / "a").open("r+b") as file:
        file.seek(4096 + 2)
        file.write(b"\x09")
    assert not TokenStore.open(tmp_path / "a").intact()


def test_a_store_is_read_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        write(tmp_path / "a", [[1]]).tokens[0] = 5
