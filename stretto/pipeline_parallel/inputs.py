"""What a microbatch hands to a stage, at addresses that stay: a CUDA graph reads where it was recorded."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


class Inputs:
    """A copy of a microbatch: a tree of dataclasses, tuples, lists and dictionaries with tensors as leaves.

    `put` overwrites it by another microbatch of the same signature: the shapes of its tensors, and all else that is in
    it, which the host may have looked at.
    """

    def __init__(self, microbatch: Any) -> None:
        self.signature, tensors = signature(microbatch)
        self._tensors = [each.clone() for each in tensors]
        self.tree = _rebuilt(microbatch, iter(self._tensors))

    @torch.no_grad()
    def put(self, microbatch: Any) -> bool:
        """Whether it fits; then `tree` has its values."""
        found, tensors = signature(microbatch)
        if found != self.signature:
            return False
        if tensors:
            torch._foreach_copy_(self._tensors, tensors)
        return True


def signature(tree: Any) -> tuple[Hashable, list[Tensor]]:
    """What two trees must have in common, and the tensors in order. Other objects are like themselves alone."""
    tensors: list[Tensor] = []
    return _signature(tree, tensors), tensors


def _signature(tree: Any, tensors: list[Tensor]) -> Hashable:
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return tree.shape, tree.dtype, tree.device
    parts = _parts(tree)
    if parts is not None:
        return type(tree), tuple((name, _signature(part, tensors)) for name, part in parts)
    return (type(tree), tree) if isinstance(tree, bool | int | float | str | slice | None) else (type(tree), id(tree))


def _parts(tree: Any) -> list[tuple[Any, Any]] | None:
    """Names and values of what a tree branches into; None where it does not."""
    if isinstance(tree, type):
        return None
    if is_dataclass(tree):
        return [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    if isinstance(tree, dict):
        return list(tree.items())
    return list(enumerate(tree)) if isinstance(tree, tuple | list) else None


def _rebuilt(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return next(tensors)
    parts = _parts(tree)
    if parts is None:
        return tree
    made = {name: _rebuilt(part, tensors) for name, part in parts}
    if isinstance(tree, dict):
        return made
    if isinstance(tree, tuple | list):
        values = made.values()
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    twin = copy.copy(tree)
    for name, value in made.items():
        object.__setattr__(twin, name, value)
    return twin
