"""Whatever is said, the answer is a run or a list of what is wrong: never another exception."""

from __future__ import annotations

import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.arguments import ConfigError, as_toml, from_dict, parse, resolve, to_dict
from stretto.arguments.command_line import flags
from stretto.arguments.files import read_config
from stretto.arguments.layers import Layer, read_layer
from stretto.arguments.record import from_the_root
from stretto.arguments.sources import COMMAND_LINE, Source, SourceKind
from stretto.arguments.tree import put, sections, settings

pytestmark = pytest.mark.pure

NUMBERS = st.integers(-(10**400), 10**400) | st.integers(-3, 70) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
ENTRIES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2)
NAMES = st.sampled_from([s.name for s in settings().values()]) | st.text(max_size=8)
TREES = st.dictionaries(
    st.sampled_from(list(sections())) | st.text(max_size=8),
    st.dictionaries(NAMES, ENTRIES, max_size=4) | ENTRIES,
    max_size=4,
)
WORDS = (
    st.sampled_from([*flags(), "--preset", "--config", "--set", "--megatron"])
    | st.sampled_from(["--no-bias", "--no-tp", "-", "--", "=", "2", "-1", "true", "auto", "1,2"])
    | st.text(max_size=6)
    | st.builds("{}={}".format, st.sampled_from([*flags(), "--set", "--set parallel.tp"]), st.text(max_size=4))
)


@given(st.lists(WORDS.filter(lambda word: word not in ("-h", "--help")), max_size=8))
def test_any_command_line_is_answered(words: list[str]) -> None:
    with suppress(ConfigError):
        assert parse(words, env={}, files=False).layout.world >= 1


@given(TREES)
def test_any_table_is_answered(tree: dict[str, object]) -> None:
    with suppress(ConfigError):
        args = from_dict(tree)
        assert from_dict(to_dict(args)) == args
    with suppress(ConfigError):
        resolve([read_layer(tree, Source(SourceKind.FILE, "x.toml"))])


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from(["toml", "yaml"]))
def test_any_file_is_answered(content: bytes, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"run.{kind}"
        file.write_bytes(content)
        layer = read_config(str(file))
    assert layer.violations or set(layer.values) <= set(settings())


NO_NUL = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(NO_NUL, NO_NUL, st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_any_text_survives_the_resolved_file(data: str, out: str, layers: list[int]) -> None:
    said = {
        "data.data": data,
        "checkpoint.out": out,
        "parallel.stage_layers": tuple(layers),
        "parallel.pp": len(layers),
        "model.layers": max(sum(layers), 1),
    }
    try:
        first = resolve([Layer(COMMAND_LINE, said)])
    except ConfigError:  # no layer at all
        assert sum(layers) == 0
        return
    again = resolve([read_layer(tomllib.loads(as_toml(first)), Source(SourceKind.FILE, "resolved.toml"))])
    assert again.args == put(first.args, "data.data", from_the_root("data.data", data))


@pytest.mark.parametrize("path", [path for path, s in settings().items() if s.kind in (int, float)])
@pytest.mark.parametrize("number", [10**15 + 37, 10**400])
def test_numbers_beyond_all_reason_are_answered_soon(path: str, number: int) -> None:
    layers = [Layer(COMMAND_LINE, {"parallel.stage_layers": (1, 2)}), read_layer(nested(path, number), COMMAND_LINE)]
    with suppress(ConfigError):
        resolve(layers)


def nested(path: str, value: object) -> dict[str, object]:
    section, _, name = path.partition(".")
    return {section: {name: value}}
