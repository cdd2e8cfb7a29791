"""A corpus: named documents, and which of them are held out.

What may be a corpus: nothing at all (the source files of the running Python's standard library, which
every machine has), a directory of text and `.jsonl` files, or one `.jsonl` file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stretto.data.errors import DataError

_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_GENERATED = {"encodings", "pydoc_data"}
"""Tables that programs wrote: a fifth of the bytes, and nothing that a model could learn to write."""


@dataclass(frozen=True)
class Document:
    """One text and its name: the file's path below the root, `:line` appended for a line of a `.jsonl`."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """The files below `root` (relative, with `/`, sorted) that hold the documents. Nothing is read yet."""

    label: str
    root: Path
    files: tuple[str, ...]

    @classmethod
    def open(cls, data: str | Path | None) -> Corpus:
        """The corpus that `data` names: None, a directory, or a `.jsonl` file.

        Raises DataError when there is no such path, or no file in it.
        """
        if data is None:
            return _standard_library()
        path = Path(data).expanduser()
        if path.is_dir():
            return _directory(path)
        if not path.exists():
            raise DataError(f"data.data={str(data)!r} does not exist (looked at {path.absolute()})")
        if path.suffix != ".jsonl":
            raise DataError(
                f"data.data={str(data)!r} is a single file and no .jsonl, so no document could be held out; "
                "name the directory it lies in, or give one JSON object with a text on each line of a .jsonl"
            )
        return cls(path.stem, path.parent, (path.name,))

    def documents(self) -> Iterator[Document]:
        """All documents with a text, in the order of `files`; see `read`."""
        for file in self.files:
            yield from self.read(file)

    def read(self, file: str) -> Iterator[Document]:
        """The documents of one file: its lines for a `.jsonl`, else its text; none when it is not UTF-8 text.

        Raises DataError when the file cannot be read, or a line of a `.jsonl` has no text.
        """
        try:
            if file.endswith(".jsonl"):
                yield from _lines(self.root / file, file)
            elif text := _text(self.root / file):
                yield Document(file, text)
        except OSError as error:
            raise DataError(f"cannot read {self.root / file}: {error.strerror}") from error

    def fingerprint(self) -> str:
        """A hash of the names, sizes and modification times of all files; finds a change without reading."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            try:
                stat = (self.root / file).stat()
            except OSError as error:
                raise DataError(f"cannot read {self.root / file}: {error.strerror}") from error
            digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def position(name: str) -> float:
    """Where in [0, 1) a document's name falls: held out when below the fraction asked for.

    A function of the name alone, so that a document keeps its side when others come or go.
    """
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(
        name
        for name in _walk(root, skip=_NOT_SOURCE | _GENERATED)
        if name.endswith(".py") and os.access(root / name, os.R_OK)
    )
    if not files:
        raise DataError(f"this Python has no source files in {root}; name a directory of text with data.data")
    return Corpus(f"python-{platform.python_version()}", root, files)


def _directory(root: Path) -> Corpus:
    files = tuple(_walk(root, skip=set()))
    if not files:
        raise DataError(f"data.data={str(root)!r} has no files (hidden ones do not count)")
    return Corpus(root.resolve().name or "root", root, files)


def _walk(root: Path, skip: set[str]) -> list[str]:
    """Relative names of the files below `root`, sorted; neither hidden ones nor directories in `skip`."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in skip]
        names += [(Path(folder) / f).relative_to(root).as_posix() for f in files if not f.startswith(".")]
    return sorted(names)


def _text(path: Path) -> str:
    """The text of a file, line ends as they are; empty when it is binary (a NUL byte) or not UTF-8."""
    raw = path.read_bytes()
    if b"\0" in raw:
        return ""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _lines(path: Path, name: str) -> Iterator[Document]:
    """One document for each line of a `.jsonl`; blank lines and empty texts are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and (text := _text_field(line, f"{path}, line {number}")):
                yield Document(f"{name}:{number}", text)


def _text_field(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise DataError(f"{where}: not JSON ({error}); each line must be an object with a text field") from None
    if not isinstance(record, dict):
        raise DataError(f'{where}: a JSON {type(record).__name__}, but each line must be {{"text": "..."}}')
    text = record.get("text")
    if not isinstance(text, str):
        found = f"text is a {type(text).__name__}" if "text" in record else f"has only {sorted(record)}"
        raise DataError(f"{where}: no text field with a string ({found})")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: text is not valid Unicode (half a surrogate pair at {error.start})") from None
    return text
