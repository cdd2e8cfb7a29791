"""The repository as data: its files, its modules as syntax trees, its metadata."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("stretto", "tests", "docs", "benchmarks", "examples", ".ci", ".github")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """Every text file that belongs to the repository, by its path from the root."""
    below = (path for part in PARTS for path in (ROOT / part).rglob("*"))
    hidden = (ROOT / ".pre-commit-config.yaml", ROOT / ".gitignore")
    files = [p for p in (*below, *ROOT.glob("[!.]*"), *hidden) if p.is_file() and "__pycache__" not in p.parts]
    suffixes = {"", ".py", ".pyi", ".md", ".toml", ".txt", ".yml", ".yaml"}
    return {str(p.relative_to(ROOT)): p.read_text() for p in sorted(files) if p.suffix in suffixes}


@pytest.fixture(scope="session")
def library(texts: dict[str, str]) -> dict[str, ast.Module]:
    """The modules of the library as syntax trees."""
    return {name: ast.parse(text, name) for name, text in texts.items() if _is_python(name, "stretto")}


@pytest.fixture(scope="session")
def test_modules(texts: dict[str, str]) -> dict[str, ast.Module]:
    """The test files as syntax trees, helpers left out."""
    names = [name for name in texts if _is_python(name, "tests") and Path(name).name.startswith("test_")]
    return {name: ast.parse(texts[name], name) for name in names}


def _is_python(name: str, part: str) -> bool:
    return name.startswith(f"{part}/") and name.endswith(".py")
