"""The reference page of Megatron-LM's flags, from the tables that translate them.

python -m stretto.compat.megatron.reference docs/reference
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from stretto.arguments.errors import as_text
from stretto.compat.megatron.flags import (
    BY_HAND,
    DEFAULTS,
    LEARNING_RATE,
    MISSING,
    ONLY,
    RECOMPUTE,
    REQUIRED,
    SAME,
    SWITCHES,
)
from stretto.compat.megatron.moot import MOOT
from stretto.compat.megatron.rules import COMPUTED

PAGE = "megatron.md"

_INTRODUCTION = """\
# Coming from Megatron-LM

Made by `python -m stretto.compat.megatron.reference docs/reference`; do not edit.

`stretto convert args run.sh --out run.toml` reads the flags that a launch script trains with and writes the settings of
the same run ([how](../arguments.md#from-megatron-lm));
`stretto train --config run.toml` then trains it. `stretto train --megatron FLAGS...` does both at once; settings of
Stretto's own, as in `--nproc 8`, go before `--megatron` and are stronger. Flags that are in none of these
tables are rejected.
"""


def page() -> str:
    """Every flag that is known, and what it is here, as Markdown."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield _INTRODUCTION
    yield from ("| flag | here |", "| --- | --- |")
    yield from (f"| `{flag}` | `{path}` |" for flag, path in SAME.items())
    yield from (f"| `{flag}` | `{path} = {as_text(value)}` |" for flag, (path, value) in SWITCHES.items())
    read = dict.fromkeys(flag for flags in COMPUTED.values() for flag in flags)
    yield from ("", "## Translated with some arithmetic", "", ", ".join(f"`{flag}`" for flag in read))
    yield from ("", "## What a script leaves unsaid", "", "| setting | Megatron-LM's default |", "| --- | --- |")
    yield from (f"| `{path}` | {as_text(value)} |" for path, value in DEFAULTS.items())
    yield from ("", "## What Megatron-LM demands", "", ", ".join(f"`{flag}`" for flag in REQUIRED))
    yield from ("", "## What comes near and is not the same", "", f"- {LEARNING_RATE}.", f"- {RECOMPUTE}.")
    yield from ("", "## Rejected with another value", "", "| flag | value | reason |", "| --- | --- | --- |")
    yield from (f"| `{flag}` | {values[0]} | {reason} |" for flag, (values, reason) in ONLY.items())
    for title, flags in (("Changes nothing here", MOOT), ("To be said by hand", BY_HAND), ("Rejected", MISSING)):
        yield from ("", f"## {title}", "", "| flag | reason |", "| --- | --- |")
        yield from (f"| `{flag}` | {reason} |" for flag, reason in flags.items())


if __name__ == "__main__":
    (Path(sys.argv[1]) / PAGE).write_text(page(), encoding="utf-8")
