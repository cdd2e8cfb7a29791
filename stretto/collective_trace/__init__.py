"""A log of every rank's collectives, and a check before each that all ranks call the same."""

from stretto.collective_trace.call import CollectiveCall
from stretto.collective_trace.check import CHECK_SECONDS, Checker, CollectiveError, PeerStoppedError
from stretto.collective_trace.compare import Divergence, Volume, divergences, volumes
from stretto.collective_trace.last import LastCalls
from stretto.collective_trace.record import Recorder
from stretto.collective_trace.waits import Waits

__all__ = [
    "CHECK_SECONDS",
    "Checker",
    "CollectiveCall",
    "CollectiveError",
    "Divergence",
    "LastCalls",
    "PeerStoppedError",
    "Recorder",
    "Volume",
    "Waits",
    "divergences",
    "volumes",
]
