"""Which tokens of a Hugging Face directory begin and end a document, as its files beside the tokenizer say it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import tokenizers

from stretto.data.errors import DataError
from stretto.reading import read_json

# What model families call the token that ends a text, where no file says it.
_END_NAMES: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")

_TOLD_BY_NAME: Final = ("tokenizer_config.json", "special_tokens_map.json")
_TOLD_BY_ID: Final = ("generation_config.json", "config.json")


def end_of_document(path: Path, vocab: Mapping[str, int]) -> int:
    """The id of the `eos_token` that the files beside `path` say, else of a well-known name. Raises DataError."""
    for name in _TOLD_BY_NAME:
        config = path.with_name(name)
        if (said := token_named(config, "eos_token")) is None:
            continue
        if said not in vocab:
            raise DataError(f"{config} says eos_token={said!r}, which {path.name} does not have")
        return vocab[said]
    for name in _TOLD_BY_ID:
        ids = read_object(path.with_name(name)).get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids  # a model for chats has several: the first ends a text
        if isinstance(first, int) and first in vocab.values():
            return first
    for name in _END_NAMES:
        if name in vocab:
            return vocab[name]
    raise DataError(
        f"{path} has no token that ends a document: none of {', '.join(_END_NAMES)} is in it; "
        f'say which one to use in {path.with_name(_TOLD_BY_NAME[0])}: {{"eos_token": "..."}}'
    )


def begin_of_document(path: Path, tokenizer: tokenizers.Tokenizer, vocab: Mapping[str, int]) -> int | None:
    """The id of the `bos_token` with which the model was trained to begin a text, if it was.

    That is so where `add_bos_token` says it, or, where nothing does, where the tokenizer itself would put it there.
    """
    said = next((token for name in _TOLD_BY_NAME if (token := token_named(path.with_name(name), "bos_token"))), None)
    if said is None or said not in vocab:
        return None
    added = read_object(path.with_name(_TOLD_BY_NAME[0])).get("add_bos_token")
    if isinstance(added, bool):
        return vocab[said] if added else None
    return vocab[said] if tokenizer.encode("a", add_special_tokens=True).ids[:1] == [vocab[said]] else None


def added_tokens(config: Path) -> dict[str, int]:
    """The `added_tokens_decoder` of a tokenizer_config.json: special tokens and their ids. Raises DataError."""
    said = read_object(config).get("added_tokens_decoder", {})
    try:
        found = {each["content"]: int(n) for n, each in said.items()}
        if any(not isinstance(token, str) or not 0 <= n < 2**24 for token, n in found.items()):
            raise ValueError("it must have ids, and texts")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{config}: added_tokens_decoder cannot be read: {error}") from error
    return found


def adds_begin(config: Path, *, usual: bool) -> bool:
    """Whether a document begins with the `bos_token`: as `add_bos_token` says, or as is `usual`."""
    said = read_object(config).get("add_bos_token")
    return said if isinstance(said, bool) else usual


def token_named(config: Path, name: str) -> str | None:
    """A token in a file, where there is one: a string, or an object with its `content`."""
    said = read_object(config).get(name)
    content = said.get("content") if isinstance(said, dict) else said
    if content is not None and not isinstance(content, str):
        raise DataError(f"{config}: {name} must be a string, not {content!r}")
    return content


def read_object(config: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where there is no such file."""
    if not config.exists():
        return {}
    try:
        found = read_json(config)
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise DataError(f"{config} cannot be read: {error}") from error
    return found
