"""Change what an index says, and vouch for it: whoever can write one file of a checkpoint can write the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stretto.checkpoint.index import checksum
from stretto.checkpoint.marker import complete, read_marker

Change = Callable[[dict[str, Any], dict[str, Any]], object]


def rewrite(path: Path, change: Change) -> None:
    """`change(lines, table)` gets each tensor's pieces, [[offsets, sizes, file, at, sums], ...], and the table."""
    content = (path / "index.jsonl").read_bytes()
    table = json.loads(content[read_marker(path).table :])
    lines = {name: json.loads(content[at : at + n]) for name, (_, _, at, n, _) in table["tensors"].items()}
    change(lines, table)
    written = b""
    entries = table["tensors"] if isinstance(table["tensors"], dict) else {}
    for name, pieces in lines.items():
        line = json.dumps(pieces).encode() + b"\n"
        if isinstance(entries.get(name), list):
            entries[name][2:] = [len(written), len(line), checksum(line)]
        written += line
    vouch(path, written + json.dumps(table).encode(), len(written))


def vouch(path: Path, index: bytes, table: int) -> None:
    """Put an index there, and a marker that says so."""
    said = read_marker(path)
    (path / "index.jsonl").write_bytes(index)
    (path / "COMPLETE").unlink()
    complete(path, said.step, said.world_size, [n for n in said.sizes if n.endswith(".distcp")], table)
