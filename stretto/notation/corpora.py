"""Several corpora in one text, `code/:0.7,text.jsonl:0.3`, as `data.data` has them, and named ones of `eval_data`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Final

LONGEST_PERIOD: Final = 100_000
"""A mix repeats after as many samples as it takes for all shares to be whole."""

_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d+)?|\.\d+)")
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,59})=(?P<path>.+)")
_TAKEN: Final = frozenset({"held_out", "train"})


@dataclass(frozen=True)
class Share:
    """A path, and the share of the samples that come from it; None: as its size has it."""

    path: str
    weight: Fraction | None


def there(path: str) -> bool:
    """Whether something lies at `path`: a file, a directory, or the two files of tokens that begin so."""
    try:
        where = Path(path).expanduser()
        return where.exists() or all(Path(f"{where}{end}").exists() for end in (".bin", ".idx"))
    except (OSError, RuntimeError):  # a name that is too long, a user that there is not
        return False


def shares(data: str, exists: Callable[[str], bool] = there) -> tuple[Share, ...]:
    """The corpora that `data` names, with shares that sum to 1. What exists under the whole name is one corpus.

    Raises ValueError.
    """
    if exists(data):
        return (Share(data, None),)
    found = []
    for word in data.split(","):
        match = None if exists(word) else _WEIGHTED.fullmatch(word)
        found.append(Share(match["path"], Fraction(match["weight"])) if match else Share(word, None))
    _check(found)
    if len(found) == 1:  # a share of one is all of it
        return (Share(found[0].path, None),)
    if found[0].weight is None:
        return tuple(found)
    whole = sum(share.weight or Fraction(0) for share in found)
    mixed = tuple(Share(share.path, (share.weight or Fraction(0)) / whole) for share in found)
    if (after := period([share.weight for share in mixed if share.weight])) > LONGEST_PERIOD:
        raise ValueError(
            f"these weights are whole numbers of samples only after {after:,}, must be at most {LONGEST_PERIOD:,}; "
            "write them with fewer digits"
        )
    return mixed


def period(weights: Sequence[Fraction]) -> int:
    """Samples after which all shares are whole."""
    return lcm(*(weight.denominator for weight in weights))


def named(sets: str | None) -> tuple[tuple[str, str], ...]:
    """Name and path of each validation set, `name=path`. Raises ValueError."""
    found = []
    for word in sets.split(",") if sets is not None else ():
        match = _NAMED.fullmatch(word)
        if match is None or match["name"] in _TAKEN:
            raise ValueError(
                f"{word!r} is no name=path, with a name of letters, digits, _, . or -, other than held_out"
            )
        found.append((match["name"], match["path"]))
    if twice := [name for name, count in Counter(name for name, _ in found).items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} named twice")
    return tuple(found)


def paths_in(setting: str, value: str) -> tuple[str, ...]:
    """The paths in the value of a setting that names some; the value itself where it cannot be read."""
    try:
        if setting == "data.data":
            return tuple(share.path for share in shares(value))
        if setting == "data.eval_data":
            return tuple(path for _, path in named(value))
    except ValueError:
        pass
    return (value,)


def with_paths(setting: str, value: str, change: Callable[[str], str]) -> str:
    """The value of a setting that names paths, each of them changed; shares and names stay as they are written."""
    paths = paths_in(setting, value)
    if paths == (value,):
        return change(value)
    changed = [change(path) for path in paths]
    if any("," in path for path in changed):  # a list of them could not be read again
        return value
    pairs = zip(value.split(","), paths, changed, strict=True)
    if setting == "data.eval_data":
        return ",".join(f"{word.partition('=')[0]}={new}" for word, _, new in pairs)
    return ",".join(new + word[len(old) :] for word, old, new in pairs)


def _check(found: Sequence[Share]) -> None:
    if empty := [i for i, share in enumerate(found, 1) if not share.path]:
        raise ValueError(f"entry {empty[0]} of {len(found)} names no path")
    if twice := [path for path, count in Counter(share.path for share in found).items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} named twice")
    bare = [share.path for share in found if share.weight is None]
    for path in bare:
        if len(bare) < len(found) and (end := path.rpartition(":")[2]) != path and "/" not in end:
            raise ValueError(f"{path}: {end!r} is no weight, which is a number above 0 in digits, as in 0.7 or 3")
    if bare and len(bare) < len(found):
        raise ValueError(f"{', '.join(bare)} without a weight, the others with one: give all of them one, or none")
    if zero := [share.path for share in found if share.weight == 0]:
        raise ValueError(f"{', '.join(zero)} with weight 0: leave it out")
