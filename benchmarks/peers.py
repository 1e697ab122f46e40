"""The peers: each is one way to write the same server."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["C_SERVER", "OURS", "PEERS", "Peer", "before", "missing_requirement", "peers_of"]

OURS = ("psofa", "psofa-async")
BEFORE = "-before"

C_SERVER = "c"
"""The load generator's own server: shows the most that the load generator can do."""


@dataclass(frozen=True)
class Peer:
    """One kind of server.

    Attributes:
        name: its name in ``--peers`` and in the JSON file.
        label: its name in tables and plots.
        module: its module in ``benchmarks.servers``; empty for the C server.
        variant: the variant of the module.
        requires: the package that must be installed, if any.
        delivers_closes: at SIGUSR1 it closes all sessions, and reports the calls of ``on_close``.
        checkout: the one whose package and servers run; None: this one.
    """

    name: str
    label: str
    module: str = ""
    variant: str = ""
    requires: str = "gevent"
    delivers_closes: bool = False
    checkout: Path | None = None

    @property
    def served_as(self) -> str:
        """What the peer is called where it runs."""
        return self.name.removesuffix(BEFORE)


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


def before(name: str) -> str:
    """What the peer `name` of another checkout is called."""
    return name + BEFORE


def peers_of(checkout: Path) -> Iterator[Peer]:
    """Our own servers, as `checkout` has them."""
    for name in OURS:
        peer = PEERS[name]
        yield replace(peer, name=before(name), label=f"{peer.label}, before", checkout=checkout)


def missing_requirement(peer: Peer) -> str | None:
    """The package that `peer` needs, if it is not installed."""
    if peer.requires and importlib.util.find_spec(peer.requires) is None:
        return peer.requires
    return None
