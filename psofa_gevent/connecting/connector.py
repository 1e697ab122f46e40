"""One attempt to connect: from a checked address to a connected socket, with TLS if asked for.

Runs in the greenlet that called ``connect``, and switches while a name is looked up, while the
kernel connects, and in the TLS handshake. All addresses of a name are tried one after the other, as
`socket.create_connection` does, within one timeout for all: one that does not answer gets its share
of it.
"""

from __future__ import annotations

import _socket
import errno
import os
import ssl
from time import monotonic
from typing import Any

from gevent import Timeout, get_hub, getcurrent, socket

from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.errors import PsError
from psofa_gevent.hub.forking import release, unwatch, watch
from psofa_gevent.hub.io_events import READ, WRITE
from psofa_gevent.hub.times import SHORTEST_TIMER
from psofa_gevent.net.addresses import (
    Address,
    SocketAddress,
    TcpAddress,
    UnixAddress,
    socket_family,
)
from psofa_gevent.net.sockopts import end, set_options
from psofa_gevent.settings import SessionSettings
from psofa_gevent.tls.socket import TlsSocket

__all__ = ["Connector"]


class _NotWantedError(BaseException):
    """Thrown into an attempt to connect that is to end."""


class Connector:
    """One attempt to connect; `abort` ends it from outside."""

    def __init__(
        self,
        address: Address,
        source_address: TcpAddress | None,
        settings: SessionSettings,
        error: type[PsError],
    ) -> None:
        self._address = address
        self._source_address = source_address
        self._settings = settings
        self._error = error
        self.hub = get_hub()
        self._greenlet: Any = None
        self._connecting: Any = None
        """The socket, while it is this object's: gevent's, then, for a handshake, a plain one."""
        self._tls: tuple[ssl.SSLContext, str] | None = None

    def use_tls(self, ssl_context: ssl.SSLContext, server_hostname: str) -> None:
        """Shake hands when connected, with a server of that name."""
        self._tls = ssl_context, server_hostname

    def connect(
        self, timeout: float | None, limit_text: str
    ) -> tuple[_socket.socket | TlsSocket, SocketAddress | str]:
        """A connected socket, and the address that answered.

        Args:
            timeout: seconds for all of it; ``None``: as long as the system takes.
            limit_text: the time that was asked for, as an error tells it.

        Raises:
            PsClientError, PsMultiClientError: whichever was given; host, port and cause are in it.
        """
        where = str(self._address)
        self._greenlet = getcurrent()
        limit = Timeout(None if timeout is None else max(timeout, SHORTEST_TIMER))
        try:
            limit.start()
            connected, address = self._try_all(timeout)
            if self._tls is None:
                return connected, address
            self._connecting = connected
            return _shake_hands(connected, *self._tls), address
        except ssl.SSLError as exc:
            raise self._error(f"cannot connect to {where}: TLS: {exc}") from exc
        except OSError as exc:
            raise self._error(f"cannot connect to {where}: {exc.strerror or exc}") from exc
        except Timeout as exc:
            if exc is limit:
                raise self._error(f"cannot connect to {where}: timed out {limit_text}") from None
            raise
        except _NotWantedError:
            raise self._error(f"cannot connect to {where}: disconnected meanwhile") from None
        finally:
            self._greenlet = self._connecting = None
            limit.close()
            del limit  # it, when it was raised, and this frame would keep each other alive

    def let_go(self, *, has_hub: bool) -> None:
        """Close the socket, in a child process, and wake nobody: the attempt is the parent's."""
        self._greenlet = None
        connecting, self._connecting = self._connecting, None
        if connecting is None:
            return
        if isinstance(connecting, socket.socket):
            watched: Any = connecting
            # gevent has no other way to them.
            for watcher in (watched._read_event, watched._write_event):  # noqa: SLF001
                # Else it would tell whoever waits that it is closed.
                if has_hub and watcher is not None:
                    release(watcher)
            # Not by os.close, which in a patched process waits for the hub.
            _socket.socket(fileno=connecting.detach() if has_hub else connecting.fileno()).close()
        else:
            connecting.close()

    def abort(self) -> None:
        """End the attempt, soon, with an error. In the hub's thread; does not switch."""
        if self._greenlet is not None:
            get_hub().loop.run_callback(self._throw)

    def _throw(self) -> None:
        # The greenlet may have gone on since, out of this attempt.
        if self._greenlet is not None:
            self._greenlet.throw(_NotWantedError)

    def _try_all(self, timeout: float | None) -> tuple[_socket.socket, SocketAddress | str]:
        if isinstance(self._address, UnixAddress):
            return self._try_unix(self._address.path, timeout), self._address.path
        began = monotonic()
        family = self._address.family
        addresses = self._address.resolve()
        for untried in range(len(addresses), 0, -1):
            address = addresses[-untried]
            share = None if timeout is None else (timeout - monotonic() + began) / untried
            try:
                return self._try(address, family, share), address
            except OSError:
                if untried == 1:
                    raise
        raise OSError("the name has no address")

    def _try_unix(self, path: str, timeout: float | None) -> _socket.socket:
        connecting = self._connecting = socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            set_options(connecting, self._settings)
            connecting.settimeout(None if timeout is None else max(timeout, SHORTEST_TIMER))
            connecting.connect(path)
            return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, connecting.detach())
        except BaseException:
            end(connecting)
            raise

    def _try(
        self, address: SocketAddress, family: PsSocketAddressFamily, timeout: float | None
    ) -> _socket.socket:
        number = socket_family(family)
        connecting = self._connecting = socket.socket(number, _socket.SOCK_STREAM)
        try:
            if family is PsSocketAddressFamily.IPV6:
                connecting.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 0)
            set_options(connecting, self._settings)
            if self._source_address is not None:
                connecting.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
                connecting.bind(self._source_address.resolve()[0])
            connecting.settimeout(None if timeout is None else max(timeout, SHORTEST_TIMER))
            connecting.connect(address)
            if connecting.getsockname() == connecting.getpeername():
                # Where nobody listens on a port of those that clients get, one that tries again and
                # again gets that very port in the end, and is connected with itself.
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            return _socket.socket(number, _socket.SOCK_STREAM, 0, connecting.detach())
        except BaseException:
            end(connecting)
            raise


def _shake_hands(
    connected: _socket.socket, ssl_context: ssl.SSLContext, server_hostname: str
) -> TlsSocket:
    """Go over to TLS, or close the socket. Waits in the calling greenlet."""
    try:
        connected.setblocking(False)
        tls = TlsSocket(connected, ssl_context, server_side=False, server_hostname=server_hostname)
        while True:
            try:
                tls.shake_hands()
            except BlockingIOError:
                hub = get_hub()
                watcher = watch(hub.loop.io(connected.fileno(), WRITE if tls.wants_write else READ))
                try:
                    hub.wait(watcher)
                finally:
                    unwatch(watcher)
            else:
                return tls
    except BaseException:
        end(connected)
        raise
