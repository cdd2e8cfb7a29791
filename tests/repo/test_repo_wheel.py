"""What is installed is what is here: a wheel without its presets would train only in a checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import pytest


@pytest.mark.gloo
def test_the_wheel_holds_every_file_of_the_library(root, tmp_path):
    """Catches a preset, a marker file or a package that the build leaves out. Built in a copy, offline."""
    source = tmp_path / "source"
    shutil.copytree(root / "stretto", source / "stretto", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    library = {str(path.relative_to(source)) for path in (source / "stretto").rglob("*") if path.is_file()}

    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    done = subprocess.run([sys.executable, *build, tmp_path, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    (wheel,) = tmp_path.glob("stretto-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == library
