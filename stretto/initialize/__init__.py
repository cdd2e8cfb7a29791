"""From a launch environment to a ready process, and out again.

`stretto.initialize.environment` is pure: it says which rank this process is without importing torch. The rest
is imported when it is asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stretto.initialize.environment import Launch, LaunchError, detect

if TYPE_CHECKING:
    from stretto.initialize.failures import PeerFailedError
    from stretto.initialize.process import initialize
    from stretto.initialize.rendezvous import RendezvousError

__all__ = ["Launch", "LaunchError", "PeerFailedError", "RendezvousError", "detect", "initialize"]

_LATE = {"initialize": "process", "RendezvousError": "rendezvous", "PeerFailedError": "failures"}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """The package and its function have one name: `stretto.initialize(...)` is the function either way."""

    def __call__(self, **said: Any) -> Any:
        return self.initialize(**said)


sys.modules[__name__].__class__ = _Callable
