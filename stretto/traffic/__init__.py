"""What the ranks say to each other: a record of it, and a check that they say the same before they say it."""

from stretto.traffic.call import Call
from stretto.traffic.check import CHECK_SECONDS, Checker, CollectiveError, PeerStoppedError
from stretto.traffic.compare import Divergence, Volume, divergences, volumes
from stretto.traffic.last import LastCalls
from stretto.traffic.record import Recorder

__all__ = [
    "CHECK_SECONDS",
    "Call",
    "Checker",
    "CollectiveError",
    "Divergence",
    "LastCalls",
    "PeerStoppedError",
    "Recorder",
    "Volume",
    "divergences",
    "volumes",
]
