"""What a document tells a reader to type is understood by the program."""

from __future__ import annotations

import re
import shlex
from functools import partial

import pytest

from stretto.arguments import parse
from stretto.arguments.files import read_preset
from stretto.cli import COMMANDS
from stretto.cli.megatron import layer
from stretto.cli.words import FORMS

pytestmark = pytest.mark.pure

BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def test_every_command_in_the_documents_exists(texts):
    commands = [command for command, *_ in _commands(texts)]
    assert {"train", "sample"} <= set(commands) <= set(COMMANDS)


def test_every_training_command_in_the_documents_is_valid(texts):
    """Catches a renamed flag, and an example whose numbers do not fit one another, or that Megatron-LM's default of a
    flag that it leaves out rejects. A model is Qwen3 0.6B."""
    translate = partial(layer, tell=False)
    for command, *words in _commands(texts):
        if command == "train":
            asked = [word for word in words if word != "--help"]
            model = read_preset("qwen3-0.6b")
            parse(asked, env={}, files=False, form=FORMS[0], adopt=lambda _, m=model: m, translate=translate)


def _commands(texts: dict[str, str]) -> list[list[str]]:
    """The words after `stretto`, also where a launcher starts it as a module."""
    blocks = (block for name, text in texts.items() if name.endswith(".md") for block in BLOCK.findall(text))
    lines = (shlex.split(line, comments=True) for block in blocks for line in block.splitlines())
    return [words[words.index("stretto") + 1 :] for words in lines if "stretto" in words[:-1]]
