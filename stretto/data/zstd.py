"""A `.zst` file as a stream that notices when it was cut short; needs the package zstandard."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, Final

from stretto.data.errors import DataError

_BLOCK: Final = 1 << 17


class ZstdFile(io.RawIOBase):
    """The content of all frames of `file`, one after the other."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError("a .zst file needs the package zstandard: pip install 'stretto[zstd]'") from None
        self._file, self._new = file, zstandard.ZstdDecompressor().decompressobj
        self._damaged: type[Exception] = zstandard.ZstdError
        self._frame: Any = None
        self._raw = self._out = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError at a frame without its end, OSError at one that is damaged."""
        while not self._out:
            self._raw = self._raw or self._file.read(_BLOCK)
            if not self._raw:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._out = self._frame.decompress(self._raw)
            except self._damaged as error:
                raise OSError(f"{error}") from error
            self._raw = b""
            if self._frame.eof:
                self._raw, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._out))
        buffer[:size], self._out = self._out[:size], self._out[size:]
        return size


def open_zstd(file: BinaryIO) -> BinaryIO:
    """The text in a file that is open."""
    return io.BufferedReader(ZstdFile(file), 1 << 17)
