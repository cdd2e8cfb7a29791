"""A corpus: named documents, and which of them are held out.

What may be a corpus: nothing at all (the source files of the running Python's standard library, which
every machine has), a directory of text and JSON lines, or one such file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stretto.data.errors import DataError
from stretto.data.files import PassedOver, walk
from stretto.data.formats import Document, Piece, read

_NOT_SOURCE = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_GENERATED = frozenset({"encodings", "pydoc_data"})
"""Tables that programs wrote: a fifth of the bytes, and nothing that a model could learn to write."""

_OF_TABLES = frozenset({"dataset_info.json", "state.json", "dataset_dict.json"})
"""What the package `datasets` writes beside its tables."""


@dataclass(frozen=True)
class Corpus:
    """The files below `root` (relative, with `/`, sorted) that hold the documents. Nothing is read yet."""

    label: str
    root: Path
    files: tuple[str, ...]
    passed: PassedOver = field(default=PassedOver({}))
    """What lies beside them and is not to be opened. What is no text is found only when it is read."""
    text_key: str = "text"
    """The field of a JSON line that holds its text."""
    whole: bool = True
    """All that is below `root`, and not one file of it that was named."""

    @classmethod
    def open(cls, data: str | Path | None, text_key: str = "text") -> Corpus:
        """The corpus that `data` names: None, a directory, or a file.

        Raises DataError when there is no such path, or no file in it.
        """
        if data is None:
            return _standard_library()
        path = Path(data).expanduser()
        if path.is_dir():
            return _directory(path, text_key)
        if not path.exists():
            raise DataError(f"--data {str(data)!r} does not exist (looked at {path.absolute()})")
        if not path.is_file():
            raise DataError(f"--data {str(data)!r} is a pipe, socket or device; write its text to a file first")
        return cls(path.name.split(".")[0] or "file", path.parent, (path.name,), text_key=text_key, whole=False)

    @property
    def place(self) -> Path:
        """The directory or file that the user named."""
        return self.root if self.whole else self.root / self.files[0]

    def documents(self) -> Iterator[Document]:
        """All documents with a text, in the order of `files`."""
        for file in self.files:
            yield from read(self.root, Piece(file), self.text_key)

    def fingerprint(self) -> str:
        """A hash of the names, sizes and modification times of all files; finds a change without reading."""
        digest = hashlib.blake2b(self.text_key.encode(), digest_size=16)
        for file in self.files:
            stat = self.stat(file)
            digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def stat(self, file: str) -> os.stat_result:
        """Of one of `files`. Raises DataError when it is gone."""
        try:
            return (self.root / file).stat()
        except OSError as error:
            raise DataError(f"cannot read {self.root / file}: {error.strerror}") from error


def position(name: str) -> float:
    """Where in [0, 1) a document's name falls: held out when below the fraction asked for.

    A function of the name alone, so that a document keeps its side when others come or go.
    """
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    found, _ = walk(root, skip=_NOT_SOURCE | _GENERATED)
    files = tuple(name for name in found if name.endswith(".py") and os.access(root / name, os.R_OK))
    if not files:
        raise DataError(f"this Python has no source files in {root}; name a directory of text with data.data")
    return Corpus(f"python-{platform.python_version()}", root, files)


def _directory(root: Path, text_key: str) -> Corpus:
    found, passed = walk(root)
    tables = any(name.endswith(".arrow") for name in found)
    files = [name for name in found if not (tables and name.rpartition("/")[2] in _OF_TABLES)]
    kept = set(files)
    passed += PassedOver.of(("description of a dataset", name) for name in found if name not in kept)
    if not files:
        beside = f"; passed over: {passed}" if passed.total else ""
        raise DataError(f"--data {str(root)!r} has no files (hidden ones do not count){beside}")
    return Corpus(root.resolve().name or "root", root, tuple(files), passed, text_key)
