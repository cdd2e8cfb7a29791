"""A module whose weights lie in buckets: what would read or move them behind the back of the buckets is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stretto.distributed.bucket import Bucket

WITHIN: Final = "within `with sharded.whole():`, on all ranks together"


class HandedOver:
    """Guards of the modules with parameters in `home`, until `close`.

    `state_dict` waits for weights that are on their way, and is a RuntimeError where they have no memory (reading such
    ends the process); so are `load_state_dict`, `deepcopy`, and `to`, `half` and the like where they change something:
    shards and masters would not follow.
    """

    def __init__(self, modules: Iterable[nn.Module], home: Mapping[nn.Parameter, Bucket]) -> None:
        self._hooks: list[RemovableHandle] = []
        self._held: dict[nn.Module, list[Bucket]] = {}
        for part in dict.fromkeys(part for module in modules for part in module.modules()):
            self._held[part] = buckets = list(
                dict.fromkeys(home[p] for p in part.parameters(recurse=False) if p in home)
            )
            part.__dict__["__deepcopy__"] = _copy
            if buckets:
                part.__dict__["_apply"] = partial(_apply, part)
                self._hooks += [
                    part.register_state_dict_pre_hook(partial(_read, buckets)),  # type: ignore[no-untyped-call]
                    part.register_load_state_dict_pre_hook(_load),  # type: ignore[no-untyped-call]
                ]

    def close(self) -> None:
        """The module is its owner's again; where its weights were sharded, a call of it is a RuntimeError."""
        for hook in self._hooks:
            hook.remove()
        for part, buckets in self._held.items():
            for name in ("__deepcopy__", "_apply"):
                part.__dict__.pop(name, None)
            if any(bucket.sharding.params for bucket in buckets):
                part.register_forward_pre_hook(_gone)
                part.register_state_dict_pre_hook(_gone)  # type: ignore[no-untyped-call]
        self._held.clear()


def require_own(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError for a module whose weights lie in buckets already, and for weights that have no values."""
    for module in modules:
        if any("__deepcopy__" in part.__dict__ and part.__deepcopy__ is _copy for part in module.modules()):
            raise ValueError("the module is handed over already: close() what holds it, or leave its `with` block")
        if empty := [name for name, param in module.named_parameters() if param.is_meta]:
            raise ValueError(
                f"{', '.join(empty[:3])}{' and more' if len(empty) > 3 else ''} lie on the meta device, without "
                "values: give them memory (to_empty) and values before the module is handed over"
            )


def unlike_shard(bucket: Bucket) -> list[str]:
    """Parameters of which whole weights are not what this rank's shard has: written to behind its back."""
    if not (bucket.sharding.params and bucket.whole):
        return []
    gathered = bucket.weights[bucket.own.start : bucket.own.stop]
    found = []
    for item in bucket.items:
        now, kept = (bucket.part(x, item.param).flat.view(torch.uint8) for x in (gathered, bucket.shard))  # NaN too
        if not torch.equal(now, kept):
            found.append(item.name)
    return found


def _read(buckets: Sequence[Bucket], *_: Any) -> None:
    for bucket in buckets:
        if not bucket.whole:
            raise RuntimeError(f"weights are sharded: take the state_dict {WITHIN}")
        bucket.arrive()


def _gone(*_: Any) -> None:
    raise RuntimeError(f"its sharded weights went with what held them: read or save them before that, {WITHIN}")


def _load(*_: Any) -> None:
    raise RuntimeError(
        "weights lie in buckets, whose masters and shards would not follow: call load_state_dict before the module is "
        "handed over, or load a checkpoint of stretto"
    )


def _copy(_memo: dict[int, Any]) -> nn.Module:
    raise RuntimeError(f"weights lie in buckets, and are not copied with their module: take its state_dict {WITHIN}")


def _apply(part: nn.Module, function: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
    """`nn.Module._apply`, which `to`, `cuda` and `half` are made of, where it leaves parameters as they are."""
    for param in part.parameters(recurse=False):
        probe = torch.empty(0, dtype=param.dtype, device=param.device)
        if (new := function(probe)) is not probe:
            raise RuntimeError(
                f"weights lie in buckets of {param.dtype} on {param.device}, and are not moved or cast to {new.dtype} "
                f"on {new.device}: do that before the module is handed over"
            )
    return cast("nn.Module", type(part)._apply(part, function, *args, **kwargs))  # type: ignore[no-untyped-call]
