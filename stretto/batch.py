"""`Batch`: the rows of one microbatch, the value that travels from the data to the model and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One microbatch of b sequences of s tokens; position i of a row is to predict `labels[:, i]`.

    - `tokens` [b, s] int64: what the model reads.
    - `labels` [b, s] int64: what comes next, already shifted by one.
    - `loss_mask` [b, s] bool: which predictions count. Bool, so that its sum is an exact int64 count at
      any size (an fp32 sum of ones stops at 2^24).
    - `samples` [b] int64: the number of each row among all samples of the run, by which dropout knows it in
      every layout; None is enough where nothing is dropped.
    - `starts` [b, s] int64: at which place of its row the document of each token begins; None: each row is one
      document. No token sees another document, and positions begin anew in each. What a document's last token
      is to predict must not count, unless it is that document's own.
    - `further` [b, D, s] int64: what comes 1..D places after the labels, ~id where that does not count; see
      `with_further`. None: nobody predicts it.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    samples: Tensor | None = None
    starts: Tensor | None = None
    further: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.tokens, self.labels, self.loss_mask)]
        if len(set(shapes)) != 1 or len(shapes[0]) != 2:
            raise ValueError(f"tokens, labels and loss_mask must share one shape [b, s], got {shapes}")
        if self.samples is not None and tuple(self.samples.shape) != shapes[0][:1]:
            raise ValueError(f"samples must be [b] = [{shapes[0][0]}], one for each row: {list(self.samples.shape)}")
        if self.starts is not None and tuple(self.starts.shape) != shapes[0]:
            raise ValueError(f"starts must be [b, s] = {list(shapes[0])}: {list(self.starts.shape)}")
        rows, length = shapes[0]
        if self.further is not None and (self.further.shape[0], self.further.shape[-1]) != (rows, length):
            raise ValueError(f"further must be [b, D, s] = [{rows}, D, {length}]: {list(self.further.shape)}")

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`. To a GPU it is on its way: the host goes on, what is computed there waits."""
        if torch.device(device).type != "cuda":
            return self._each(lambda t: t.to(device))
        # From pageable memory the host would first wait until the GPU has done all that it was given.
        return self._each(lambda t: t.pin_memory().to(device, non_blocking=True))

    def with_further(self, depth: int) -> Batch:
        """The same whole rows with labels of `depth` further places. One counts where that place's own label does, and
        is in the document in which the prediction is made; none counts beyond the end of its row."""
        if not depth:
            return self
        found = []
        for n in range(1, depth + 1):
            wanted, counts = torch.zeros_like(self.labels), torch.zeros_like(self.loss_mask)
            wanted[:, :-n], counts[:, :-n] = self.labels[:, n:], self.loss_mask[:, n:]
            if self.starts is not None:
                counts[:, :-n] &= self.starts[:, n:] == self.starts[:, :-n]
            found.append(torch.where(counts, wanted, ~wanted))
        return replace(self, further=torch.stack(found, 1))

    def rows(self, rows: slice) -> Batch:
        """Some of its rows."""
        return self._each(lambda t: t[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        others = (None if t is None else change(t) for t in (self.samples, self.starts, self.further))
        return Batch(change(self.tokens), change(self.labels), change(self.loss_mask), *others)
