"""Where a model that was named by its owner and name lies in the cache of `huggingface_hub`. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from stretto.interop.errors import InteropError

_NAMED: Final = re.compile(r"[\w.-]+/[\w.-]+")


def located(name: str, env: Mapping[str, str] | None = None) -> Path:
    """The directory of that name, or the newest snapshot of `owner/name` in the cache. Raises InteropError."""
    directory = Path(name).expanduser()
    if directory.exists() or not _NAMED.fullmatch(name) or name.startswith("."):
        return directory
    cache = _cache(os.environ if env is None else env)
    kept = cache / f"models--{name.replace('/', '--')}"
    if not kept.is_dir():
        raise InteropError(f"{name} is no directory, and no model in {cache}: `hf download {name}` brings it there", [])
    main = kept / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else ""
    if re.fullmatch(r"\w+", commit) and (found := kept / "snapshots" / commit).is_dir():
        return found
    there = sorted((kept / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    if not there:
        raise InteropError(f"{kept} has no snapshot: `hf download {name}` brings one there", [])
    return there[-1]


def _cache(env: Mapping[str, str]) -> Path:
    """As `huggingface_hub` finds it."""
    if said := env.get("HF_HUB_CACHE"):
        return Path(said).expanduser()
    home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"
