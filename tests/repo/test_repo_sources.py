"""Rules over the library's own source text. Each test lists every offender with its line."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.pure

MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "ChainMap"}
MAKERS |= {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "local", "count", "cycle", "iter"}
MUTATORS = {
    "append",
    "extend",
    "insert",
    "remove",
    "pop",
    "popitem",
    "clear",
    "sort",
    "reverse",
    "add",
    "discard",
}
MUTATORS |= {"update", "setdefault", "appendleft", "extendleft", "popleft", "rotate"}
CACHES = {"cache", "lru_cache"}
PURE = ("stretto/arguments/", "stretto/estimate/", "stretto/layout", "stretto/schedule/")


def test_every_file_says_what_it_is(library):
    assert [name for name, tree in library.items() if not ast.get_docstring(tree)] == []


def test_every_directory_is_a_package(library):
    """Without its __init__ a directory imports all the same, but the import contract does not see into it."""
    directories = {name.rpartition("/")[0] for name in library}
    assert sorted(d for d in directories if f"{d}/__init__.py" not in library) == []


def test_every_file_can_be_read_in_one_sitting(library, texts):
    assert {n: lines for n in library if (lines := texts[n].count("\n")) >= 300} == {}


def test_no_state_is_changed_through_global(library):
    statements = ((n, node) for n, tree in library.items() for node in ast.walk(tree))
    assert [f"{n}:{s.lineno}" for n, s in statements if isinstance(s, ast.Global)] == []


def test_no_module_holds_a_mutable_container(library):
    """Catches `_groups = {}` at the top of a file: state that two layouts in one process would share."""
    offenders = [
        f"{name}:{line} {target}"
        for name, tree in library.items()
        for target, value, line in _module_assignments(tree)
        if _is_mutable(value) and not target.isupper() and not _is_dunder(target)
    ]
    assert offenders == []


def test_no_constant_is_changed(library):
    """A table named like a constant is one: nothing adds to it or replaces a part of it."""
    offenders = [
        f"{name}:{line} {target}"
        for name, tree in library.items()
        for target, line in _mutations(tree)
        if target.isupper()
    ]
    assert offenders == []


def test_caches_only_where_all_is_integers(library):
    """A cache above the torch line would be module-level state that keeps groups and tensors alive."""
    offenders = [
        f"{name}:{node.lineno}"
        for name, tree in library.items()
        if not name.startswith(PURE)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(_last_name(d.func if isinstance(d, ast.Call) else d) in CACHES for d in node.decorator_list)
    ]
    assert offenders == []


def test_no_check_is_an_assertion(library):
    """`python -O` removes assertions. Allowed is what tells the type checker only: not None, isinstance."""
    statements = ((n, node) for n, tree in library.items() for node in ast.walk(tree))
    offenders = [
        f"{name}:{s.lineno} {ast.unparse(s.test)}"
        for name, s in statements
        if isinstance(s, ast.Assert) and not _narrows(s.test)
    ]
    assert offenders == []


def _module_assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr, int]]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from ((t.id, node.value, node.lineno) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value, node.lineno


def _is_mutable(value: ast.expr) -> bool:
    return isinstance(value, MUTABLE) or (isinstance(value, ast.Call) and _last_name(value.func) in MAKERS)


def _mutations(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """`X[i] = ..`, `del X[i]`, `X[i] += ..`, `X += ..` and `X.append(..)` with X a plain name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            yield _last_name(node.value), node.lineno
        elif isinstance(node, ast.AugAssign):
            yield _last_name(node.target), node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            yield _last_name(node.func.value), node.lineno


def _narrows(test: ast.expr) -> bool:
    is_not_none = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)
    is_instance = isinstance(test, ast.Call) and _last_name(test.func) == "isinstance"
    return is_not_none or is_instance


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def test_nothing_prints_past_the_one_place(library):
    """Catches a `print` or a console of rich's own, past which foreign text would steer a terminal."""
    allowed = {"stretto/terminal.py": "print", "stretto/console.py": "Console"}
    offenders = [
        f"{name}:{node.lineno} {node.func.id}"
        for name, tree in library.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console")
        if allowed.get(name) != node.func.id
    ]
    assert offenders == []
