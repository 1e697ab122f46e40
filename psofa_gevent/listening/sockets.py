"""The sockets that a server listens with: how each is made, and how it ends.

Resource handling: `bind`, `bind_unix` and `duplicate` return an open socket, or close what they
made and raise. From then on it is the caller's, who calls `ListeningSocket.close`.

They run in the greenlet that calls the server's ``start``. Only `bind_unix` switches.
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
"""The blocking one, also in a patched process: it is only asked when the hub says it is ready."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ListeningSocket:
    """A socket that listens, and what goes with it."""

    socket: socket.socket
    file: UnixFile | None = None
    """What `close` is to remove."""
    is_inherited: bool = False
    """Whether somebody else made the socket, and may share it."""

    def __post_init__(self) -> None:
        track(self)

    def _let_go(self, _hub: object) -> None:
        """Close the socket, in a child process. It goes on to listen: it is the parent's."""
        self.socket.close()

    def end(self) -> None:
        """Let nobody connect any more, and remove the file of a socket that has one.

        Also where another process has a duplicate of the socket, unless somebody else made it: who
        has an inherited one may go on.
        """
        if self.file is not None:
            self.file.remove()
        if not self.is_inherited:
            with contextlib.suppress(OSError):  # it does not listen yet; or, on macOS, anyway
                self.socket.shutdown(_socket.SHUT_RDWR)

    def close(self) -> None:
        """The same, and close the socket."""
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

    SO_REUSEADDR is set, so that a restart need not wait for the connections of before to leave
    TIME_WAIT; and `reuse_port`, the system's SO_REUSEPORT, unless it is ``None``. Options that are
    set here, accepted sockets inherit.

    Raises:
        OSError: the address is in use, or not this machine's, or the family is not there.
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
    """A socket that listens on the file `path`, which it makes. Switches.

    Raises:
        OSError: a server listens there, or another file is there, or it can't be made.
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
    """Another descriptor of somebody's listening socket, which becomes non-blocking.

    That is the socket's, so its owner sees it too. All else that was set stays as it is: accepted
    sockets get the options of the settings one by one.

    Raises:
        OSError: the descriptor is none of a socket, or there is none left.
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
