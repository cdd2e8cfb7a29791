"""What a peer's memory holds: weights, gradients, optimizer state, saved activations, and the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.train.peers import Peer


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by its address: views of one count once."""
    found = {}
    for t in tensors:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def of_one_step(peer: Peer) -> tuple[dict[str, int], int]:
    """Bytes by kind that the peer holds when the first backward of a step begins, and what forwards have saved then.

    Weights left out; so of as many microbatches as are under way: one, or with a pipeline this stage's warm-up.
    """
    known = {address for tensors in peer.held().values() for address in storage_bytes(tensors)}
    saved: dict[int, int] = {}
    held: dict[str, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not held and type(t) is Tensor:
            saved.update({a: n for a, n in storage_bytes([t]).items() if a not in known})
        return t

    def unpack(t: Tensor) -> Tensor:
        if not held:
            held.update(held_bytes(peer))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        peer.step()
    return held, sum(saved.values())


def held_bytes(peer: Peer) -> dict[str, int]:
    """Bytes by kind, now."""
    return {kind: sum(storage_bytes(tensors).values()) for kind, tensors in peer.held().items()}


def itemised(peer: Peer) -> dict[str, float]:
    """Bytes by item beside the measured peak; "workspace and rest" is what of the peak no item explains."""
    between = held_bytes(peer)
    peak = peer.peak_bytes  # before the hooks, which may make the peer compile again
    within, saved = of_one_step(peer)
    items: dict[str, float] = {kind: max(size, within.get(kind, 0)) for kind, size in between.items()}
    items["saved activations"] = saved
    items["workspace and rest"] = max(peak - sum(items.values()), 0) if peak else 0
    items["peak"] = peak
    return items
