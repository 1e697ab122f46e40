"""The two enumerations of the public interface."""

from __future__ import annotations

import enum

__all__ = ["PsCloseReason", "PsSocketAddressFamily"]


class PsCloseReason(enum.Enum):
    """Why a session closed. The first reason that comes up is the one reported."""

    NONE = enum.auto()
    """Not closed."""
    PEER_CLOSE = enum.auto()
    """The peer closed its end (FIN), and all that it sent before has been delivered."""
    SELF_CLOSE = enum.auto()
    """This end asked for it: `close`, `abort`, `disconnect`, `destroy_bundle`."""
    FAILED = enum.auto()
    """An error: in a callback, on the socket, a send that timed out. See `close_cause`."""
    TIMEOUT = enum.auto()
    """Nothing came from the peer for the idle time."""
    SHUTDOWN = enum.auto()
    """The server shut down."""


class PsSocketAddressFamily(enum.Enum):
    """Which sockets a server or a client opens.

    On `IPV6` the sockets are dual-stack (RFC 3493, section 5.3: ``IPV6_V6ONLY`` off): a server is
    reached over IPv4 too, and a client reaches IPv4 hosts as IPv4-mapped addresses.
    """

    IPV4 = enum.auto()
    IPV6 = enum.auto()
