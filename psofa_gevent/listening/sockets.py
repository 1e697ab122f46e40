"""The listening sockets of a server: how each is made, and how it ends.

Resource handling: `bind`, `bind_unix` and `duplicate` return a `ListeningSocket`, or close what
they made and raise. The `ListeningSocket` belongs to the caller. Its owner ends it by
`ListeningSocket.close`, or by `ListeningSocket.end` and a close of the socket (the listener).

These functions run in the greenlet that calls the server's ``start``. Only `bind_unix` switches.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import socket
from dataclasses import dataclass

from gevent import monkey

from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.hub.forking import track
from psofa_gevent.net.addresses import SocketAddress, socket_family
from psofa_gevent.net.sockopts import set_options
from psofa_gevent.net.unix import UnixFile, make_room, starting_alone
from psofa_gevent.settings import SessionSettings

__all__ = ["ListeningSocket", "bind", "bind_unix", "duplicate"]

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")
"""Python's socket, also in a patched process: it is only used when the hub says it is ready."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ListeningSocket:
    """A socket that listens, with its file and whether it was inherited."""

    socket: socket.socket
    file: UnixFile | None = None
    """The file of a Unix socket that `end` and `close` remove."""
    is_inherited: bool = False
    """Whether somebody else made the socket, and may share it."""

    def __post_init__(self) -> None:
        track(self)

    def _let_go(self, _hub: object) -> None:
        """Close the child process's copy of the socket. In the parent it goes on listening."""
        self.socket.close()

    def end(self) -> None:
        """Stop listening, and remove the file of a Unix socket.

        This also stops processes that have a duplicate of the socket. Only an inherited socket goes
        on listening, for the other processes that have it.
        """
        if self.file is not None:
            self.file.remove()
        if not self.is_inherited:
            with contextlib.suppress(OSError):  # it does not listen yet; on macOS always
                self.socket.shutdown(_socket.SHUT_RDWR)

    def close(self) -> None:
        """Call `end`, and close the socket."""
        self.end()
        self.socket.close()


def bind(
    address: SocketAddress,
    family: PsSocketAddressFamily,
    *,
    backlog: int,
    receive_buffer_size: int | None,
    reuse_port: int | None,
    settings: SessionSettings,
) -> ListeningSocket:
    """A socket that listens on `address`.

    SO_REUSEADDR is set, so that a restart need not wait until earlier connections have left
    TIME_WAIT. `reuse_port`, the number of the system's SO_REUSEPORT, is set unless it is ``None``.
    On Linux accepted sockets inherit the options that are set here.

    Raises:
        OSError: the address is in use, or not an address of this machine, or the machine does not
            have the family.
    """
    listening = _SystemSocket(socket_family(family), _socket.SOCK_STREAM)
    try:
        listening.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        if reuse_port is not None:
            listening.setsockopt(_socket.SOL_SOCKET, reuse_port, 1)
        if family is PsSocketAddressFamily.IPV6:
            listening.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 0)
        if receive_buffer_size is not None:
            # Before listen: the window scale is fixed in the handshake (tcp(7)).
            listening.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVBUF, receive_buffer_size)
        set_options(listening, settings)
        listening.bind(address)
        listening.listen(backlog)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return ListeningSocket(listening)


def bind_unix(path: str, *, backlog: int, mode: int | None) -> ListeningSocket:
    """A socket that listens on `path`, and makes that file. May switch.

    Raises:
        OSError: a server listens there, or the path is another kind of file, or the file can't be
            made.
    """
    with starting_alone(path):
        make_room(path)
        listening = _SystemSocket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        made: UnixFile | None = None
        try:
            listening.bind(path)
            made = UnixFile.of(path)
            if mode is not None:
                os.chmod(path, mode)  # nobody can connect before the next line
            listening.listen(backlog)
            listening.setblocking(False)
        except BaseException:
            ListeningSocket(listening, made).close()
            raise
    return ListeningSocket(listening, made)


def duplicate(descriptor: int) -> ListeningSocket:
    """A duplicate of a listening socket that somebody else made.

    The socket becomes non-blocking, for its other owners as well. Its options stay as they are;
    the listener sets the options of each accepted socket instead.

    Raises:
        OSError: the descriptor is not that of a socket, or the process has no descriptor left.
    """
    copy = os.dup(descriptor)
    try:
        listening = _SystemSocket(fileno=copy)
    except BaseException:
        os.close(copy)
        raise
    try:
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return ListeningSocket(listening, is_inherited=True)
