"""`state_dict` and `load_state_dict` of modules whose weights lie in buckets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from stretto.distributed.bucket import Bucket


def watch_state_dicts(modules: Iterable[nn.Module], home: Mapping[nn.Parameter, Bucket]) -> list[RemovableHandle]:
    """Let each of these modules that has parameters in `home` read them when they are there, and load none."""
    hooks: list[RemovableHandle] = []
    for part in dict.fromkeys(part for module in modules for part in module.modules()):
        if buckets := list(dict.fromkeys(home[p] for p in part.parameters(recurse=False) if p in home)):
            hooks.append(part.register_state_dict_pre_hook(partial(_read, buckets)))  # type: ignore[no-untyped-call]
            hooks.append(part.register_load_state_dict_pre_hook(_load))  # type: ignore[no-untyped-call]
    return hooks


def _read(buckets: Sequence[Bucket], *_: Any) -> None:
    """Wait for weights that are on their way. Raise RuntimeError for those without memory: reading ends the process."""
    for bucket in buckets:
        if not bucket.whole:
            raise RuntimeError(
                "weights are sharded: take the state_dict within `with sharded.whole():`, on all ranks together"
            )
        bucket.arrive()


def _load(*_: Any) -> None:
    """Raise RuntimeError: the optimizer's masters, and the shards, would not follow."""
    raise RuntimeError(
        "weights lie in buckets, whose masters and shards would not follow: call load_state_dict before the module is "
        "handed over, or load a checkpoint of stretto"
    )
