"""How long this rank waits for the others: who waits least is who they wait for."""

from __future__ import annotations

import time

from stretto.world import Work


class Waits:
    """Seconds that this process has waited for communication; on a GPU it is the stream that waits, and not it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wait(self, work: Work) -> None:
        """Wait for a communication."""
        began = time.perf_counter()
        work.wait()
        self.seconds += time.perf_counter() - began
