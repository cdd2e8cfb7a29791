"""What can be said of data: the schema's part that is about text and how it becomes rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.arguments.setting import setting


@dataclass(frozen=True)
class DataConfig:
    """What text to train on, and how it becomes tokens."""

    data: str | None = setting(
        None,
        "text files, a .jsonl, the .bin of tokens; shares as in a/:0.7,b.jsonl:0.3; unset: Python's standard library",
        path=True,
    )
    text_key: str = setting("text", "the field of each JSON line that holds its text")
    format: Literal["text", "chat"] = setting(
        "text",
        "chat: JSON lines with messages, or with prompt and completion, of which the answers alone count in the loss",
    )
    tokenizer: str = setting("byte", "byte, or a tokenizer.json of the tokenizers library, or its directory", path=True)
    packing: bool = setting(
        False,
        "rows of whole documents, as many as fit, which do not see each other; else rows are windows of the text, in "
        "which attention crosses from one document to the next",
    )
    eval_data: str | None = setting(None, "more validation sets, each with its curve: name=path,other=path", path=True)
    held_out: float = setting(0.05, "share of the files kept for evaluation", at_least=0, below=1)
    max_lost: float = setting(0.01, "share of the text that the tokenizer may lose", at_least=0, at_most=1)
    cache: str = setting("~/.cache/stretto", "directory for tokenized text", carried=False, path=True)
