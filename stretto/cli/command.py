"""How a command reads its words: the form that they name, its help, and its options or everything wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stretto.arguments.form import Form, read_options
from stretto.arguments.values import did_you_mean
from stretto.terminal import say

USAGE_ERROR = 2


def chosen(forms: Sequence[Form], argv: Sequence[str]) -> tuple[Form, list[str]]:
    """The form that the first word names, and the other words. Ends the program where there is none, or after help."""
    word, *rest = argv or ("",)
    named = {form.name.split()[-1]: form for form in forms}
    if word in named:
        return named[word], rest
    command = forms[0].name.rpartition(" ")[0]
    lines = [f"usage: {command} COMMAND [options]", "", *(f"  {name:<10} {form.brief}" for name, form in named.items())]
    lines += ["", f"`{command} COMMAND --help` says what each takes."]
    asked = word in ("-h", "--help")
    if word and not asked:
        lines = [f"{command}: no command {word!r}{did_you_mean(word, tuple(named))}", "", *lines]
    say("\n".join(lines), out=asked)
    raise SystemExit(0 if asked else USAGE_ERROR)


def options(form: Form, argv: Sequence[str]) -> Any:
    """The options of a command without settings of a run. Ends the program where they are wrong, or after help."""
    if {"-h", "--help"} & set(argv):
        from stretto.arguments.help import say_help

        say_help(form)
    try:
        return read_options(form, argv)
    except ValueError as error:
        lines = str(error).split("\n")
        say(f"{form.name}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{form.name}:", *lines]))
        raise SystemExit(USAGE_ERROR) from None
