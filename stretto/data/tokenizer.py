"""Text to token numbers and back: plain bytes, or a Hugging Face `tokenizers` file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from stretto.arguments.schema import TOKENIZERS
from stretto.data.errors import DataError

# What model families call the token that ends a text, where no tokenizer_config.json says it.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """What the rest of the room asks of a tokenizer. Ids lie in 0..vocab_size-1, `eod` among them."""

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

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids [n] of a text, without `eod`."""
        ...

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """`encode` of each text, on all cores where the tokenizer can."""
        ...

    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text of ids [n]; `eod` has none."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and one more token that ends a document: 257, which nothing divides."""

    name = "byte"
    vocab_size = 257
    eod = 256
    fingerprint = "byte"

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text of ids [n]; bytes that are no UTF-8 (a cut character) come back as U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library."""

    def __init__(self, path: Path, name: str | None = None):
        """Read the file; `name` where it has one of its own.

        Raises DataError when it is missing, invalid, or names no end-of-document token.
        """
        self.name = name or str(path.absolute())
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read tokenizer {path}: {error.strerror}; or use data.tokenizer=byte") from error
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
        self.eod = _end_of_document(path, vocab)
        self.fingerprint = hashlib.blake2b(raw + b"%d" % self.eod, digest_size=16).hexdigest()

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        # Special tokens are what a chat or a classifier wraps around a text; the store puts the `eod`s itself.
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in found]

    def decode(self, ids: NDArray[np.int64]) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        return str(self._tokenizer.decode(ids[ids != self.eod].tolist(), skip_special_tokens=False))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: one that ships, a `tokenizer.json`, or a directory that has one.

    Raises DataError when it cannot be used.
    """
    if name == "byte":
        return ByteTokenizer()
    if name in TOKENIZERS:
        return FileTokenizer(Path(__file__).parent / "tokenizers" / f"{name}.json", name)
    path = Path(name).expanduser()
    return FileTokenizer(path / "tokenizer.json" if path.is_dir() else path)


def _end_of_document(path: Path, vocab: dict[str, int]) -> int:
    """The id of `eos_token` in the tokenizer_config.json beside `path`, else of a well-known name."""
    config = path.with_name("tokenizer_config.json")
    said = _eos_token(config) if config.exists() else None
    if said is not None and said not in vocab:
        raise DataError(f"{config} says eos_token={said!r}, which {path.name} does not have")
    for name in (said, *_END_NAMES):
        if name is not None and name in vocab:
            return vocab[name]
    raise DataError(
        f"{path} has no token that ends a document: none of {', '.join(_END_NAMES)} is in it; "
        f'say which one to use in {config}: {{"eos_token": "..."}}'
    )


def _eos_token(config: Path) -> str | None:
    """`eos_token` of a tokenizer_config.json: a string, or an object with its `content`."""
    try:
        said = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{config} cannot be read: {error}") from error
    content = said.get("content") if isinstance(said, dict) else said
    if content is not None and not isinstance(content, str):
        raise DataError(f"{config}: eos_token must be a string, not {content!r}")
    return content
