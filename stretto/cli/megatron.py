"""`--megatron FLAGS...`: what Megatron-LM's flags stand for, where settings are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stretto.arguments.errors import Violation
from stretto.arguments.layers import Layer
from stretto.arguments.sources import Source, SourceKind
from stretto.terminal import say

if TYPE_CHECKING:
    from stretto.compat.megatron import Translation


def layer(words: Sequence[str], *, tell: bool = True, processes: int | None = None) -> Layer:
    """The settings that flags stand for, as a file of them would say it; `tell`: what changes nothing or is left."""
    from stretto.compat.megatron import flags_of, translate  # a reader of bash: not for those who have no such script

    flags, wrong = flags_of(words)
    t = translate(flags, processes=processes)
    if tell:
        print_notes(t)
    return as_layer(t, wrong)


def as_layer(t: Translation, before: Sequence[Violation] = ()) -> Layer:
    """Values and rejections of a translation; `before`: what was wrong with the words themselves."""
    values = {path: value for path, (value, _) in t.values.items()}
    return Layer(Source(SourceKind.FILE, "of Megatron-LM's flags"), values, (*before, *t.rejected))


def print_notes(t: Translation) -> None:
    """Say which flags change nothing here, and which are to be said in other words, on standard error."""
    for title, flags in (("changes nothing here", t.moot), ("to be said by hand", t.manual)):
        for flag, reason in flags.items():
            say(f"{title}: {flag}: {reason}")
    for note in t.notes:
        say(f"note: {note}")
