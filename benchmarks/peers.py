"""Who takes part: each peer is one way to write the same server."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

__all__ = ["C_SERVER", "PEERS", "Peer", "missing_requirement"]

C_SERVER = "c"
"""The server mode of the load generator: shows what the load generator is able to."""


@dataclass(frozen=True)
class Peer:
    """One kind of server.

    Attributes:
        name: what ``--peers`` and the JSON file call it.
        label: what tables and plots call it.
        module: the one of ``benchmarks.servers`` that serves it; empty for the C server.
        variant: which of the module's variants.
        requires: the package that must be installed, if any.
        delivers_closes: at SIGUSR1 it closes all sessions, and tells how many were told.
    """

    name: str
    label: str
    module: str = ""
    variant: str = ""
    requires: str = "gevent"
    delivers_closes: bool = False


PEERS = {
    peer.name: peer
    for peer in (
        Peer("psofa", "psofa_gevent, sync", "psofa", "sync", delivers_closes=True),
        Peer("psofa-async", "psofa_gevent, async", "psofa", "async"),
        Peer("psofa-alone", "psofa_gevent, each reply alone", "psofa", "alone"),
        Peer("gevent", "gevent StreamServer", "gevent_loop"),
        Peer("asyncio", "asyncio Protocol", "protocols", "asyncio", ""),
        Peer("asyncio-streams", "asyncio streams", "streams", "asyncio", ""),
        Peer("uvloop", "uvloop Protocol", "protocols", "uvloop", "uvloop"),
        Peer("uvloop-streams", "uvloop streams", "streams", "uvloop", "uvloop"),
        Peer("twisted", "Twisted Protocol", "twisted_protocol", requires="twisted"),
        Peer(C_SERVER, "C server on epoll", requires=""),
    )
}


def missing_requirement(peer: Peer) -> str | None:
    """The package that `peer` needs and that is not installed."""
    if peer.requires and importlib.util.find_spec(peer.requires) is None:
        return peer.requires
    return None
