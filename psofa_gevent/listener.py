"""The listening socket of a server, and gevent's `StreamServer` that accepts from it.

Resource handling: `bind` makes the socket and closes it again if it fails; `Listener.close` closes
it at the end. An accepted socket belongs to its session as soon as there is one.

Error handling: whatever accept(2) says, accepting pauses, from 10 ms to a second, and starts again
by itself. Mostly that is a lack of descriptors or memory: the connections wait in the backlog, no
session notices, and a warning tells, once a minute at most. While the pool is full, `StreamServer`
does not even accept.

If the listening socket itself is gone, that is an error in the log, and the open sessions go on.

But for `bind`, `pause` and `resume`, all of it runs in the hub, where nothing may block or raise.
"""

from __future__ import annotations

import _socket
import errno
import logging
import os
import socket
from time import monotonic
from typing import Any

from gevent import monkey
from gevent.server import StreamServer

from psofa_gevent.addresses import SocketAddress, socket_family
from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.hub_thread import log_from_hub
from psofa_gevent.manager import SessionManager
from psofa_gevent.settings import SessionSettings
from psofa_gevent.tcp import ARE_INHERITED, endpoint, set_options
from psofa_gevent.unix_sockets import UnixFile, make_room

__all__ = ["Listener", "bind", "bind_unix"]

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")
"""The blocking one, also in a patched process: it is only asked when the hub says it is ready."""

EVERY_ADDRESS = frozenset({"0.0.0.0", "::", "::ffff:0.0.0.0"})
"""Hosts that are no address of an accepted socket."""
LISTENER_IS_GONE = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})
WARNING_PERIOD = 60.0
"""Seconds from one warning to the next: a server at its limit fails and heals many times in it."""


def bind(
    address: SocketAddress,
    family: PsSocketAddressFamily,
    *,
    backlog: int,
    receive_buffer_size: int | None,
    settings: SessionSettings,
) -> socket.socket:
    """A socket that listens on `address`.

    SO_REUSEADDR is set, so that a restart need not wait for the connections of before to leave
    TIME_WAIT. Options that are set here, accepted sockets inherit.

    Raises:
        OSError: the address is in use, or not this machine's, or the family is not there.
    """
    listening = _SystemSocket(socket_family(family), _socket.SOCK_STREAM)
    try:
        listening.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
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
    return listening


def bind_unix(path: str, *, backlog: int, mode: int | None) -> socket.socket:
    """A socket that listens on the file `path`, which it makes.

    Raises:
        OSError: a server listens there, or another file is there, or it can't be made.
    """
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
        if made is not None:
            made.remove()
        listening.close()
        raise
    return listening


class Listener(StreamServer):
    """Accepts connections and hands them to a manager, while its pool has room."""

    def __init__(self, listening: socket.socket, manager: SessionManager) -> None:
        self._manager = manager
        self._paused = False
        self._backoff = self.min_delay
        self._next_warning = monotonic()
        # As plain numbers, which a socket's own properties are not.
        self._kind = int(listening.family), int(listening.type), listening.proto
        name = listening.getsockname()
        self.endpoint = endpoint(name)
        """What it is bound to."""
        knows = self.endpoint is not None and self.endpoint[0] not in EVERY_ADDRESS
        self._local_endpoint = self.endpoint if knows else None
        """That of all accepted sockets, if the server listens on one address only."""
        self._file = UnixFile.of(name) if listening.family == _socket.AF_UNIX else None
        super().__init__(listening, handle=_never_called, spawn=manager.pool)

    def close(self) -> None:
        """Close the socket, and remove the file of one that has one."""
        if self._file is not None:
            self._file.remove()
        super().close()

    def pause(self) -> None:
        """Accept nothing more. From any OS thread: a flag that is looked at before each accept."""
        self._paused = True

    def resume(self) -> None:
        """Accept again. From any OS thread."""
        self._paused = False
        self._manager.thread.call_soon(self._try_accepting)

    def _try_accepting(self) -> None:
        if self.started:
            self.start_accepting()

    def start_accepting(self) -> None:
        """Watch for connections, unless paused. Called by gevent too, after a pause of its own."""
        if not self._paused:
            super().start_accepting()

    def do_read(  # type: ignore[override]  # no gevent socket, which would cost two watchers
        self,
    ) -> tuple[_socket.socket, Any] | None:
        """Accept one connection; ``None`` when there is none, or none may be accepted now."""
        if self._paused:
            self.stop_accepting()
            return None
        listening: Any = self.socket
        try:
            descriptor, address = listening._accept()
        except BlockingIOError:
            return None
        except OSError as exc:
            self._accept_failed(exc)
            return None
        self._backoff = self.min_delay
        return _socket.socket(*self._kind, descriptor), address

    def do_handle(self, accepted: _socket.socket, address: Any) -> None:
        """Give an accepted connection to the manager."""
        try:
            if not ARE_INHERITED:
                set_options(accepted, self._manager.settings)
            self._manager.open(accepted, address, None, self._local_endpoint)
        except OSError as exc:
            # Reset before it could be looked at.
            accepted.close()
            log_from_hub(logging.DEBUG, "%s: gone before it began: %s", address, exc)
        except Exception as exc:
            accepted.close()
            log_from_hub(logging.ERROR, "%s: could not be started", address, exc_info=exc)

    def _accept_failed(self, exc: OSError) -> None:
        owner = self._manager.owner
        self.stop_accepting()
        if exc.errno in LISTENER_IS_GONE:
            log_from_hub(logging.ERROR, "%r: the listening socket is gone: %s", owner, exc)
            return
        if self._backoff == self.min_delay:
            log_from_hub(
                self._level(exc),
                "%r: cannot accept: %s; connections wait in the backlog until it can",
                owner,
                exc,
            )
        self._timer = self.loop.timer(self._backoff)
        self._timer.start(self._try_accepting)
        self._backoff = min(self.max_delay, self._backoff * 2)

    def _level(self, exc: OSError) -> int:
        """How loudly to tell that accepting has paused."""
        now = monotonic()
        if exc.errno == errno.ECONNABORTED or now < self._next_warning:
            return logging.DEBUG
        self._next_warning = now + WARNING_PERIOD
        return logging.WARNING


def _never_called(_accepted: object, _address: object) -> None:
    """`StreamServer` wants a handler; `Listener.do_handle` does its work."""
