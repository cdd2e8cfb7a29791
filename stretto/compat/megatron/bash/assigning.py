"""Assignments: of a value, an entry of an array, a whole array."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from stretto.compat.megatron.bash.parameters import Parameters
from stretto.compat.megatron.bash.state import Variable
from stretto.compat.megatron.bash.syntax import Assignment, Word
from stretto.compat.megatron.bash.unknown import marks


class Assigning(Parameters):
    """Sets variables as a script says it."""

    def assign(self, a: Assignment) -> None:
        """Set a variable, an entry of an array, or a whole array."""
        state = self.state
        old = state.variables.get(a.name)
        if isinstance(a.value, tuple):
            self._assign_array(a, a.value, old)
            return
        value = self._named(self.value(a.value), a.name)
        if old is not None and old.integer:
            value = self.computed(value, a.line)
        if a.index is not None:
            index = self._index(a.name, a.index)
            if marks(index):
                state.blur([a.name], a.line, "has an index that is not known")
                return
            held = {} if old is None else old.value
            entries = dict(held) if isinstance(held, dict) else {"0": held}
            entries[index] = (entries.get(index, "") if a.append else "") + value
            state.set(a.name, entries if old and old.keyed else _ordered(entries))
            return
        before = state.get(a.name) if a.append else ""
        if before is None:
            self._nothing(a)
        if old is not None and old.integer and a.append:
            value = self.computed(f"{before or 0}+{value}", a.line)
            before = ""
        state.set(a.name, (before or "") + value)

    def _assign_array(self, a: Assignment, items: Sequence[tuple[Word | None, Word]], old: Variable | None) -> None:
        entries: dict[str, str] = {}
        if a.append and old is not None:
            entries = dict(old.value) if isinstance(old.value, dict) else {"0": old.value}
        elif a.append and old is None:
            self._nothing(a)
        keyed = old is not None and old.keyed
        following = max((int(n) for n in entries), default=-1) + 1 if not keyed else 0
        for index, word in items:
            if index is not None:
                key = self.value(index) if keyed else self.computed(self.value(index), a.line)
                entries[key] = self._named(self.value(word), a.name)
                following = int(key) + 1 if not keyed and not marks(key) else following
                continue
            for field in self.fields([word]):
                entries[str(following)] = self._named(field, a.name)
                following += 1
        self.state.set(a.name, entries if keyed else _ordered(entries))

    def _nothing(self, a: Assignment) -> None:
        """What `+=` adds to, where nothing is set: nothing, unless the environment of the script has it."""
        if a.name not in self.state.emptied:
            self.state.shared.assumed.setdefault(f"${a.name}", a.line)

    def _named(self, value: str, name: str) -> str:
        """A value that is not known can be said by the name of the variable that takes it."""
        for unknown, mark in zip(self.state.shared.unknowns.of(value), marks(value), strict=True):
            if not unknown.name:
                value = value.replace(mark, self.state.shared.mark(unknown.text, unknown.line, unknown.why, name))
        return value


def _ordered(entries: dict[str, str]) -> dict[str, str]:
    """By index, as bash keeps an array."""
    keys = list(entries)
    if all(key.isdigit() for key in keys) and any(int(a) > int(b) for a, b in pairwise(keys)):
        return {key: entries[key] for key in sorted(keys, key=int)}
    return entries
