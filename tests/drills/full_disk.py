"""A writer's hook: no file grows beyond a page, as on a full disk."""

from __future__ import annotations

import resource
import signal


def install() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
