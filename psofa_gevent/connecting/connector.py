"""The connector: one attempt to connect, from a checked address to a connected socket.

It runs in the greenlet that called ``connect``, or in that of a link. It switches during the lookup
of a name, while the kernel connects, and in the TLS handshake, if there is one. All addresses of a
name are tried one after the other, as `socket.create_connection` does, within one timeout for all;
an address that does not answer uses up only its share of it.
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
from psofa_gevent.hub.io_masks import READ, WRITE
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
    """Thrown into the greenlet of an attempt to connect, to end the attempt."""


class Connector:
    """One attempt to connect, which `abort` ends from another greenlet."""

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
        """The socket that this object owns now: gevent's, or, in a TLS handshake, a plain one."""
        self._tls: tuple[ssl.SSLContext, str] | None = None

    def use_tls(self, ssl_context: ssl.SSLContext, server_hostname: str) -> None:
        """After connecting, do a TLS handshake with a server named `server_hostname`."""
        self._tls = ssl_context, server_hostname

    def connect(
        self, timeout: float | None, limit_text: str
    ) -> tuple[_socket.socket | TlsSocket, SocketAddress | str]:
        """Connect. Switches.

        Args:
            timeout: seconds for the whole attempt; ``None``: as long as the system takes.
            limit_text: the time limit in words, for the error.

        Returns:
            The connected socket, and the address that answered.

        Raises:
            PsClientError, PsMultiClientError: the attempt failed; it is the class that the
                constructor was given, and its text has host, port and cause.
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
            del limit  # if it was raised, it and this frame would keep each other alive

    def let_go(self, *, has_hub: bool) -> None:
        """Close the child process's copy of the socket, and wake no greenlet.

        Args:
            has_hub: whether `hub` is the child's; otherwise it is not touched.
        """
        self._greenlet = None
        connecting, self._connecting = self._connecting, None
        if connecting is None:
            return
        if isinstance(connecting, socket.socket):
            watched: Any = connecting
            # gevent has no public way to the watchers.
            for watcher in (watched._read_event, watched._write_event):  # noqa: SLF001
                # Otherwise gevent would wake the greenlets that wait for the socket.
                if has_hub and watcher is not None:
                    release(watcher)
            # Not with os.close, which waits for the hub in a patched process.
            _socket.socket(fileno=connecting.detach() if has_hub else connecting.fileno()).close()
        else:
            connecting.close()

    def abort(self) -> None:
        """Have the attempt end soon, with an error. In the hub's thread; does not switch."""
        if self._greenlet is not None:
            get_hub().loop.run_callback(self._throw)

    def _throw(self) -> None:
        # The greenlet may have left this attempt since.
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
                # If no server listens on a port of the ephemeral range, a client that tries again
                # and again gets that very port in the end, and is connected with itself.
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            return _socket.socket(number, _socket.SOCK_STREAM, 0, connecting.detach())
        except BaseException:
            end(connecting)
            raise


def _shake_hands(
    connected: _socket.socket, ssl_context: ssl.SSLContext, server_hostname: str
) -> TlsSocket:
    """Do the TLS handshake as a client, or close the socket and raise. Switches while it waits."""
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
