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


def saved_bytes(peer: Peer) -> int:
    """Bytes that forwards save for the backwards of one step, up to the first backward; weights left out.

    So of as many microbatches as are under way then: one, or with a pipeline this stage's warm-up.
    """
    known = {address for tensors in peer.held().values() for address in storage_bytes(tensors)}
    saved: dict[int, int] = {}
    backward = False

    def pack(t: Tensor) -> Tensor:
        if not backward and type(t) is Tensor:
            saved.update({a: n for a, n in storage_bytes([t]).items() if a not in known})
        return t

    def unpack(t: Tensor) -> Tensor:
        nonlocal backward
        backward = True
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        peer.step()
    return sum(saved.values())


def itemised(peer: Peer) -> dict[str, float]:
    """Bytes by item beside the measured peak; "workspace and rest" is what of the peak no item explains."""
    items: dict[str, float] = {kind: sum(storage_bytes(tensors).values()) for kind, tensors in peer.held().items()}
    peak = peer.peak_bytes  # before the hooks below, which may make the peer compile again
    items["saved activations"] = saved_bytes(peer)
    items["workspace and rest"] = max(peak - sum(items.values()), 0) if peak else 0
    items["peak"] = peak
    return items
