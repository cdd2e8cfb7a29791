"""What is generated from the schema is current and says what the program does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stretto.arguments import parse
from stretto.arguments.form import RUN, Form
from stretto.arguments.help import help_text
from stretto.arguments.tree import settings
from stretto.report.reference import documents, json_schema

pytestmark = pytest.mark.pure

DOCS = Path(__file__).parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", documents())
def test_generated_documents_are_current(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == documents()[name], "run: python -m stretto.report.reference docs/reference"


def test_help_names_every_flag_once_and_fits_the_width() -> None:
    text = help_text(RUN, 80)
    said = re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE)
    assert said[:4] == ["--preset", "--config", "--set", "--megatron"]
    assert said[4:] == [s.flag for s in settings().values()]
    assert max(map(len, text.splitlines())) <= 80


def test_asking_for_help_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--tp", "2", "--help"], env={}, form=Form("stretto explain", settings=True))
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: stretto explain [settings]")


def test_json_schema_has_every_setting_and_no_room_for_others() -> None:
    tables = json_schema()["properties"]
    assert [f"{section}.{name}" for section, t in tables.items() for name in t["properties"]] == list(settings())
    assert all(t["additionalProperties"] is False for t in tables.values())
    assert tables["parallel"]["properties"]["dp"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 2**20}
