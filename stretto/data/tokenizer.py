"""Text to token numbers and back: plain bytes, or files of `tokenizers`, SentencePiece, tiktoken or Tekken."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from stretto.arguments.paths import SHIPPED
from stretto.arguments.sections import TOKENIZERS
from stretto.data.errors import DataError
from stretto.data.sentence_piece import SentencePieceTokenizer
from stretto.data.special_tokens import begin_of_document, end_of_document
from stretto.data.tekken import TekkenTokenizer, is_tekken
from stretto.data.tiktoken_file import TiktokenTokenizer, is_tiktoken
from stretto.reading import UnreadableError, read_bytes

_LARGEST = 2**28
"""Bytes of a tokenizer.json: those of the largest vocabularies have some 2**25."""

_BATCH = 2**17
"""Characters that the library gets at a time: it makes some hundred bytes of a token, which then stay in the cache."""


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer. Ids lie in 0..vocab_size-1, `eod` among them."""

    @property
    def name(self) -> str:
        """What `load_tokenizer` takes to give the same one."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers only if they give the same ids."""
        ...

    @property
    def masks(self) -> bool:
        """Whether it gives ~id for a token that does not count as a prediction."""
        ...

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids [n] of a text, without `eod`; where its model begins texts with a token, that comes first."""
        ...

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """`encode` of each text, on all cores where the tokenizer can."""
        ...

    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text of ids [n]; `eod`, and the token with which texts begin, have none."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and one more token that ends a document: 257, which nothing divides."""

    name = "byte"
    vocab_size = 257
    eod = 256
    fingerprint = "byte"
    masks = False
    begin = ()

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [self.encode(text) for text in texts]

    def placed(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Ids [n] of a text, the character with which each begins, and the one before which it ends."""
        sizes = [len(character.encode("utf-8")) for character in text]
        begins = np.repeat(np.arange(len(text), dtype=np.int64), sizes)
        return self.encode(text), begins, begins + 1

    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text of ids [n]; bytes that are no UTF-8 (a cut character) come back as U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library."""

    masks = False

    def __init__(self, path: Path, name: str | None = None):
        """Read the file; `name` where it has one of its own.

        Raises DataError when it is missing, invalid, or names no end-of-document token.
        """
        self.name = name or str(path.absolute())
        try:
            raw = read_bytes(path, _LARGEST)
        except UnreadableError as error:
            raise DataError(f"cannot read tokenizer {path}: {error}; or use --tokenizer byte") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the Rust side raises plain Exception
            raise DataError(f"{path} is no tokenizer.json of the tokenizers library: {error}") from error
        # Files carry what their authors once set for batches: a whole text must stay whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that quotes "<|endoftext|>" does not end there.
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have holes, so the largest counts, not how many there are.
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if self.vocab_size > 16 * len(vocab) + 2**16:  # each of them would be a row of two matrices
            raise DataError(f"{path} has {len(vocab):,} entries with ids up to {self.vocab_size - 1:,}: mostly holes")
        self.eod = end_of_document(path, vocab)
        begin = begin_of_document(path, self._tokenizer, vocab)
        # A document follows the end of another, so where one token does both it stands there already.
        self._begin = [] if begin is None or begin == self.eod else [begin]
        self._marked: tokenizers.Tokenizer | None = None
        told = b"%d" % self.eod + b"".join(b",%d" % token for token in self._begin)
        self.fingerprint = hashlib.blake2b(raw + told, digest_size=16).hexdigest()

    def encode(self, text: str) -> NDArray[np.int64]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        # Special tokens are what a chat or a classifier wraps around a text; the store puts the `eod`s itself. The one
        # with which a text begins is another matter: a model that was trained with it is lost without.
        found: list[NDArray[np.int64]] = []
        for some in _batches(texts):
            try:
                encodings = self._tokenizer.encode_batch_fast(some, add_special_tokens=False)
            except Exception as error:  # the Rust side again: a vocabulary of words without the token that it needs
                raise DataError(
                    f"the tokenizer cannot encode the text ({error}): use another, or --tokenizer byte"
                ) from error
            found += [np.array(self._begin + encoding.ids, dtype=np.int64) for encoding in encodings]
        return found

    @property
    def begin(self) -> tuple[int, ...]:
        """The token with which a text begins, where its model was trained so."""
        return tuple(self._begin)

    def placed(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Ids [n] of a text in which special tokens are such, the character with which each begins, and the one before
        which it ends."""
        if self._marked is None:
            self._marked = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            self._marked.encode_special_tokens = False
        found = self._marked.encode(text, add_special_tokens=False)
        begins, ends = np.array(found.offsets, dtype=np.int64).reshape(-1, 2).T
        return np.array(found.ids, dtype=np.int64), begins, ends

    def decode(self, ids: NDArray[np.int64]) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        shown = ids[~np.isin(ids, [self.eod, *self._begin])]
        return str(self._tokenizer.decode(shown.tolist(), skip_special_tokens=False))


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in lists of about `_BATCH` characters."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= _BATCH:
            yield some
            some, size = [], 0
    if some:
        yield some


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: one that ships, a file of a tokenizer, or a directory that has one.

    In a directory `tokenizer.json` counts before `tekken.json`, that before a SentencePiece or tiktoken
    `tokenizer.model`, and that before the only file named `*.tiktoken`.

    Raises DataError when it cannot be used.
    """
    if name == "byte":
        return ByteTokenizer()
    if name in TOKENIZERS:
        return FileTokenizer(SHIPPED / name / "tokenizer.json", name)
    path = Path(name).expanduser()
    if path.is_dir():
        others = [path / "tokenizer.model", *sorted(path.glob("*.tiktoken"))]
        path = next(
            (p for p in (path / "tokenizer.json", path / "tekken.json", *others) if p.exists()), path / "tokenizer.json"
        )
    if path.suffix != ".json" and is_tiktoken(path):
        return TiktokenTokenizer(path)
    if is_tekken(path):
        return TekkenTokenizer(path)
    # Mistral names its models tokenizer.model.v3
    return SentencePieceTokenizer(path) if ".model" in path.suffixes else FileTokenizer(path)
