"""Strict reading of one value: the type that the schema says, in the range that it says, or ValueError."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import cast

from stretto.arguments.peers import choice_of
from stretto.arguments.setting import Setting, Value
from stretto.reading import shown

AUTO = "auto"
"""How a file or a flag asks for the derived value, where something weaker set one."""

_ALIKE = 0.7
"""Of the letters of two words, the share that must agree for one to be taken for the other."""

_KINDS = {bool: "a boolean", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a table"}
_EXPECTED = {**_KINDS, bool: "true or false", dict: "a table of names, each with a whole number"}
_LISTS = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of names"}


def from_text(setting: Setting, text: str) -> Value:
    """The value that a word of the command line stands for."""
    if setting.optional and text == AUTO:
        return None
    return from_data(setting, _parse(setting, text))


def from_data(setting: Setting, raw: object) -> Value:
    """The value that an entry of a file or a checkpoint stands for; types are not bent into each other."""
    if setting.optional and (raw is None or raw == AUTO):
        return None
    if setting.path == "parallel.stage_layers" and isinstance(raw, str) and "E" in raw:
        from stretto.schedule.partition import layers_of  # numpy comes with it: not for a help text

        raw = layers_of(raw)
    if setting.kind is tuple and isinstance(raw, (list, tuple)):
        found = tuple(_one(setting, setting.entry, each, raw) for each in raw)
        _require_once(setting, found)
        return cast(Value, found)
    if setting.kind is dict and isinstance(raw, tuple):
        raw = dict(raw)
    if setting.kind is dict and isinstance(raw, Mapping):
        _require_once(setting, [_one(setting, str, name, raw) for name in raw])
        return tuple((str(name), cast(int, _one(setting, int, number, raw))) for name, number in raw.items())
    return cast(Value, _one(setting, setting.kind, raw, raw))


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that looks most like it, if any does. Dashes in front, which all flags share, do not count."""
    bare = {each.lstrip("-"): each for each in known}
    return next((bare[each] for each in get_close_matches(word.lstrip("-"), bare, n=1, cutoff=_ALIKE)), None)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A closing question with the nearest known word, or nothing."""
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""


def repaired(setting: Setting, raw: object) -> Value:
    """The legal value nearest to what was meant, for the hint that goes with a rejection."""
    if setting.kind in (int, float) and isinstance(raw, (int, float, str)) and not isinstance(raw, bool):
        try:
            return _clamped(setting, float(raw))
        except (ValueError, OverflowError):
            return setting.default
    if setting.kind is bool:
        return {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}.get(
            str(raw).lower(), setting.default
        )
    if setting.choices and setting.kind is str and isinstance(raw, str):
        peer = choice_of(setting.name, raw)
        return (peer.ours if peer else nearest(raw, setting.choices)) or setting.default
    return setting.default


def _clamped(setting: Setting, x: float) -> Value:
    limits = setting.bounds.given()
    x = min(max(x, limits.get("at_least", x)), limits.get("at_most", math.inf))
    if not math.isfinite(x) or x not in setting.bounds:  # an open bound has no nearest value
        return setting.default
    return round(x) if setting.kind is int else float(x)


def _parse(setting: Setting, text: str) -> object:
    """A word as data of the setting's kind where it looks like one, and as text where not."""
    if setting.kind is bool:
        return {"true": True, "false": False}.get(text, text)
    if setting.kind is str:
        return text
    try:
        if setting.kind is dict:
            return {name: int(number) for name, _, number in _words(text, "=")}
        if setting.kind is tuple:
            return [setting.entry(entry) for entry, *_ in _words(text, "=" if setting.entry is str else ",")]
        return int(text) if setting.kind is int else float(text)
    except ValueError:
        return text


def _words(text: str, within: str) -> list[tuple[str, str, str]]:
    """The parts of a list, each parted once more; none of an empty text."""
    return [part.partition(within) for part in text.split(",")] if text else []


def _one(setting: Setting, kind: type, raw: object, whole: object) -> object:
    """A value, or an entry of the list or table `whole`, held against the schema."""
    if kind is float and type(raw) is int:
        raw = float(raw) if abs(raw) <= sys.float_info.max else math.inf
    if isinstance(raw, float) and not math.isfinite(raw):
        raise ValueError(f"{raw} is not finite")
    if type(raw) is not kind:
        raise ValueError(_unlike(setting, whole))
    if isinstance(raw, (int, float)) and kind is not bool:
        if raw not in setting.bounds:
            raise ValueError(f"{shown(raw)} is out of range, must be {setting.bounds}")
    elif isinstance(raw, str):
        if setting.choices and raw not in setting.choices:
            raise ValueError(f"{shown(raw)} is none of {', '.join(setting.choices)}{_meant(setting, raw)}")
        _check_text(setting, raw)
    return raw


def _require_once(setting: Setting, names: Sequence[object]) -> None:
    if setting.kind is dict or setting.entry is str:
        for name in names:
            if names.count(name) > 1 and not setting.repeats:
                raise ValueError(f"{shown(name)} stands there more than once")


def _meant(setting: Setting, word: str) -> str:
    """How the rejection of a choice goes on."""
    peer = choice_of(setting.name, word)
    if peer is None:
        return did_you_mean(word, setting.choices)
    return f"; {peer.feature}: not available yet" if peer.feature else f"; did you mean {peer.ours}?"


def _check_text(setting: Setting, text: str) -> None:
    """Bytes that are no UTF-8 come as half characters: a file's name may have them."""
    if setting.is_path and not setting.repeats and not text:  # as "$TEXTS" that nobody has set: Path("") is here
        raise ValueError("'' is empty, must be a path")
    if "\0" in text:
        raise ValueError(f"{shown(text)} has a NUL character, which no text here may have")
    if not setting.is_path and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{shown(text)} is not UTF-8")


def _unlike(setting: Setting, raw: object) -> str:
    expected = _LISTS[setting.entry] if setting.kind is tuple else _EXPECTED[setting.kind]
    if raw is None:
        return f"null is no value here, must be {expected}"
    said = str(raw).lower() if isinstance(raw, bool) else shown(raw)
    return f"{said} is {_KINDS.get(type(raw), type(raw).__name__)}, must be {expected}"
