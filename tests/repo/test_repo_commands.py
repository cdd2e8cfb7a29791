"""What a document tells a reader to type is understood by the program."""

from __future__ import annotations

import re
import shlex

import pytest

from stretto.arguments import parse
from stretto.arguments.files import read_preset
from stretto.cli import COMMANDS
from stretto.cli.words import FORMS

pytestmark = pytest.mark.pure

BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def test_every_command_in_the_documents_exists(texts):
    commands = [command for command, *_ in _commands(texts)]
    assert {"train", "sample"} <= set(commands) <= set(COMMANDS)


def test_every_training_command_in_the_documents_is_valid(texts):
    """Catches a renamed flag, and an example whose numbers do not fit one another. A model is Qwen3 0.6B."""
    for command, *words in _commands(texts):
        if command == "train" and "--megatron" not in words:  # what follows there is another program's
            asked = [word for word in words if word != "--help"]
            parse(asked, env={}, files=False, form=FORMS[0], adopt=lambda _: read_preset("qwen3-0.6b"))


def _commands(texts: dict[str, str]) -> list[list[str]]:
    """The words after `stretto`, also where a launcher starts it as a module."""
    blocks = (block for name, text in texts.items() if name.endswith(".md") for block in BLOCK.findall(text))
    lines = (shlex.split(line, comments=True) for block in blocks for line in block.splitlines())
    return [words[words.index("stretto") + 1 :] for words in lines if "stretto" in words[:-1]]
