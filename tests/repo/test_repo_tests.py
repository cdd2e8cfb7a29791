"""The tests keep their own rules: each has a tier, and the quick tier never loads torch."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

TIERS = {"pure", "gloo", "gpu", "launchers"}


def test_every_test_has_a_tier(test_modules):
    """A test without a mark would run in no tier of CI."""
    offenders = [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in test_modules.items()
        if not _tiers(_module_marks(tree))
        for node in _tests(tree)
        if not _tiers(node.decorator_list)
    ]
    assert offenders == []


def test_pure_files_do_not_load_torch(test_modules):
    offenders = [
        name
        for name, tree in test_modules.items()
        if _tiers(_module_marks(tree)) == {"pure"} and "torch" in _imported(tree)
    ]
    assert offenders == []


def test_file_names_are_unique(test_modules):
    """pytest imports test files by their bare name: two of one name hide each other."""
    names = Counter(Path(name).name for name in test_modules)
    assert [name for name, times in names.items() if times > 1] == []


def test_every_package_has_tests(root, test_modules):
    """The tests of a package are named after it: tests/.../test_PACKAGE_*.py."""
    packages = {p.stem for p in (root / "stretto").iterdir() if not p.name.startswith("_") and p.suffix in {"", ".py"}}
    packages -= {"world", "batch"}  # two files of plain values
    files = [Path(name).name for name in test_modules]
    assert [
        package for package in sorted(packages) if not any(file.startswith(f"test_{package}_") for file in files)
    ] == []


def test_tests_that_go_together_do(request):
    """Catches a pytest and an xdist of which one does not hear of the other's groups: two worlds of eight then run side
    by side, and what a file's tests share is made twice.
    """
    grouped = request.config.getoption("loadgroup", False)  # of a worker of `--dist loadgroup`
    assert request.node.nodeid.endswith("@tests/repo/test_repo_tests.py") == grouped


def _tests(tree: ast.Module) -> list[ast.FunctionDef]:
    classes = [c for c in tree.body if isinstance(c, ast.ClassDef) and c.name.startswith("Test")]
    bodies = [tree.body] + [c.body for c in classes if not _tiers(c.decorator_list)]
    return [n for body in bodies for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


def _module_marks(tree: ast.Module) -> list[ast.expr]:
    return [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]


def _tiers(marks: list[ast.expr]) -> set[str]:
    """Tiers named as `pytest.mark.TIER` anywhere in the expressions."""
    nodes = [n for mark in marks for n in ast.walk(mark)]
    return {n.attr for n in nodes if isinstance(n, ast.Attribute)} & TIERS


def _imported(tree: ast.Module) -> set[str]:
    plain = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return plain | {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
