"""What a rank that torchrun started leaves for it. torchrun shows the earliest record last, as its root cause."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from stretto.initialize.failures import Failure, PeerFailedError, PeersSilentError

FOLLOWS_SECONDS = 2
"""How much later than now torchrun is told that a rank failed which only lost another one."""


def record(rank: int, error: Exception, *, phase: str = "", message: bool = False) -> None:
    """Leave what this rank fails with; nothing where no torchrun asks. The first record of a process stays.

    With `message` the error is one that needs no traceback.

    torchrun's times are whole seconds. What follows from the end of another rank is therefore dated later: the other
    one's record, or torchrun's own where that rank was killed, may be of the same second.
    """
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if not file.name or file.exists():
        return
    follows = FOLLOWS_SECONDS if isinstance(error, (PeerFailedError, PeersSilentError)) else 0
    failure = Failure.of(rank, error, phase)
    text = f"{error}" if message else failure.text
    extra = {"py_callstack": text, "timestamp": str(int(time.time()) + follows)}
    # The form in which torch.distributed.elastic's ErrorHandler writes the exception that is being handled.
    file.write_text(json.dumps({"message": {"message": failure.summary, "extraInfo": extra}}))
