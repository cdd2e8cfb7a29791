"""What a checkpoint remembers of the configuration that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stretto.arguments.errors import ConfigError, Violation
from stretto.arguments.schema import Arguments
from stretto.arguments.sections import TOKENIZERS
from stretto.arguments.setting import Setting
from stretto.arguments.sources import Source, SourceKind
from stretto.arguments.tree import settings, to_dict
from stretto.notation.corpora import with_paths


def follows(s: Setting, source: Source) -> bool:
    """Whether a value stands there only because of others, or of the launcher, so that it is found anew next time.

    A value that gave way to others does not: it is a choice that was made once.
    """
    return s.default is None and source.kind in (SourceKind.DERIVED, SourceKind.ENVIRONMENT)


def from_the_root(path: str, said: Any) -> Any:
    """The value of a setting that names a file, as it is understood in another working directory, too."""
    if not isinstance(said, str) or not said or (path == "data.tokenizer" and said in TOKENIZERS):
        return said
    try:
        return with_paths(path, said, lambda name: str(Path(name).expanduser().absolute()))
    except RuntimeError:  # there is no such user
        return said


@dataclass(frozen=True)
class Record:
    """All arguments of a run as plain data, and the paths of those that follow from the others.

    `name` says where it was found. `as_dict` and `from_dict` are what a checkpoint stores.
    """

    arguments: Mapping[str, Mapping[str, Any]]
    derived: tuple[str, ...]
    name: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    """Relative paths as they were said, by setting, for a reader; `arguments` has them from the root on."""

    @classmethod
    def of(cls, args: Arguments, sources: Mapping[str, Source]) -> Record:
        """The record of a resolved configuration."""
        tree, given = to_dict(args), {}
        for path in (path for path, s in settings().items() if s.is_path and s.carried):
            section, _, name = path.partition(".")
            said = tree[section][name]
            if (absolute := from_the_root(path, said)) != said:
                tree[section][name], given[path] = absolute, said
        return cls(tree, tuple(path for path, s in settings().items() if follows(s, sources[path])), given=given)

    @classmethod
    def from_dict(cls, data: object, name: str) -> Record:
        """The record that `as_dict` gave. Raises ConfigError when it is none."""
        said = data if isinstance(data, dict) else {}
        arguments, derived = said.get("arguments"), said.get("derived", [])
        if not isinstance(arguments, dict) or not all(isinstance(body, dict) for body in arguments.values()):
            problem = f"{name} has no record of a run's arguments: it was not written by `stretto train`"
            raise ConfigError([Violation("record", (), problem)])
        found = [path for path in derived if isinstance(path, str)] if isinstance(derived, list) else []
        return cls(arguments, tuple(found), name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: dictionaries, lists, numbers, text."""
        arguments = {name: dict(body) for name, body in self.arguments.items()}
        return {"arguments": arguments, "derived": [*self.derived], "given": dict(self.given)}

    def carried(self) -> dict[str, dict[str, Any]]:
        """What a run that goes on from here takes over: all but where it writes and whether it goes on.

        A record may be somebody else's: it never says where this run writes (`--out`, `--cache`, `--log-dir`).

        Derived values are derived again, since what they follow from may have changed.
        """
        left = {*self.derived, *(path for path, s in settings().items() if not s.carried)}
        return {
            section: {name: value for name, value in body.items() if f"{section}.{name}" not in left}
            for section, body in self.arguments.items()
        }
