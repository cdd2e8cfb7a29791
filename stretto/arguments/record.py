"""What a checkpoint remembers of the configuration that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stretto.arguments.schema import Arguments
from stretto.arguments.setting import Setting
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.tree import settings, to_dict


def follows(s: Setting, source: Source) -> bool:
    """Whether a value stands there only because of others, or of the launcher, so that it is found anew next time.

    A value that gave way to others does not: it is a choice that was made once.
    """
    return s.default is None and source.kind in (SourceKind.DERIVED, SourceKind.ENVIRONMENT)


@dataclass(frozen=True)
class Record:
    """All arguments of a run as plain data, and the paths of those that follow from the others.

    `name` says where it was found. `as_dict` and `from_dict` are what a checkpoint stores.
    """

    arguments: Mapping[str, Mapping[str, Any]]
    derived: tuple[str, ...]
    name: str = ""

    @classmethod
    def of(cls, args: Arguments, sources: Mapping[str, Source]) -> Record:
        """The record of a resolved configuration."""
        return cls(to_dict(args), tuple(path for path, s in settings().items() if follows(s, sources[path])))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str) -> Record:
        """The record that `as_dict` gave. Raises KeyError when it is none."""
        return cls(data["arguments"], tuple(data["derived"]), name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: dictionaries, lists, numbers, text."""
        return {"arguments": {name: dict(body) for name, body in self.arguments.items()}, "derived": [*self.derived]}

    def carried(self) -> dict[str, dict[str, Any]]:
        """What a run that goes on from here takes over: all but where it lies and whether it goes on.

        Derived values are derived again, since what they follow from may have changed.
        """
        known = settings()
        return {
            section: {
                name: value
                for name, value in body.items()
                if (path := f"{section}.{name}") not in self.derived and (path not in known or known[path].carried)
            }
            for section, body in self.arguments.items()
        }
