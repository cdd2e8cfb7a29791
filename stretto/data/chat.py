"""Instructions and their answers as tokens, of which the answers alone count.

A record is a conversation, `{"messages": [{"role": "user", "content": "..."}, ...]}`, or a pair, `{"prompt": "...",
"completion": "..."}`. What a model sees of a conversation is for the template of its tokenizer to say, which somebody
else wrote: it is rendered in Jinja's sandbox. In what comes out the turns of the assistant count, to their end mark.

A token that does not count is ~id; the store keeps that (`store`), so which tokens count is a part of what is read,
the same in every layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from stretto.data.errors import DataError
from stretto.data.special_tokens import read_object, token_named
from stretto.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

ASSISTANT: Final = "assistant"
_COUNTING: Final = 2
"""Another number where the same record gives other ids or another mask than before: no store of the former is read."""
_PAIR: Final = ("prompt", "completion")


@dataclass(frozen=True)
class Rendered:
    """A text, and the spans of it that count."""

    text: str
    spans: tuple[tuple[int, int], ...]
    bare: bool
    """Whether no template wraps it: then it begins as a document does, and its end is one of the tokens to learn."""


class ChatTokenizer:
    """Takes records as JSON for texts. `masks`: its ids are ~id where a token does not count."""

    masks = True

    def __init__(self, inner: Tokenizer, template: str | None, special: dict[str, str]) -> None:
        """Raises DataError where the template is none, or the tokenizer does not say where in a text its tokens lie."""
        if not isinstance(inner, FileTokenizer | ByteTokenizer):
            raise DataError(
                f"{inner.name}: --format chat needs a tokenizer.json, which says where tokens lie in a text"
            )
        self.inner, self._special = inner, special
        self.name, self.vocab_size, self.eod = inner.name, inner.vocab_size, inner.eod
        try:
            self._template = None if template is None else _environment().from_string(template)
        except TemplateError as error:
            raise DataError(f"the chat template of {inner.name} is none: {error}") from error
        told = json.dumps([_COUNTING, inner.fingerprint, template, special]).encode()
        self.fingerprint = "chat-" + hashlib.blake2b(told, digest_size=16).hexdigest()

    @classmethod
    def of(cls, inner: Tokenizer) -> ChatTokenizer:
        """With the chat template that lies beside the tokenizer, if there is one. Raises DataError."""
        config = Path(inner.name).with_name("tokenizer_config.json")
        template = _template(config)
        special = {name: token for name in ("bos_token", "eos_token") if (token := token_named(config, name))}
        return cls(inner, template, special)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Ids [n] of a record, ~id where a token does not count. Raises DataError for what is no conversation."""
        rendered = self.rendered(text)
        ids, begins, ends = self.inner.placed(rendered.text)
        counts = np.zeros(len(ids), dtype=bool)
        for begin, end in rendered.spans:  # with a token that begins before the answer and ends within: "a: " + "b"
            counts |= (begins < end) & ((begins >= begin) | (ends > begin))
        found = np.where(counts, ids, ~ids)
        if rendered.bare:
            found = np.concatenate([[~token for token in self.inner.begin], found, [self.eod]]).astype(np.int64)
        return found

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: NDArray[np.int64]) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        return self.inner.decode(np.where(ids < 0, ~ids, ids))

    def rendered(self, text: str) -> Rendered:
        """What the model sees of a record. Raises DataError."""
        shown, record = text[:80], _record(text)
        if all(isinstance(record.get(name), str) for name in _PAIR):
            prompt, answer = (record[name] for name in _PAIR)
            return Rendered(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), bare=True)
        messages = record.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise DataError(
                f"{shown}...: --format chat takes lines with messages (each a role and its content), or with prompt "
                "and completion"
            )
        if self._template is None:
            raise DataError(
                f"the tokenizer {self.name} has no chat template, in tokenizer_config.json or chat_template.jinja "
                "beside it, for messages; lines with prompt and completion need none"
            )
        whole, spans = self._render(messages), []
        for n, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before, after = self._render(messages[:n], prompt=True), self._render(messages[: n + 1])
                if not (whole.startswith(before) and whole.startswith(after) and after.startswith(before)):
                    raise DataError(
                        f"{shown}...: the chat template of {self.name} renders turn {n + 1} otherwise when more turns "
                        "follow: give each answer a line of its own"
                    )
                spans.append((len(before), len(after.rstrip())))
        if not spans:
            raise DataError(f"{shown}...: no turn of the role {ASSISTANT}, so nothing to learn")
        return Rendered(whole, tuple(spans), bare=False)

    def _render(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        assert self._template is not None
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **self._special)
        except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise DataError(
                f"the chat template of {self.name} cannot render {str(messages)[:80]}...: {error}"
            ) from error


def tokenizer_of(name: str, *, chat: bool) -> Tokenizer:
    """The tokenizer of that name, or it with its template. Raises DataError."""
    return ChatTokenizer.of(load_tokenizer(name)) if chat else load_tokenizer(name)


def _record(text: str) -> dict[str, Any]:
    """The fields of a record; none where the text is no JSON object, such as a file of plain text in a directory."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _template(config: Path) -> str | None:
    """The chat template beside a tokenizer: a file of its own, or in the configuration; of several the default one."""
    own = config.with_name("chat_template.jinja")
    if own.exists():
        return own.read_text(encoding="utf-8")
    said = read_object(config).get("chat_template")
    if isinstance(said, list):
        said = next(
            (each["template"] for each in said if isinstance(each, dict) and each.get("name") == "default"), None
        )
    return said if isinstance(said, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """As `transformers` renders chat templates, which are written for it."""
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    found.globals["raise_exception"] = _raise
    found.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    found.filters["tojson"] = lambda x, **more: json.dumps(x, ensure_ascii=False, **more)
    return found


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant says; here the turns themselves tell."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        """The inside as it is."""
        line = next(parser.stream).lineno
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
