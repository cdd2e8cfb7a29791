"""How long things take: what a schedule is simulated, reordered and searched with."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stretto.schedule.actions import NUMBER, OPS, Action, B, F, I, Ints, W

Times = NDArray[np.float64]
PerStage = float | tuple[float, ...]
"""One time for all stages, or one for each."""


@dataclass(frozen=True)
class Cost:
    """How long things take, in any one unit of time.

    The default is the textbook's: a backward is two forwards, its halves one each, messages are free. A time may be
    given for each stage; `stages[s]` multiplies all computation of stage s (its number of layers, say). `hop` is the
    latency of a message, from the end of its producer to the start of its consumer on another rank; `transfer` is how
    long it also keeps its link busy (bytes over bandwidth): messages of one direction between two ranks come one after
    another. `finish` is what follows the last gradient of the step: the norm's all-reduce and the update. With
    `barrier` no rank begins the next step before the last gradient of all.
    """

    forward: PerStage = 1.0
    backward: PerStage = 2.0
    input_gradient: PerStage = 1.0
    weight_gradient: PerStage = 1.0
    hop: float = 0.0
    stages: tuple[float, ...] = ()
    transfer: float = 0.0
    finish: float = 0.0
    barrier: bool = True

    def __post_init__(self) -> None:
        columns = [*self._columns, *([self.stages] if self.stages else [])]
        given = [x for c in columns for x in (c if isinstance(c, tuple) else (c,))]
        for x in (*given, self.hop, self.transfer, self.finish):
            if not (isfinite(x) and x >= 0):
                raise ValueError(f"a time is {x:g}: times are finite and not negative")
        lengths = {len(c) for c in columns if isinstance(c, tuple)}
        if len(lengths) > 1:
            raise ValueError(
                f"times are given for {' and for '.join(map(str, sorted(lengths)))} stages: give as many of each"
            )

    @property
    def _columns(self) -> tuple[PerStage, PerStage, PerStage, PerStage]:
        return self.forward, self.backward, self.input_gradient, self.weight_gradient

    @property
    def num_stages(self) -> int | None:
        """For how many stages times are given; None where one time goes for all."""
        return next((len(c) for c in (*self._columns, self.stages or 0.0) if isinstance(c, tuple)), None)

    @property
    def around(self) -> dict[str, Any]:
        """All but the times of stages."""
        return {"hop": self.hop, "transfer": self.transfer, "finish": self.finish, "barrier": self.barrier}

    @property
    def message(self) -> float:
        """From the end of a producer to its consumer on another rank, on a free link."""
        return self.hop + self.transfer

    @classmethod
    def split(cls, forward: PerStage, input_gradient: PerStage, weight_gradient: PerStage, **rest: Any) -> Cost:
        """Times of F, I and W; a whole backward takes as long as its halves."""
        i, w = np.asarray(input_gradient, float), np.asarray(weight_gradient, float)
        if i.ndim == w.ndim == 1 and len(i) != len(w):
            raise ValueError(f"times are given for {len(i)} and for {len(w)} stages: give as many of each")
        whole = (i + w).tolist()
        return cls(forward, tuple(whole) if isinstance(whole, list) else whole, input_gradient, weight_gradient, **rest)

    def time(self, a: Action) -> float:
        """How long the action keeps its rank busy: messages and the verbs of the weights do not."""
        return float(self.times(np.array([a.stage]), np.array([NUMBER[a.op]]))[0])

    def times(self, stage: Ints, op: Ints) -> Times:
        """The same for columns of actions. Raises ValueError for a stage without a time."""
        n = self.num_stages
        if n is not None and len(stage) and (most := int(stage.max())) >= n:
            raise ValueError(f"times are given for {n} stages, but there is a stage {most}")
        table = np.zeros((len(OPS), n or 1))
        for number, column in zip((F, B, I, W), self._columns, strict=True):
            table[number] = column
        table *= np.asarray(self.stages, float) if self.stages else 1.0
        return np.asarray(table[op, stage if n is not None else 0], float)
