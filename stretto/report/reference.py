"""The reference page and the JSON schema, from the same tables that the program runs on.

python -m stretto.report.reference docs/reference
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stretto.arguments.command_line import MEGATRON, Sources
from stretto.arguments.derive import DERIVATIONS, OVERRIDES
from stretto.arguments.files import preset_text, presets
from stretto.arguments.help import FOREIGN, default
from stretto.arguments.setting import Setting, settings_in
from stretto.arguments.tree import by_section
from stretto.arguments.validate import RULES

_PAGE = "arguments.md"
_SCHEMA = "arguments.schema.json"
_INTRODUCTION = """\
# Settings

Made by `python -m stretto.report.reference docs/reference`; do not edit.

A setting has a path, `parallel.tp`: its section and name in a file. Its flag is the name: `--tp`. The stronger source
wins: command line > `WORLD_SIZE` of a launcher (for `run.nproc`) > file > checkpoint > preset > default. Where neither
preset nor file is named, the commands start from the preset `demo` and say so; `stretto.arguments.parse` starts from
the defaults. A switch is turned off with `--no-NAME`; `auto` asks for the
derived value. `arguments.schema.json` beside this page describes settings files to editors.
"""
_CONCESSIONS = """
## Settings that give way

Where a stronger source sets the second so that the first does not go with it, the first is adjusted, and the resolved
configuration says so. Set by a source of the same strength, it is rejected.
"""
_RULES = """
## Rules

All broken rules are reported at once, each with settings nearby that would be valid.
"""
_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
_JSON_LIMITS = {
    "above": "exclusiveMinimum",
    "at_least": "minimum",
    "below": "exclusiveMaximum",
    "at_most": "maximum",
}


def page() -> str:
    """All settings, derived values and rules, as Markdown."""
    return "\n".join(_page()) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a settings file, for editors."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Stretto settings"}
    tables = {
        name: {"type": "object", "description": about, **_closed({s.name: _schema(s) for s in of_it})}
        for name, about, of_it in by_section()
    }
    return {**draft, "type": "object", **_closed(tables)}


def _closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    """These keys and no others."""
    return {"additionalProperties": False, "properties": properties}


def documents() -> Mapping[str, str]:
    """The text of each generated file, by its name."""
    return {_PAGE: page(), _SCHEMA: json.dumps(json_schema(), indent=2) + "\n"}


def _schema(s: Setting) -> dict[str, Any]:
    value: dict[str, Any] = {"anyOf": [_typed(s), {"const": "auto"}]} if s.optional else _typed(s)
    about = f"{s.help}; default {default(s)}"
    return {"description": f"{about} ({s.unit})" if s.unit else about, **value}


def _typed(s: Setting) -> dict[str, Any]:
    limits = {_JSON_LIMITS[name]: bound for name, bound in s.bounds.given().items()}
    if s.kind is dict:
        return {"type": "object", **_closed({name: {"type": "integer", **limits} for name in s.choices})}
    plain = s.entry if s.kind is tuple else s.kind
    word = {"enum": list(s.choices)} if s.choices else {"type": _JSON_TYPES[plain], **limits}
    return {"type": "array", "items": word} if s.kind is tuple else word


def _page() -> Iterator[str]:
    yield _INTRODUCTION
    sources = [*((f"`{s.flag} {s.takes}`", s.help) for s in settings_in(Sources)), (f"`{MEGATRON} FLAGS...`", FOREIGN)]
    yield from _table(("flag", "meaning"), iter(sources))
    for name, about, of_it in by_section():
        yield from ("", f"## {name}", "", about, "")
        rows = ((_code(s.flag), s.takes or "switch", default(s), s.unit, str(s.bounds), s.help) for s in of_it)
        yield from _table(("flag", "takes", "default", "unit", "range", "meaning"), rows)
    yield from ("", "## Derived values", "", "What nobody sets follows from the rest.", "")
    yield from _table(("setting", "equation"), ((_code(d.path), d.meaning) for d in DERIVATIONS))
    yield _CONCESSIONS
    yield from _table(("setting", "gives way to"), ((_code(c.path), _code(*c.inputs)) for c in OVERRIDES))
    yield _RULES
    yield from _table(("rule", "settings", "meaning"), ((_code(r.name), _code(*r.fields), r.meaning) for r in RULES))
    yield from ("", "## Presets", "")
    yield from _table(("preset", "what it is"), ((_code(name), _about(name)) for name in presets()))


def _code(*words: str) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _about(preset: str) -> str:
    """The comment that a preset begins with."""
    return preset_text(preset).splitlines()[0].removeprefix("# ")


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


if __name__ == "__main__":
    for file, text in documents().items():
        (Path(sys.argv[1]) / file).write_text(text, encoding="utf-8")
