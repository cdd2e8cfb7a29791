"""The key-value store over which ranks find each other: made, and joined."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

__all__ = ["TCPStore", "serve_on", "tcp_store"]


def tcp_store(host: str, port: int, *, serve: bool = False, timeout: float = 60.0) -> TCPStore:
    """A client of the store at (host, port), or with `serve` the server itself, which port 0 lets choose.

    Raises `torch.distributed.DistNetworkError` when the port is taken or the server cannot be reached.
    """
    return TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=timedelta(seconds=timeout))


def serve_on(listener: socket.socket) -> TCPStore:
    """Serve a store on a socket that listens already: who connected before waits, and no port can be lost."""
    host, port = listener.getsockname()[:2]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
