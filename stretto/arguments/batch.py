"""Sizes of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.arguments.setting import setting


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of a batch."""

    seq_len: int = setting(256, "length of a sequence", unit="tokens", at_least=1, at_most=2**26)
    micro_batch: int = setting(
        4, "sequences that one rank computes at a time", unit="sequences", at_least=1, at_most=2**22
    )
    global_batch: int = setting(
        32, "sequences of one optimizer step, over all ranks", unit="sequences", at_least=1, at_most=2**22
    )

    def microbatches(self, dp: int | None) -> int:
        """Microbatches of each rank in a step, over `dp` replicas of the model."""
        return self.global_batch // (self.micro_batch * (dp or 1))
