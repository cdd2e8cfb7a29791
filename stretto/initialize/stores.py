"""The key-value store over which ranks find each other: made, and joined."""

from __future__ import annotations

import errno
import socket
from datetime import timedelta
from ipaddress import ip_address
from typing import Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

__all__ = ["TCPStore", "address_of", "listen", "serve_on", "tcp_store"]

BACKLOG: Final = 4096
"""Connections that may wait: all ranks of a job come at once."""


def tcp_store(host: str, port: int, *, timeout: float = 60.0) -> TCPStore:
    """A client of the store at (host, port).

    Raises `torch.distributed.DistNetworkError` when the server cannot be reached.
    """
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))


def listen(host: str, port: int, *, several_hosts: bool) -> socket.socket:
    """A socket that listens at the address `host` has on this machine, and at no other; port 0 lets the system choose.

    All addresses only where `host` is none of this machine's (a service or a forwarded address), or where other hosts
    must come in by a name that is the loopback address here, as Debian gives a host for its own.
    Raises OSError when the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    for family, _, _, _, where in found:
        if several_hosts and ip_address(where[0]).is_loopback:
            continue
        try:
            return socket.create_server((str(where[0]), port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", port), backlog=BACKLOG)


def address_of(listener: socket.socket) -> str:
    """Where a client of this machine reaches a socket that listens."""
    host: str = listener.getsockname()[0]
    return {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(host, host)


def serve_on(listener: socket.socket) -> TCPStore:
    """Serve a store on a socket that listens already: who connected before waits, and no port can be lost."""
    host, port = address_of(listener), listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
