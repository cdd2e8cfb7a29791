"""Buffers of a user's own modules: what their `state_dict` has beside parameters, such as running statistics.

Each rank has them whole and changes them itself. So they are one tensor, of which the first rank that holds the module
writes a copy, only if all change alike: what follows from rows is to be summed over the ranks by who computes it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from stretto.distributed.replicate import take_first
from stretto.exchange import all_gather_json
from stretto.parallel_state import ParallelState
from stretto.params import Slice


@dataclass(frozen=True)
class Buffers:
    """The persistent buffers of this rank's stages, by name."""

    stages: Mapping[int, nn.Module] = field(default_factory=dict)
    owner: bool = False

    @classmethod
    def of(cls, stages: Mapping[int, nn.Module], state: ParallelState) -> Buffers:
        """Of stages whose modules are whole on every rank, which all begin with the values of the first.

        Raises ValueError, on all ranks of the pipeline, where stages have several buffers of one name. With tensor
        parallelism none are found, with a line that says so: a module may cut them.
        """
        first = all(state.coords[axis] == 0 for axis in ("tp", "cp", "dp"))
        found = cls(stages, first)
        names = [name for told in all_gather_json([*found.tensors()], state.axis("pp")) for name in told]
        if twice := [name for name, n in Counter(names).items() if n > 1]:
            raise ValueError(
                f"several stages have a buffer {', '.join(twice[:4])}: name layers by their numbers in the whole "
                "model, or register what need not be saved with persistent=False"
            )
        if state.axis("tp").size == 1:
            found.align(state)
            return found
        if names and first and state.coords["pp"] == 0:
            logging.getLogger(__name__).warning(
                "buffers are not in checkpoints where layers are cut (tp=%d): %s%s",
                state.axis("tp").size,
                ", ".join(names[:4]),
                f" and {len(names) - 4} more" if len(names) > 4 else "",
            )
        return cls()

    def tensors(self) -> dict[str, Tensor]:
        """Each under its first name, as it is now: a module may have put another in its place."""
        return {name: tensor for module in self.stages.values() for name, tensor in _persistent(module)}

    def align(self, state: ParallelState) -> None:
        """Give all ranks that hold a stage the values of the first of them."""
        for tensor in self.tensors().values():
            take_first(tensor, state.axis("dp", "cp"))

    def slices(self, *, copied: bool = False) -> list[Slice]:
        """What a checkpoint holds of them; with `copied`, what no forward changes."""
        return [
            Slice(
                f"buffers/{name}",
                tensor.detach().clone() if copied else tensor.detach(),
                tuple(tensor.shape),
                (0,) * tensor.dim(),
                self.owner,
            )
            for name, tensor in self.tensors().items()
        ]


def _persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    left_out = {
        f"{place}.{name}" if place else name
        for place, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    for name, tensor in module.named_buffers():
        if name not in left_out:
            yield name, tensor
