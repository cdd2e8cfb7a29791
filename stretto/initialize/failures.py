"""Which failure is the cause? When one rank fails, those that wait for it fail too, and often say so sooner."""

from __future__ import annotations

import json
import pickle
import re
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from stretto.collective_trace import CollectiveError, PeerStoppedError
from stretto.store import LostError
from stretto.terminal import printable

_BACK_ENDS_OWN = re.compile(
    r"gloo/\S*\.(cc|h):\d+\]|^(NCCL|ProcessGroup(NCCL|Gloo)|\[Rank \d+\])|ncclRemoteError|c10d"
    r"|^Application timeout caused pair closure$"  # of Gloo, without a place, where another thread's wait ends first
)
"""How the messages of back ends read that come as a plain RuntimeError: a message of anybody else may have any word."""

_PEER_IS_GONE = re.compile(
    r"connection (closed|reset|refused|was )|broken pipe|remote process (exited|has terminated)|pair closure"
    r"|(read|write|socket|send|recv).{0,20}error|nccl.*(abort|remote|peer|unhandled)|timed out|timeout",
    re.IGNORECASE,
)

LONGEST = 2**16
"""Characters of each text that travel, at most 12 bytes each in JSON; the end of a traceback says most."""

_BACK_END = re.compile(r"gloo|nccl|c10d", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """An exception as it travels from the rank that raised it to whoever reports it."""

    rank: int
    summary: str
    """The exception in one line."""
    text: str
    """The whole traceback."""
    consequence: bool
    """Whether it says that another rank is gone."""
    finding: bool = False
    """Whether it says what each rank did, which is better to know than how the first one ended."""
    silent: bool = False
    """Whether it names ranks that do not answer; `rank` is the first of them, and `text` says it all."""
    phase: str = ""
    """What the rank that tells was doing."""
    pickled: bytes = b""
    """The exception itself, for the pool of the tests, whose pipes nobody else can write to; empty where it cannot be
    pickled."""

    @property
    def own(self) -> bool:
        """Whether it arose on its rank, and not in talking to others: then no table of calls explains it better."""
        return not self.consequence and not self.finding and not _BACK_END.search(self.summary)

    @classmethod
    def of(cls, rank: int, error: BaseException, phase: str = "") -> Failure:
        """Describe an exception that this rank has caught."""
        if isinstance(error, (PeersSilentError, PeerFailedError)):
            phase = error.phase
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:  # noqa: BLE001  # whatever a class does in pickling
            pickled = b""
        if isinstance(error, PeersSilentError):
            return cls(error.ranks[0], str(error), f"{error}\n", False, True, True, phase, pickled)
        if isinstance(error, PeerFailedError):  # which is worth as much as what it repeats, and no traceback
            cause = error.failure
            return cls(cause.rank, summary, cause.text, True, False, cause.silent, phase, pickled)
        consequence = is_consequence(error)
        if finding := isinstance(error, CollectiveError):
            consequence = bool(error.silent)  # a table without them says who waits, and not for whom
            text = f"{error}\n"  # a table of all ranks: where this one stood when it was made explains nothing
        else:
            text = "".join(traceback.format_exception(type(error), error, _user_frames(error.__traceback__)))
        return cls(rank, summary, text, consequence, finding, False, phase, pickled)

    def encode(self) -> bytes:
        """As JSON, for a store or a file: without the exception itself, which only a pickle could carry."""
        said = {k: v for k, v in asdict(self).items() if k != "pickled"}
        return json.dumps(said | {"summary": self.summary[:LONGEST], "text": self.text[-LONGEST:]}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Failure:
        """What `encode` wrote. Raises ValueError for anything else; what would steer a terminal is taken out."""
        try:
            said = json.loads(data) if len(data) < 32 * LONGEST else None
        except (ValueError, RecursionError):
            said = None
        kinds = {"rank": int, "summary": str, "text": str, "consequence": bool, "finding": bool}
        kinds |= {"silent": bool, "phase": str}
        if not isinstance(said, dict) or {k: type(v) for k, v in said.items()} != kinds:
            raise ValueError("a report of a failure that cannot be read")
        summary, text, phase = (printable(said[each]) for each in ("summary", "text", "phase"))
        return cls(said["rank"], summary, text, said["consequence"], said["finding"], said["silent"], phase)


class PeersSilentError(RuntimeError):
    """Other ranks do not answer, and this one cannot go on without them; the message names them and no other."""

    def __init__(self, ranks: tuple[int, ...], text: str, phase: str = "") -> None:
        super().__init__(f"{text} (noticed {phase})" if phase else text)
        self.ranks, self.text, self.phase = ranks, text, phase

    def __reduce__(self) -> tuple[type[PeersSilentError], tuple[tuple[int, ...], str, str]]:
        return PeersSilentError, (self.ranks, self.text, self.phase)


class PeerFailedError(RuntimeError):
    """Another rank failed, and this one could not go on without it; the message ends with its traceback."""

    def __init__(self, failure: Failure, phase: str = "") -> None:
        super().__init__(failure)
        self.failure, self.phase = failure, phase

    def __str__(self) -> str:
        if self.failure.silent or self.failure.finding:  # the rank that tells of it is not the one that failed
            return self.failure.text
        who = f"rank {self.failure.rank}" if self.failure.rank >= 0 else "some rank"
        return f"{who} failed, and this rank cannot go on without it.\n{self.failure.text}"


def is_consequence(error: BaseException) -> bool:
    """Whether an exception says no more than that a peer is gone or does not answer.

    Only what comes from a back end, a store or a socket is asked for its words: an error of a file under a directory
    named `timeout-3`, or of a user's own code, is its rank's own.
    """
    if isinstance(error, (PeerFailedError, PeerStoppedError, LostError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    words = str(error)
    said = isinstance(error, (dist.DistError, ConnectionError)) or (
        type(error) is RuntimeError and bool(_BACK_ENDS_OWN.search(words))
    )
    return said and bool(_PEER_IS_GONE.search(words))


def _user_frames(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the first frame on that is not of starting and leading a process."""
    here = trace
    while here is not None and Path(here.tb_frame.f_code.co_filename).parent.name in ("initialize", "launch"):
        here = here.tb_next
    return here or trace
