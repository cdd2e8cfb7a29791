"""Rules about files: apart from the others, since they look at this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final

from stretto.arguments.errors import Violation
from stretto.arguments.schema import Arguments
from stretto.arguments.sections import TOKENIZERS
from stretto.arguments.tree import get, settings
from stretto.notation.corpora import named, paths_in, shares, there
from stretto.reading import shown

SHIPPED: Final = Path(__file__).parents[1] / "data" / "tokenizers"
"""Each tokenizer of `TOKENIZERS`, a directory as Hugging Face has them."""
_PACKAGES: Final = MappingProxyType({"run.tensorboard": "tensorboard", "run.wandb": "wandb", "run.mlflow": "mlflow"})
"""Extras of the same name that a setting asks for."""


def check_paths(args: Arguments) -> tuple[Violation, ...]:
    """What is wrong with the files, directories and packages that the arguments name."""
    said = {path: get(args, path) for path, s in settings().items() if s.is_path}
    named_by = (
        (path, name) for path, value in said.items() if isinstance(value, str) for name in paths_in(path, value)
    )
    if long := [v for path, name in named_by for v in _no_name(path, name)]:
        return tuple(long)
    written = ["checkpoint.out", "data.cache", "run.log_dir"]
    if "://" not in str(said["checkpoint.checkpoint_dir"]):  # not an object store
        written.append("checkpoint.checkpoint_dir")
    packages = (v for path, package in _PACKAGES.items() if get(args, path) for v in _package(path, package))
    directories = (v for path in written if said[path] is not None for v in _directory(path, str(said[path])))
    return (*_data(args), *_tokenizer(args), *directories, *packages)


def _no_name(field: str, name: str) -> Iterator[Violation]:
    """A path that the system cannot even look for: a name that is too long, or links that go round."""
    try:
        Path(name).expanduser().exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such user, or no home
        why = getattr(error, "strerror", None) or str(error)
        yield Violation("path", (field,), f"{field}: {shown(name)}: {why}", hint="name another one")


def _data(args: Arguments) -> Iterator[Violation]:
    try:
        for share in shares(args.data.data) if args.data.data is not None else ():
            yield from _text("data.data", share.path)
    except ValueError as error:
        yield Violation("data_is_named", ("data.data",), f"{error}", hint="as in code/:0.7,text.jsonl:0.3")
    try:
        for _, path in named(args.data.eval_data):
            yield from _text("data.eval_data", path)
    except ValueError as error:
        yield Violation("eval_data_is_named", ("data.eval_data",), f"{error}", hint="as in wiki=wiki.jsonl,code=code/")


def _text(field: str, name: str) -> Iterator[Violation]:
    path = Path(name).expanduser()
    if not path.exists():
        if there(name):
            return
        problem = f"{path} does not exist"
    elif not path.is_dir() and not path.is_file():
        problem = f"{path} is a pipe, socket or device"
    elif path.is_dir() and not any(files for _, _, files in os.walk(path)):
        problem = f"{path} has no files"
    elif path.is_file() and path.stat().st_size == 0:
        problem = f"{path} is empty"
    elif not os.access(path, os.R_OK):
        problem = f"{path} may not be read"
    else:
        return
    hint = "name a directory of text files or a .jsonl, or leave --data out for the standard library's sources"
    yield Violation("data_exists", (field,), problem, hint=hint)


def _tokenizer(args: Arguments) -> Iterator[Violation]:
    name = args.data.tokenizer
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if name not in TOKENIZERS and not path.is_file():
        yield Violation(
            "tokenizer_exists",
            ("data.tokenizer",),
            f"there is no file {path}",
            fixes=({"data.tokenizer": "byte"},),
            hint="or python, or name a tokenizer.json, or a directory that has one",
        )


def _package(field: str, package: str) -> Iterator[Violation]:
    if find_spec(package) is None:
        problem = f"{field} needs the package {package}, which is not installed here"
        yield Violation("package", (field,), problem, hint=f"pip install 'stretto[{package}]', or leave it out")


def _directory(field: str, name: str) -> Iterator[Violation]:
    """A directory that the run will make: the nearest part of it that exists must take it."""
    path = Path(name).expanduser()
    existing = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        yield Violation("directory", (field,), f"{name}: {existing} is no directory", hint="name another directory")
    elif not os.access(existing, os.W_OK):
        yield Violation("directory", (field,), f"{name}: {existing} may not be written", hint="name another directory")
