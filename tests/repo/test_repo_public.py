"""The public names: complete, loaded when they are used, and each with its page in the reference."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import stretto


@pytest.mark.pure
def test_importing_it_loads_next_to_nothing():
    """Catches an import that makes every command wait for torch."""
    program = "import sys, stretto; print(sorted({'torch', 'numpy', 'rich', 'shtab'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.gloo
def test_every_public_name_is_there_and_says_what_it_is():
    import stretto.initialize  # whose name is that of its function

    for name in stretto.PUBLIC:
        assert (getattr(stretto, name).__doc__ or "").strip(), name
    assert callable(stretto.initialize)
    with pytest.raises(AttributeError, match="no attribute 'Traner'"):
        stretto.Traner  # noqa: B018


@pytest.mark.pure
def test_the_type_checker_sees_the_same_names(texts):
    """Catches a name that is loaded and not declared, or the other way round."""
    known = set(re.findall(r"^from stretto.* import \w+ as (\w+)$", texts["stretto/__init__.pyi"], re.MULTILINE))
    assert known == set(stretto.PUBLIC)


@pytest.mark.pure
def test_the_reference_has_every_public_name(texts):
    """The site is generated from this page: a name that is not on it has no documentation, and one that is not where
    the page says stops the build.
    """
    said = re.findall(r"^::: ([\w.]+)$", texts["docs/reference/api.md"], re.MULTILINE)
    assert sorted(said) == sorted(map(_path, stretto.PUBLIC))


def _path(name: str) -> str:
    module, _, known_as = stretto.PUBLIC[name].partition(":")
    return ".".join(filter(None, ("stretto", module, known_as or name)))
