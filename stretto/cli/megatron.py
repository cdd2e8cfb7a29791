"""`--megatron FLAGS...`: what Megatron-LM's flags stand for, where settings are taken."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stretto.arguments.layers import Layer
from stretto.arguments.sources import Kind, Source
from stretto.compat.megatron import Translation, flags_of, translate


def layer(words: Sequence[str], *, tell: bool = True) -> Layer:
    """The settings that flags stand for, as a file of them would say it; `tell`: what changes nothing or is left."""
    t = translate(flags_of(words))
    if tell:
        print_notes(t)
    return as_layer(t)


def as_layer(t: Translation) -> Layer:
    """Values and refusals of a translation."""
    values = {path: value for path, (value, _) in t.values.items()}
    return Layer(Source(Kind.FILE, "of Megatron-LM's flags"), values, t.refused)


def print_notes(t: Translation) -> None:
    """Say which flags change nothing here, and which are to be said in other words, on standard error."""
    for title, flags in (("changes nothing here", t.moot), ("to be said by hand", t.by_hand)):
        for flag, reason in flags.items():
            print(f"{title}: {flag}: {reason}", file=sys.stderr)
