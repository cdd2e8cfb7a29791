"""Tokenizers of `tiktoken`: a file of byte pairs, each with its rank.

Such a file has neither the pattern that cuts a text into words nor special tokens. Both follow from who made it, which
its number of entries tells; or `tokenizer_config.json` beside it has them as `pat_str` and `added_tokens_decoder`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from stretto.data.errors import DataError
from stretto.data.special_tokens import added_tokens, adds_begin, read_object, token_named
from stretto.reading import UnreadableError, read_bytes

_LARGEST: Final = 1 << 26
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K: Final = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN: Final = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_QWEN35: Final = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K: Final = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)


@dataclass(frozen=True)
class Known:
    """What a file of so many entries lacks; special tokens follow the entries, in all `special` of them."""

    pattern: str
    end: int
    begin: int | None
    special: int
    composed: bool = False
    """Whether texts are normalized to NFC first."""


KNOWN: Final[Mapping[int, Known]] = {
    128_000: Known(_CL100K, 128_001, 128_000, 256),  # Llama 3
    200_000: Known(_O200K, 200_001, 200_000, 2048),  # Llama 4
    151_643: Known(_QWEN, 151_643, None, 208, composed=True),  # Qwen to Qwen 3
    248_044: Known(_QWEN35, 248_044, None, 33, composed=True),  # Qwen 3.5
    100_256: Known(_CL100K, 100_257, None, 21),  # cl100k_base
    199_998: Known(_O200K, 199_999, None, 21),  # o200k_base
}
"""By the number of entries."""


class TiktokenTokenizer:
    """A file of lines `base64 rank`."""

    masks = False

    def __init__(self, path: Path) -> None:
        """Read the file. Raises DataError when it is damaged, unknown, or `tiktoken` is not installed."""
        try:
            import tiktoken
        except ImportError as error:
            raise DataError(f"{path} is a file of tiktoken: pip install 'stretto[tiktoken]'") from error
        self.name = str(path.absolute())
        raw = _read(path)
        ranks = _ranks(path, raw)
        config = path.with_name("tokenizer_config.json")
        pattern, special = read_object(config).get("pat_str"), added_tokens(config)
        known = KNOWN.get(len(ranks))
        if known is not None and not special:
            special = {f"<|special {n}|>": len(ranks) + n for n in range(known.special)}
            self.eod, begin = known.end, known.begin
        elif special:
            end = token_named(config, "eos_token")
            if end not in special:
                raise DataError(f"{config} must say an eos_token that is among its added_tokens_decoder, not {end!r}")
            self.eod = special[end]
            begin = special.get(token_named(config, "bos_token") or "") if adds_begin(config, usual=False) else None
        else:
            raise DataError(
                f"{path} has {len(ranks):,} entries, as no tokenizer that is known here; say its pattern and special "
                f"tokens in {config}, as pat_str and added_tokens_decoder"
            )
        if pattern is None and known is not None:
            pattern = known.pattern
        if not isinstance(pattern, str):
            raise DataError(f"{config} must say, as pat_str, the pattern that cuts a text into words")
        self._begin = [] if begin is None or begin == self.eod else [begin]
        try:
            # Special tokens take no part: a text that quotes one does not end there.
            self._encoding = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except Exception as error:  # the Rust side raises what it will
            raise DataError(f"{path} cannot be used: {error}") from error
        self.vocab_size = max(*ranks.values(), *special.values()) + 1
        self._known, self._composed = len(ranks), known is not None and known.composed
        told = f"{pattern}\0{self.eod}\0{self._begin}\0{self.vocab_size}\0{self._composed}".encode()
        self.fingerprint = hashlib.blake2b(raw + told, digest_size=16).hexdigest()

    def encode(self, text: str) -> NDArray[np.int64]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        texts = [normalize("NFC", text) if self._composed else text for text in texts]
        found = self._encoding.encode_ordinary_batch(texts)
        return [np.array([*self._begin, *ids], dtype=np.int64) for ids in found]

    def decode(self, ids: NDArray[np.int64]) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        return str(self._encoding.decode(ids[ids < self._known].tolist()))


def is_tiktoken(path: Path) -> bool:
    """Whether a file begins as those of tiktoken do: a token in base64, and its rank."""
    try:
        with path.open("rb") as stream:
            token, _, rank = stream.readline(200).partition(b" ")
        return bool(base64.b64decode(token, validate=True)) and rank.strip().isdigit()
    except (OSError, binascii.Error):
        return False


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _LARGEST)
    except UnreadableError as error:
        raise DataError(f"cannot read tokenizer {path}: {error}") from error


def _ranks(path: Path, raw: bytes) -> dict[bytes, int]:
    """Byte pairs and their ranks: each number from 0 on once."""
    found: dict[bytes, int] = {}
    try:
        for line in raw.splitlines():
            if line:
                token, rank = line.split()
                found[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError as error:
        raise DataError(f"{path} has a line that is no token in base64 and its rank: {error}") from error
    if not found or sorted(found.values()) != list(range(len(found))):
        raise DataError(f"{path} must have each rank from 0 on once")
    return found
