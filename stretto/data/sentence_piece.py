"""Tokenizers of SentencePiece: `tokenizer.model` of Llama 2, Mistral, Gemma and others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stretto.data.errors import DataError
from stretto.data.special_tokens import added_tokens, adds_begin, token_named
from stretto.reading import UnreadableError, read_bytes

_LARGEST: Final = 1 << 26


class SentencePieceTokenizer:
    """A model of SentencePiece, with the tokens that `tokenizer_config.json` beside it adds."""

    masks = False

    def __init__(self, path: Path) -> None:
        """Read the file. Raises DataError when it is damaged, ends no document, or the library is not installed."""
        try:
            import sentencepiece
        except ImportError as error:
            raise DataError(f"{path} is a model of SentencePiece: pip install 'stretto[sentencepiece]'") from error
        self.name = str(path.absolute())
        try:
            raw = read_bytes(path, _LARGEST)
            self._model = sentencepiece.SentencePieceProcessor(model_proto=raw)
        except (UnreadableError, RuntimeError, ValueError) as error:
            raise DataError(f"{path} is no model of SentencePiece: {error}") from error
        config = path.with_name("tokenizer_config.json")
        added = added_tokens(config)
        self.eod = self._id(config, "eos_token", added, self._model.eos_id())
        begin = self._id(config, "bos_token", added, self._model.bos_id())
        if self.eod < 0:
            raise DataError(f"{path} has no token that ends a document; say it in {config} as eos_token")
        wanted = begin >= 0 and begin != self.eod and adds_begin(config, usual=True)
        self._begin = [begin] if wanted else []
        self._known = self._model.vocab_size()
        self.vocab_size = max(self._known, *(n + 1 for n in added.values()), 1)
        told = f"{self.eod}\0{self._begin}\0{self.vocab_size}".encode()
        self.fingerprint = hashlib.blake2b(raw + told, digest_size=16).hexdigest()

    def encode(self, text: str) -> NDArray[np.int64]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        found = self._model.encode(list(texts), out_type=int)
        return [np.array([*self._begin, *ids], dtype=np.int64) for ids in found]

    def decode(self, ids: NDArray[np.int64]) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        shown = ids[~np.isin(ids, [self.eod, *self._begin]) & (ids < self._known)]
        return str(self._model.decode(shown.tolist()))

    def _id(self, config: Path, name: str, added: dict[str, int], usual: int) -> int:
        """The id of a special token that the files beside the model name, else its own."""
        said = token_named(config, name)
        if said is None:
            return int(usual)
        if said in added:
            return added[said]
        found = int(self._model.piece_to_id(said))
        if self._model.id_to_piece(found) != said:
            raise DataError(f"{config} says {name}={said!r}, which the model does not have")
        return found
