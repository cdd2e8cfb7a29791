"""Tekken, the tokenizer of Mistral's models since NeMo: `tekken.json`, byte pairs with their ranks, and their pattern.

The first ids are special tokens, `default_num_special_tokens` of them, so byte pairs begin after those. Newer files
name the special ones; in older ones they are always the same, of which two matter here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stretto.data.errors import DataError
from stretto.reading import UnreadableError, parse_json, read_bytes

_LARGEST: Final = 1 << 26
_MOST: Final = 1 << 22
"""Entries of a vocabulary; more is damage."""
_BEGIN, _END = ("<s>", 1), ("</s>", 2)
"""The token that begins a text, the one that ends it, and their usual ids."""


class TekkenTokenizer:
    """A `tekken.json`."""

    masks = False

    def __init__(self, path: Path) -> None:
        """Read the file. Raises DataError when it is damaged, or `tiktoken` is not installed."""
        try:
            import tiktoken
        except ImportError as error:
            raise DataError(f"{path} needs tiktoken: pip install 'stretto[tiktoken]'") from error
        self.name = str(path.absolute())
        try:
            raw = read_bytes(path, _LARGEST)
            said = parse_json(raw)
            config = said["config"]
            self.vocab_size, self._special = (
                _count(config[name]) for name in ("default_vocab_size", "default_num_special_tokens")
            )
            entries = said["vocab"][: self.vocab_size - self._special]
            ranks = {base64.b64decode(each["token_bytes"], validate=True): _count(each["rank"]) for each in entries}
            special = {each["token_str"]: _count(each["rank"]) for each in said.get("special_tokens") or ()}
            if sorted(ranks.values()) != list(range(self.vocab_size - self._special)) or not ranks:
                raise ValueError("it must have each rank from 0 on once")
            begin, self.eod = (special.get(token, usual) for token, usual in (_BEGIN, _END))
            if max(begin, self.eod) >= self._special:
                raise ValueError("its special tokens are among its byte pairs")
            # Special tokens take no part: a text that quotes one does not end there.
            self._encoding = tiktoken.Encoding(
                path.name, pat_str=str(config["pattern"]), mergeable_ranks=ranks, special_tokens={}
            )
        except (UnreadableError, binascii.Error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no tekken.json: {type(error).__name__}: {error}") from error
        self._begin = [begin]
        told = json.dumps([self.eod, begin, self.vocab_size]).encode()
        self.fingerprint = hashlib.blake2b(raw + told, digest_size=16).hexdigest()

    def encode(self, text: str) -> NDArray[np.int64]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        found = self._encoding.encode_ordinary_batch(list(texts))
        return [np.concatenate([self._begin, np.array(ids, dtype=np.int64) + self._special]) for ids in found]

    def decode(self, ids: NDArray[np.int64]) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        return str(self._encoding.decode((ids[ids >= self._special] - self._special).tolist()))


def is_tekken(path: Path) -> bool:
    """Whether a file is called as those of Tekken are: tekken.json, tekken_240911.json."""
    return path.suffix == ".json" and path.name.startswith("tekken")


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{value!r} is no number of entries")
    return value
