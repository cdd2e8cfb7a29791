"""What is installed is declared, what is declared is justified, and nothing else is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest

OPTIONAL = {
    "stretto/kernels/": "triton",
    "stretto/schedule/exact.py": "ortools",
    "stretto/layout/picture.py": "PIL",
    "stretto/data/zstd.py": "zstandard",
    "stretto/data/sentence_piece.py": "sentencepiece",
    "stretto/data/tekken.py": "tiktoken",
    "stretto/data/tiktoken_file.py": "tiktoken",
}
"""What torch for GPUs brings and torch for CPUs does not, and what an extra brings: where each may be imported."""


def _package(requirement: str) -> str:
    """`PyYAML>=6.0; python_version < "4"` -> `pyyaml`."""
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


@pytest.mark.pure
@pytest.mark.parametrize(
    "section",
    ["To run", "To develop", "To build the documentation", "To build", "Optional, probed, never required"],
)
def test_each_dependency_is_justified_and_no_other(section, pyproject, texts):
    extras = pyproject["project"]["optional-dependencies"]
    declared = {
        "To run": pyproject["project"]["dependencies"],
        "To develop": extras["dev"],
        "To build the documentation": extras["docs"],
        "To build": pyproject["build-system"]["requires"],
        "Optional, probed, never required": [r for name, e in extras.items() if name not in ("dev", "docs") for r in e],
    }
    text = texts["docs/dependencies.md"].split(f"## {section}\n")[1].split("\n## ")[0]
    justified = [name.lower() for name in re.findall(r"^\| `([^`]+)` \| .{10,}\|$", text, re.MULTILINE)]
    assert sorted(justified) == sorted(map(_package, declared[section]))


@pytest.mark.pure
def test_every_pin_is_of_a_declared_dependency(pyproject, texts):
    pins = [_package(line) for line in texts["constraints.txt"].splitlines() if line and not line.startswith("#")]
    project = pyproject["project"]
    assert set(pins) <= set(map(_package, [*project["dependencies"], *project["optional-dependencies"]["dev"]]))


@pytest.mark.pure
def test_the_library_imports_only_what_the_base_install_brings(pyproject, library):
    """Catches an import of numpy's or rich's own dependencies, or of a development tool, in a module."""
    distributions = packages_distributions()
    declared = set(map(_package, pyproject["project"]["dependencies"]))
    offenders = [
        f"{name}:{line} {module}"
        for name, tree in library.items()
        for module, line in _imports(tree)
        if module not in sys.stdlib_module_names
        and module != "stretto"
        and not any(name.startswith(package) and module == brought for package, brought in OPTIONAL.items())
        and not declared & set(map(_package, distributions.get(module, [])))
    ]
    assert offenders == []


@pytest.mark.pure
def test_what_is_declared_is_imported(pyproject, library):
    """Catches a dependency that outlived its reason."""
    distributions = packages_distributions()
    names = {module for tree in library.values() for module, _ in _imports(tree)}
    imported = {_package(d) for name in names for d in distributions.get(name, [])}
    assert set(map(_package, pyproject["project"]["dependencies"])) - imported == set()


@pytest.mark.pure
def test_the_plan_imports_without_torch():
    _run_python("""
        import sys
        sys.modules["torch"] = None  # any import of it now raises
        import stretto.arguments, stretto.estimate, stretto.layout, stretto.schedule
    """)


@pytest.mark.gloo
def test_every_module_imports_with_the_base_install_alone(pyproject):
    """Every module, in one process that rejects the development tools and the usual optional accelerators.

    Kernels need Triton; the package that has them does not, nor what chooses one.
    """
    tools = {_package(r).replace("-", "_") for r in pyproject["project"]["optional-dependencies"]["dev"]}
    missing = sorted(tools | {"flash_attn", "triton", "apex", "transformer_engine", "deepspeed", "megatron"})
    _run_python(f"""
        import importlib, pkgutil, sys, stretto
        sys.modules.update(dict.fromkeys({missing}))
        for module in pkgutil.walk_packages(stretto.__path__, "stretto."):
            kernel = module.name.startswith("stretto.kernels.") and not module.name.endswith("hand_written")
            if not kernel and not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    """)


def _imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], node.lineno


def _run_python(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
