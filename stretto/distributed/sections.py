"""The sections of a stage: what is gathered at once, in the order in which a forward comes to it.

The order is known before anything runs. Hooks only say that the computation has come to a section: then its weights
are waited for, those of the section before are let go, and the next ones, of the forward or of the backward, are asked
for. So two sections are whole at a time, and a gather overlaps with the computation of the section before. Where a
pass ends, the next one goes the other way: it begins with the two sections that are whole, and gathers neither again.

The backward comes to a section with the gradient of what it put out: autograd takes nodes in the opposite order of
their forward, so no other section is under way then. What a section put out without a graph, within a reentrant
checkpoint, has its graph where the next section takes it in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stretto.distributed.bucket import Bucket


@runtime_checkable
class Sectioned(Protocol):
    """A module that says what of it is used together."""

    def sections(self) -> list[list[nn.Module]]:
        """In the order of the forward. Each begins with the first call of one of its modules."""


def sections_of(module: nn.Module) -> list[list[nn.Module]]:
    """The sections of a module: those that it says, or the members of its longest list of modules, if it has one.

    What is in none is whole from the first use of the module to the last.
    """
    if isinstance(module, Sectioned):
        return [section for section in module.sections() if section]
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList | nn.ModuleDict | nn.Sequential))
    return [[child] for child in max(lists, key=len, default=nn.Module()).children()]


def outside_of(module: nn.Module, sections: Sequence[Sequence[nn.Module]]) -> set[nn.Parameter]:
    """Parameters that modules outside of all sections hold, a section or none beside them: read at any time."""
    inside = {part for modules in sections for each in modules for part in each.modules()}
    return {p for part in module.modules() if part not in inside for p in part.parameters(recurse=False)}


@dataclass
class _Pass:
    """A forward, and its backward."""

    watched: set[int] = field(default_factory=set)
    """Sections whose outputs say when the backward comes to them."""
    backward: bool = False
    """It has begun."""


class Sections:
    """Gathers the weights of one stage, section by section; the last `keep` stay whole until their backward."""

    def __init__(
        self,
        module: nn.Module,
        sections: Sequence[Sequence[nn.Module]],
        home: Mapping[nn.Parameter, Bucket],
        *,
        keep: int = 0,
    ) -> None:
        self.uses = [_used(modules, home) for modules in sections]
        """The buckets of each section."""
        # A bucket may hold both what a section uses and what is in none: whoever comes first waits for it.
        outside = outside_of(module, sections)
        self._always = list(dict.fromkeys(home[p] for p in module.parameters() if p in outside and p in home))
        self._kept = {bucket for used in self.uses[max(0, len(self.uses) - keep) :] for bucket in used if keep}
        self._held = dict[Bucket, None]()
        self._backward = False
        self._at: int | None = None
        self._pass = _Pass()
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._stage_begins),
            module.register_forward_hook(self._stage_ends),
        ]
        for n, modules in enumerate(sections):
            for each in modules:
                self._hooks.append(each.register_forward_pre_hook(partial(self._section_begins, n)))
                self._hooks.append(each.register_forward_hook(partial(self._section_ends, n)))

    def begin(self, *, backward: bool = False) -> None:
        """Ask for what a forward uses first, or a backward."""
        first = self.uses[-1 if backward else 0] if self.uses else []
        self._ask((*self._always, *first))

    def updated(self, bucket: Bucket) -> None:
        """Ask for a bucket that has new values if the next forward uses it before it can overlap a gather with work."""
        if bucket.independent and any(bucket in used for used in (self._always, *self.uses[:2])):
            self._ask((bucket,))

    def release(self) -> None:
        """Let go of all that is gathered."""
        self._at = None
        for bucket in self._held:
            bucket.release()
        self._held.clear()

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _stage_begins(self, _module: nn.Module, _args: Any) -> None:
        self._backward, self._at, self._pass = False, None, _Pass()
        self._wait(self._always)

    def _section_begins(self, n: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._backward:  # computed again for its backward
            self._wait((*self._always, *self.uses[n]))
        elif self._at != n:  # not one more module of it
            before = self._at
            self._enter(n, n + 1)
            if before is not None and before not in self._pass.watched:
                self._watch(args, partial(self._goes_back, self._pass, before))

    def _section_ends(self, n: int, _module: nn.Module, _args: Any, y: Any) -> None:
        if not self._backward and self._watch(y, partial(self._goes_back, self._pass, n)):
            self._pass.watched.add(n)

    def _stage_ends(self, _module: nn.Module, _args: Any, y: Any) -> None:
        if self._at is not None:
            self._watch(y, partial(self._begins_back, self._pass, self._at))

    @staticmethod
    def _watch(passed: Any, then: Callable[[Tensor], None]) -> bool:
        """Call `then` when a gradient of what is passed is there; whether any will be."""
        found = [x for x in _tensors(passed) if x.requires_grad] if torch.is_grad_enabled() else []
        for x in found:
            x.register_hook(then)  # type: ignore[no-untyped-call]
        return bool(found)

    def _begins_back(self, of: _Pass, n: int, dy: Tensor) -> None:
        if not of.backward:  # what else the stage put out may come from within a section
            self._goes_back(of, n, dy)

    def _goes_back(self, of: _Pass, n: int, _dy: Tensor) -> None:
        self._backward = of.backward = True
        self._enter(n, n - 1)

    def _enter(self, n: int, then: int) -> None:
        """The computation has come to section `n`, and goes on with section `then`, or turns back to the one before."""
        recorded = torch.is_grad_enabled()
        turns = not 0 <= then < len(self.uses) and (recorded or self._backward)
        then = 2 * n - then if turns else then
        following = self.uses[then] if 0 <= then < len(self.uses) else []
        kept = self._kept if recorded and not self._backward else ()
        self._wait((*self._always, *self.uses[n]))
        stay = {*self._always, *self.uses[n], *following, *kept}
        for bucket in [b for b in self._held if b not in stay]:
            bucket.release()
            del self._held[bucket]
        self._ask(following)
        for bucket in following if turns else ():
            bucket.rest()
        self._at = n

    def _ask(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            bucket.gather()
            self._held[bucket] = None

    def _wait(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            bucket.gathered()
            self._held[bucket] = None


def _used(modules: Sequence[nn.Module], home: Mapping[nn.Parameter, Bucket]) -> list[Bucket]:
    return list(dict.fromkeys(home[p] for module in modules for p in module.parameters() if p in home))


def _tensors(passed: Any) -> Iterator[Tensor]:
    """Those in what modules hand on: a tensor, and tuples, lists, mappings and dataclasses of them."""
    if isinstance(passed, Tensor):
        yield passed
    elif isinstance(passed, Mapping | tuple | list):
        for each in passed.values() if isinstance(passed, Mapping) else passed:
            yield from _tensors(each)
    elif is_dataclass(passed):
        for each in fields(passed):
            yield from _tensors(getattr(passed, each.name, None))
