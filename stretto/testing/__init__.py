"""Tools for tests of parallel code, for Stretto's own tests and for yours."""

from stretto.testing.fresh import Ended, Fresh, Program
from stretto.testing.pool import Pool, RemoteError, WorkerDiedError, WorkersStuckError

__all__ = ["Ended", "Fresh", "Pool", "Program", "RemoteError", "WorkerDiedError", "WorkersStuckError"]
