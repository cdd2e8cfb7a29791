"""The directory of a run: what lies where, and how a new run makes room without losing an earlier one."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from stretto.arguments import Arguments, Resolved, as_toml
from stretto.checkpoint.places import is_local, place
from stretto.train.consensus import RunRejectedError


@dataclass(frozen=True)
class Paths:
    """Where things lie in the directory of a run."""

    root: Path
    elsewhere: str | None = None
    """Where checkpoints lie, if not here; perhaps a URL."""

    @classmethod
    def of(cls, args: Arguments) -> Paths:
        """Those of the run that `args` describe."""
        return cls(Path(args.checkpoint.out).expanduser(), args.checkpoint.checkpoint_dir)

    @property
    def checkpoints(self) -> Path:
        """One directory per saved step."""
        return place(self.elsewhere) if self.elsewhere else self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.root / "metrics.jsonl"

    @property
    def experts(self) -> Path:
        """Of a model with experts: one JSON object per layer and line."""
        return self.root / "experts.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def resolved(self) -> Path:
        """The configuration with the source of each value. A directory that has it is a run's."""
        return self.root / "resolved.toml"

    @property
    def lock(self) -> Path:
        """Held by the run that writes here; names it."""
        return self.root / ".lock"


def require_room(args: Arguments, *, alone: bool, first_here: bool) -> None:
    """Raise RunRejectedError where a directory that the run writes to cannot be made, before anything is loaded.

    A file system of the kernel's own looks as if it could: only a try tells. The `first_here` of a node's ranks tries
    that of the logs, which may be each node's own: a try by each of ten thousand would be a storm. Where other ranks
    were started, which would wait for this one, `--out` and checkpoints are for all to look at together, later.
    """
    paths = Paths.of(args)
    wanted = {"--log-dir": args.run.log_dir} if first_here else {}
    if alone:
        wanted |= {"--out": args.checkpoint.out, "--checkpoint-dir": paths.elsewhere}
    for flag, name in wanted.items():
        if name is None or not is_local(path := place(name)):
            continue
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        try:
            Path(mkdtemp(prefix=".stretto-", dir=existing)).rmdir()
        except OSError as error:
            raise unwritable(flag, path, error) from error


def unwritable(flag: str, path: object, error: OSError) -> RunRejectedError:
    """What the user is told of a directory that cannot be made or written to."""
    return RunRejectedError(f"{flag} {path} cannot be written: {error.strerror}: name another directory")


@contextmanager
def occupied(resolved: Resolved, *, resume: bool) -> Iterator[Path | None]:
    """Within, the directory is this run's alone. Yields where it moved the earlier run that it found there, if any.

    Raises RunRejectedError, with nothing changed, when another run writes there or what lies there is no run's.
    """
    paths = Paths.of(resolved.args)
    aside = None
    if not resume and paths.root.exists() and any(file != paths.lock for file in paths.root.iterdir()):
        _require_movable(paths)
        with _locked(paths):
            aside = _free_name(paths.root.absolute())
            paths.root.absolute().rename(aside)
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable("--out", paths.root, error) from error
    with _locked(paths):
        temporary = paths.resolved.with_name(paths.resolved.name + ".tmp")
        try:
            temporary.write_text(as_toml(resolved), encoding="utf-8", errors="backslashreplace")
            temporary.replace(paths.resolved)
        except OSError as error:
            raise unwritable("--out", paths.root, error) from error
        yield aside


def _require_movable(paths: Paths) -> None:
    if not paths.resolved.exists():
        raise RunRejectedError(
            f"--out {paths.root} has files and is not the directory of a run (there is no {paths.resolved.name}): name "
            "one that is empty or not there yet"
        )
    if Path.cwd().is_relative_to(paths.root.resolve()):
        raise RunRejectedError(
            f"--out {paths.root} holds an earlier run and cannot move aside, as this command was started in it: "
            "name another directory, or start elsewhere"
        )


@contextmanager
def _locked(paths: Paths) -> Iterator[None]:
    """Hold the lock of the directory. The kernel frees it when its holder ends, however it ends."""
    with paths.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunRejectedError(
                f"{holder} is training in {paths.root} now: wait for it, or name another directory with --out"
            ) from None
        except OSError:  # a file system without locks: then nobody looks after two runs that share a directory
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _free_name(root: Path) -> Path:
    n = 1
    while (aside := root.with_name(f"{root.name}.{n}")).exists():
        n += 1
    return aside
