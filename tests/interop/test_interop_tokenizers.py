"""Tokenizers that ship go out with a model, and `transformers` reads them as we do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stretto.arguments import parse
from stretto.arguments.paths import SHIPPED
from stretto.arguments.sections import TOKENIZERS
from stretto.data.tokenizer import load_tokenizer
from stretto.interop.export import copy_beside
from stretto.interop.outgoing import Outgoing

pytestmark = pytest.mark.gloo

THEIRS = {name: AutoTokenizer.from_pretrained(SHIPPED / name) for name in TOKENIZERS}


END = "<|endoftext|>"
"""Where a text quotes it, `transformers` takes it for the end of a document; to us a text does not end there."""

TEXTS = st.text(st.characters(codec="utf-8")).filter(lambda text: END not in text)


@given(st.sampled_from(sorted(TOKENIZERS)), TEXTS)
def test_transformers_gives_the_same_tokens(name: str, text: str) -> None:
    """Catches another table of bytes, spaces that are put in or taken out, and another end of documents."""
    ours, theirs = load_tokenizer(name), THEIRS[name]
    ids = theirs(text)["input_ids"] if text else []
    assert ids == ours.encode(text).tolist()
    assert theirs.decode(ids) == ours.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.eod, ours.vocab_size)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_it_goes_out_with_the_model(tmp_path: Path, name: str) -> None:
    """Catches the files of two tokenizers in one directory: those of the run count, not those of what it is like."""
    args = parse(["--preset", "tiny", "--tokenizer", name]).args
    like = tmp_path / "like"
    like.mkdir()
    for file in ("tokenizer.json", "special_tokens_map.json", "generation_config.json"):
        (like / file).write_text("{}")
    to = tmp_path / "to"
    to.mkdir()
    copied = copy_beside([*Outgoing.of(args).beside, like], to)
    assert copied == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert AutoTokenizer.from_pretrained(to).eos_token == END
