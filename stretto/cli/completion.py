"""`stretto completion`: a script with which a shell completes commands, flags, choices and files, made of the forms."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Literal

import shtab

from stretto.arguments.form import Form
from stretto.arguments.help import describe
from stretto.arguments.setting import REQUIRED, setting
from stretto.cli.command import options
from stretto.terminal import hand_on


@dataclass(frozen=True)
class Command:
    """Write a script that completes the words of `stretto`: in ~/.bashrc, eval "$(stretto completion bash)"."""

    shell: Literal["bash", "zsh", "fish"] = setting(REQUIRED, "whose language it is in", positional=True)


FORMS: Final = (Form("stretto completion", Command),)


def main(argv: Sequence[str]) -> int:
    """Run `stretto completion ...`: the script goes to standard output."""
    said: Command = options(FORMS[0], argv)
    hand_on(f"{shtab.complete(parser(), said.shell)}\n")
    return 0


def parser() -> ArgumentParser:
    """All commands, and what each takes."""
    from stretto.cli import COMMANDS

    root = ArgumentParser("stretto")
    commands = root.add_subparsers(metavar="COMMAND")
    for name, about in COMMANDS.items():
        forms: Sequence[Form] = _forms(name)
        if len(forms[0].name.split()) == 2:
            describe(commands.add_parser(name, help=about), forms[0], files=shtab.FILE)
            continue
        verbs: Any = commands.add_parser(name, help=about).add_subparsers(metavar="COMMAND")
        for form in forms:
            describe(verbs.add_parser(form.name.split()[-1], help=form.brief), form, files=shtab.FILE)
    return root


def _forms(name: str) -> Sequence[Form]:
    module = import_module("stretto.cli.words" if name == "train" else f"stretto.cli.{name}")
    forms: Sequence[Form] = module.FORMS
    return forms
