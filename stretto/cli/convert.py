"""The settings of a Megatron-LM launch script, as a settings file.

    stretto convert args run_megatron.sh --out run.toml
    stretto convert args < run_megatron.sh

What changes nothing here, and what is left to say by hand, goes to standard error. Flags for what is not available
are refused.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from stretto.arguments.errors import ConfigError, Violation
from stretto.arguments.resolve import resolve
from stretto.arguments.show import entry
from stretto.arguments.tree import sections, settings
from stretto.cli.megatron import as_layer, print_notes
from stretto.compat.megatron import Translation, translate, words_of

USAGE_ERROR = 2


def main(argv: Sequence[str]) -> int:
    """Run `stretto convert ...`; 0, or 2 when something cannot be converted."""
    parser = ArgumentParser("stretto convert", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["args"], help="what to convert: args, the flags of a Megatron-LM script")
    parser.add_argument("script", nargs="?", type=Path, help="the script; left out: standard input")
    parser.add_argument("--out", type=Path, help="the file to write; left out: standard output")
    parser.add_argument("--partial", action="store_true", help="convert the rest where a flag is refused")
    said = parser.parse_args(argv)
    try:
        text = sys.stdin.read() if said.script is None else said.script.read_text(encoding="utf-8")
    except OSError as error:
        print(f"stretto convert: cannot read {said.script}: {error.strerror}", file=sys.stderr)
        return USAGE_ERROR
    return convert(text, said.out, partial=said.partial)


def convert(text: str, out: Path | None, *, partial: bool) -> int:
    """Write the settings that a script's flags stand for; 0, or 2 when some are refused."""
    t = translate(words_of(text))
    print_notes(t)
    problems = _violations(t)
    if problems:
        print(f"stretto convert: {ConfigError(problems)}", file=sys.stderr)
    if problems and not partial:
        return USAGE_ERROR
    if out is None:
        print(as_file(t), end="")
    else:
        out.write_text(as_file(t), encoding="utf-8")
    return USAGE_ERROR if problems else 0


def as_file(t: Translation) -> str:
    """The settings as TOML, each with the flag that it comes from."""
    lines = ["# From the flags of a Megatron-LM script."]
    for section in sections():
        said = [(s, *t.values[path]) for path, s in settings().items() if s.section == section and path in t.values]
        if said:
            lines += ["", f"[{section}]", *(f"{entry(s, value)}  # {why}" for s, value, why in said)]
    return "\n".join(lines) + "\n"


def _violations(t: Translation) -> tuple[Violation, ...]:
    """The refused flags, and what the rules have against the rest: as many processes as needed, no file looked for."""
    try:
        resolve([as_layer(t)])
    except ConfigError as error:
        return error.violations
    return ()
