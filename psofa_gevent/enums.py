"""The enumerations of the public interface."""

from __future__ import annotations

import enum

__all__ = ["PsCloseReason", "PsOverflow", "PsRefusal", "PsSocketAddressFamily"]


class PsCloseReason(enum.Enum):
    """Why a session closed. The first reason is the one that is reported."""

    NONE = enum.auto()
    """Not closed."""
    PEER_CLOSE = enum.auto()
    """The peer closed its end (FIN), and all its data before that has been delivered."""
    SELF_CLOSE = enum.auto()
    """This end asked for the close: `close`, `abort`, `disconnect`, `destroy_bundle`."""
    FAILED = enum.auto()
    """An error: in a callback, on the socket, or a send that timed out. See `close_cause`."""
    TIMEOUT = enum.auto()
    """Nothing came from the peer for the idle time."""
    SHUTDOWN = enum.auto()
    """The server shut down."""
    REPLACED = enum.auto()
    """Its key was bound to another session: ``bind(…, replace=True)``."""


class PsOverflow(enum.Enum):
    """What happens to a `PsSession.post` when ``high_water`` bytes wait for the peer."""

    CLOSE = enum.auto()
    """The session closes with `PsCloseReason.FAILED`, and the waiting messages are dropped."""
    DROP_NEWEST = enum.auto()
    """The new message is dropped."""
    DROP_OLDEST = enum.auto()
    """Waiting messages are dropped, the oldest first, until there is room."""


class PsRefusal(enum.Enum):
    """Why a server has refused a connection, before it became a session (`PsServer.refused`)."""

    NETWORK = enum.auto()
    """Its address is in ``denied_networks``, or not in ``allowed_networks``."""
    PEER = enum.auto()
    """Its address has ``max_sessions_per_peer`` sessions."""
    FULL = enum.auto()
    """There are ``max_sessions`` sessions, with ``refuse_when_full``."""
    CALLBACK = enum.auto()
    """``on_accept`` returned ``False``, or raised."""
    PROXY = enum.auto()
    """Its address is not in ``trusted_proxies``, with ``proxy_protocol``."""


class PsSocketAddressFamily(enum.Enum):
    """The kind of sockets that a server or a client opens.

    On `IPV6` the sockets are dual-stack (RFC 3493, section 5.3: ``IPV6_V6ONLY`` off): a server is
    reached over IPv4 too, and a client reaches IPv4 hosts as IPv4-mapped addresses.
    """

    IPV4 = enum.auto()
    IPV6 = enum.auto()
