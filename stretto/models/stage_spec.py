"""What of a model one pipeline stage holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stretto.arguments.schema import ModelConfig
from stretto.schedule.blocks import StageBlock, StageBlocks


@dataclass(frozen=True)
class StageSpec:
    """What of the model lies on a stage: its blocks, and whether it is an end."""

    blocks: StageBlocks
    first: bool
    last: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(block.layer for block in self.blocks)

    @classmethod
    def of(cls, layers: Iterable[int], *, first: bool, last: bool) -> StageSpec:
        """Of whole blocks, by their global numbers."""
        return cls(tuple(map(StageBlock, layers)), first, last)

    @classmethod
    def whole(cls, config: ModelConfig) -> StageSpec:
        """All of it."""
        return cls.of(range(config.layers), first=True, last=True)
