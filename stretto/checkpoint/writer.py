"""Write pieces with torch.distributed.checkpoint, and beside each file the checksums of its pieces.

torch.load does not look at the checksums inside its files, so weights with a flipped bit would load in silence.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from stretto.checkpoint.marker import write_atomically

CHECKSUMS = ".crc32"
"""`__0_0.distcp.crc32`: JSON, offset of each piece in `__0_0.distcp` -> CRC-32 of its bytes."""


class CheckedWriter(FileSystemWriter):
    """DCP's file writer; reads its files back, mostly from the page cache, to sum them up."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces, then the checksum of each."""
        written = super().write_data(plan, planner)
        sums: dict[str, dict[int, int]] = {}
        for result in written.wait():
            info = result.storage_data
            with (Path(self.path) / info.relative_path).open("rb") as stream:
                stream.seek(info.offset)
                sums.setdefault(info.relative_path, {})[info.offset] = zlib.crc32(stream.read(info.length))
        for name, of_pieces in sums.items():
            write_atomically(Path(self.path) / (name + CHECKSUMS), json.dumps(of_pieces).encode())
        return written
