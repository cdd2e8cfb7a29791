"""Tables of texts: `.parquet`, and the `.arrow` files of Hugging Face `datasets`; needs the package pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Final

from stretto.data.errors import DataError

SUFFIXES: Final = frozenset({".parquet", ".arrow"})

_ROWS: Final = 1024
"""Rows in memory at a time."""


def rows(path: Path, file: BinaryIO, key: str, groups: tuple[int, int | None]) -> Iterator[Any]:
    """What stands in the column `key`, row by row; of a parquet file in its row groups `groups[0]`..`groups[1]`.

    Raises DataError when the file cannot be read or has no such column.
    """
    pyarrow = _pyarrow(path)
    try:
        for batch in _batches(path, file, key, groups):
            if key not in batch.schema.names:
                raise DataError(f"{path} has no column {key}, only {batch.schema.names[:20]}; --text-key names another")
            yield from batch.column(key).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; it is damaged, or no {path.suffix} file") from error


def row_groups(path: Path, file: BinaryIO) -> list[tuple[int, int]]:
    """Rows and bytes of each row group of a parquet file. Raises DataError when it cannot be read."""
    pyarrow = _pyarrow(path)
    try:
        found = import_module("pyarrow.parquet").ParquetFile(file).metadata
        groups = [found.row_group(i) for i in range(found.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {path}: {error}; it is damaged, or no parquet file") from error


def _batches(path: Path, file: BinaryIO, key: str, groups: tuple[int, int | None]) -> Iterator[Any]:
    if path.suffix.lower() == ".parquet":
        table = import_module("pyarrow.parquet").ParquetFile(file)
        if key not in table.schema_arrow.names:
            raise DataError(
                f"{path} has no column {key}, only {table.schema_arrow.names[:20]}; --text-key names another"
            )
        chosen = range(groups[0], table.num_row_groups if groups[1] is None else groups[1])
        return iter(table.iter_batches(_ROWS, row_groups=list(chosen), columns=[key]))
    ipc = import_module("pyarrow.ipc")
    if file.read(6) == b"ARROW1":  # with an index at its end; `datasets` writes them without
        table = ipc.open_file(file)
        return (table.get_batch(i) for i in range(table.num_record_batches))
    file.seek(0)
    return iter(ipc.open_stream(file))


def _pyarrow(path: Path) -> Any:
    try:
        return import_module("pyarrow")
    except ImportError:
        raise DataError(
            f"{path}: a {path.suffix} file needs the package pyarrow: pip install 'stretto[parquet]'"
        ) from None
