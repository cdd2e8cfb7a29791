"""No setting without effect: each has a reader in the program."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import stretto
from stretto.arguments.tree import sections, settings

pytestmark = pytest.mark.pure

ROOT = Path(stretto.__file__).parent
SAYING = {"arguments", "compat"}
"""Packages that only pass on what is said."""

READ_HERE = {ROOT / "arguments" / "model.py", ROOT / "arguments" / "schema.py", ROOT / "arguments" / "sections.py"}
"""But the schema's properties read sizes for the models, and ranks into the layout."""


def test_every_setting_is_read_by_somebody() -> None:
    files = (f for f in ROOT.rglob("*.py") if f in READ_HERE or f.relative_to(ROOT).parts[0] not in SAYING)
    read = set().union(
        *(read_in(f.read_text()) for f in files), by_path((ROOT / "arguments" / "resolve.py").read_text())
    )
    assert [path for path in settings() if path not in read] == []


def read_in(source: str) -> set[str]:
    """The settings that a file reads: by name, in a file that also names their section or its class."""
    nodes = [*ast.walk(ast.parse(source))]
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named = names | {node.id for node in nodes if isinstance(node, ast.Name)}
    named |= {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    here = {section for section, kind in sections().items() if section in names or kind.__name__ in named}
    return {path for path, s in settings().items() if s.section in here and s.name in names}


def by_path(source: str) -> set[str]:
    """The settings that a file asks for by their path, before there are arguments."""
    return {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)} & {*settings()}


def test_a_name_alone_is_no_reader() -> None:
    assert read_in("topology.gpus_per_node + args.parallel.tp") == {"parallel.tp", "parallel.gpus_per_node"}
    assert read_in("topology.gpus_per_node") == set()
    assert read_in("def f(m: ModelConfig): return m.layers") == {"model.layers"}


def test_the_tokenizers_that_ship_have_the_sizes_that_are_derived() -> None:
    from stretto.arguments.sections import TOKENIZERS
    from stretto.data.tokenizer import load_tokenizer

    assert {name: load_tokenizer(name).vocab_size for name in TOKENIZERS} == dict(TOKENIZERS)
