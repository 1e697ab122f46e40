"""Making a connection: from a checked address to an open session, for both clients.

Runs in the greenlet that called ``connect``, and switches while a name is looked up and while the
kernel connects. All addresses are tried in turn, as `socket.create_connection` does, within one
timeout for all: an address that does not answer gets its share of it.
"""

from __future__ import annotations

import _socket
import errno
import os
import ssl
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from gevent import Timeout, get_hub, getcurrent, socket

from psofa_gevent.callback import PsCallback
from psofa_gevent.checks import check_hostname, check_instance, check_ssl_context
from psofa_gevent.connecting.reconnect import Link, PsReconnect, check_reconnect
from psofa_gevent.connecting.settings import ConnectingSettings
from psofa_gevent.enums import PsSocketAddressFamily
from psofa_gevent.errors import PsError
from psofa_gevent.hub.forking import keep, release, unwatch, watch
from psofa_gevent.hub.times import SHORTEST_TIMER
from psofa_gevent.messages import M
from psofa_gevent.net.addresses import (
    Address,
    SocketAddress,
    TcpAddress,
    UnixAddress,
    check_address,
    socket_family,
)
from psofa_gevent.net.sockopts import end, set_options
from psofa_gevent.owner.base import SessionOwner
from psofa_gevent.owner.manager import SessionManager
from psofa_gevent.session.session import PsSession
from psofa_gevent.settings import SessionSettings
from psofa_gevent.tls.socket import TlsSocket

if TYPE_CHECKING:
    from gevent.hub import Hub

    from psofa_gevent.session.session import Owner

__all__ = ["ConnectingOwner", "Target"]

READ, WRITE = 1, 2
"""The event masks of gevent's io watchers."""


@dataclass(frozen=True, slots=True)
class Target:
    """What to connect to, and how: checked, so that an attempt has nothing more to check.

    Attributes:
        endpoints: tried in turn.
        source_address: what to bind to before; ``None``: whatever the system chooses.
        server_hostname: with TLS, what the certificate must be for; ``None``: the host.
        connection_id: the session's id; ``None``: a random one.
    """

    endpoints: tuple[Address, ...]
    source_address: TcpAddress | None
    server_hostname: str | None
    connection_id: uuid.UUID | None = None

    def with_id(self, connection_id: object) -> Target:
        """The same with an id for its session.

        Raises:
            TypeError: that is no `uuid.UUID`.
        """
        if connection_id is not None and not isinstance(connection_id, uuid.UUID):
            raise TypeError(f"connection_id must be a uuid.UUID or None, not {connection_id!r}")
        return replace(self, connection_id=connection_id)

    def __str__(self) -> str:
        return ", ".join(map(str, self.endpoints))


class ConnectingOwner(SessionOwner[M]):
    """The base of `PsClient` and `PsMultiClient`."""

    def __init__(
        self,
        callback: PsCallback[M],
        settings: ConnectingSettings,
        error: type[PsError],
    ) -> None:
        super().__init__(callback, settings)
        self._error = error
        self._ssl_context = _context(settings.ssl_context)
        self._reconnect = check_reconnect(settings.reconnect)
        self._connectors: set[Connector] = set()
        self._links: set[Link] = set()

    def _target(
        self,
        host: str,
        port: int,
        family: PsSocketAddressFamily,
        *,
        endpoints: Sequence[tuple[str, int]],
        source_address: tuple[str, int] | None,
        server_hostname: str | None,
    ) -> Target:
        """What the arguments of a client, or of a connect, ask for.

        Raises:
            TypeError, ValueError: an argument is not what it should be.
        """
        target = Target(
            (
                check_address(host, port, family, least_port=1),
                *_check_endpoints(endpoints, family),
            ),
            _check_source_address(source_address, family),
            server_hostname,
        )
        for address in target.endpoints:
            if source_address is not None and isinstance(address, UnixAddress):
                raise ValueError(f"source_address={source_address!r} is for TCP, not for {address}")
            _check_server_hostname(self._ssl_context, server_hostname, address)
        return target

    def _start(self) -> SessionManager:
        """Run ``on_start``; an exception from it undoes the start."""
        manager = self._manager = self._new_manager()
        with self._starting(manager):
            manager.callbacks.on_start(cast("Owner", self))
            manager.has_started = True
        return manager

    def _connect(
        self,
        manager: SessionManager,
        target: Target,
        timeout: float | None,
        each: float | None = None,
    ) -> PsSession[Any]:
        """Connect to the first endpoint that answers.

        Each within its share of `timeout`; without one, within `each` seconds.
        """
        self._check_thread(manager)
        began = monotonic()
        errors: list[PsError] = []
        try:
            with manager.entrance():
                for untried in range(len(target.endpoints), 0, -1):
                    share, limit = each, f"after {each:g} s" if each is not None else ""
                    if timeout is not None:
                        share = max(timeout - monotonic() + began, 0.0) / untried
                        is_alone = len(target.endpoints) == 1
                        limit = f"after {'' if is_alone else 'its share of '}{timeout:g} s"
                    try:
                        endpoint = target.endpoints[-untried]
                        return self._connect_to(manager, target, endpoint, share, limit)
                    except self._error as exc:
                        errors.append(exc)
                        if not self._is_still_wanted(manager):
                            raise
            if len(errors) == 1:
                raise errors[0]
            raise self._error("; ".join(str(error) for error in errors)) from errors[-1]
        finally:
            # They and the frames of this and its callers would keep each other alive, and a session
            # that came of a later one with them.
            errors.clear()

    def _check_thread(self, manager: SessionManager) -> None:
        if not manager.thread.is_current():
            raise self._error(f"{self!r}: connect belongs to the thread in which it was started")

    def _connect_to(
        self,
        manager: SessionManager,
        target: Target,
        endpoint: Address,
        timeout: float | None,
        limit: str,
    ) -> PsSession[Any]:
        connector = Connector(endpoint, target.source_address, self._settings, self._error)
        if self._ssl_context is not None:
            connector.use_tls(self._ssl_context, target.server_hostname or endpoint.host)
        self._connectors.add(connector)
        where = str(endpoint)
        try:
            self._check_still_wanted(manager, where)
            sock, address = connector.connect(timeout, limit)
        finally:
            self._connectors.discard(connector)
        try:
            self._check_still_wanted(manager, where)
            return manager.open(sock, address, target.connection_id)
        except BaseException as exc:
            end(sock)
            if isinstance(exc, OSError):
                raise self._error(f"cannot connect to {where}: {exc.strerror or exc}") from exc
            raise

    def _new_link(self, manager: SessionManager, target: Target, policy: PsReconnect) -> Link:
        """What stays connected to `target`, and begins at once."""
        self._check_thread(manager)
        self._check_still_wanted(manager, str(target))

        def connect(timeout: float | None) -> PsSession[Any]:
            return self._connect(manager, target, None, timeout)

        link = Link(manager, policy, self._error, str(target), connect, self._link_ended)
        self._links.add(link)
        link.start()
        return link

    def _link_ended(self, link: Link) -> None:
        """It connects no more. Does not switch."""
        self._links.discard(link)

    def _is_still_wanted(self, manager: SessionManager) -> bool:
        return self._manager is manager and manager.stop is None

    def _check_still_wanted(self, manager: SessionManager, where: str) -> None:
        if not self._is_still_wanted(manager):
            raise self._error(f"cannot connect to {where}: disconnected meanwhile")

    def _let_go(self, hub: Hub | None) -> None:
        super()._let_go(hub)
        for connector in self._connectors:
            connector.let_go(has_hub=hub is connector.hub)
        keep(*self._connectors, *self._links)
        self._connectors.clear()
        for link in list(self._links):
            link.let_go()
            self._link_ended(link)

    def _bar_entrance(self) -> None:
        for link in list(self._links):
            link.stop()
        for connector in list(self._connectors):
            connector.abort()

    def _close_entrance(self) -> None:
        self._bar_entrance()

    def _stopped(self) -> None:
        super()._stopped()
        for link in list(self._links):  # the hub was destroyed, and they with it
            link.has_ended = True
            self._link_ended(link)


def _context(ssl_context: ssl.SSLContext | bool | None) -> ssl.SSLContext | None:
    """The context of a client; True: the system's certificates verify the server."""
    if ssl_context is True:
        return ssl.create_default_context()
    if ssl_context is False:
        raise TypeError("ssl_context must be an ssl.SSLContext, True or None, not False")
    check_ssl_context("ssl_context", ssl_context, server_side=False)
    return ssl_context


def _check_endpoints(endpoints: object, family: PsSocketAddressFamily) -> list[Address]:
    """The further hosts and ports that a client was given."""
    error = f"endpoints must be hosts and ports, such as [('example.org', 8710)], not {endpoints!r}"
    if not isinstance(endpoints, (list, tuple)):
        raise TypeError(error)
    checked = []
    for endpoint in endpoints:
        if not isinstance(endpoint, tuple) or len(endpoint) != 2:
            raise TypeError(error)
        checked.append(check_address(*endpoint, family, least_port=1))
    return checked


def _check_source_address(
    source_address: object, family: PsSocketAddressFamily
) -> TcpAddress | None:
    """Where a client connects from."""
    if source_address is None:
        return None
    if not isinstance(source_address, tuple) or len(source_address) != 2:
        raise TypeError(f"source_address must be a host and a port, not {source_address!r}")
    address = check_address(*source_address, family, least_port=0)
    if isinstance(address, UnixAddress):
        raise ValueError(f"source_address={source_address!r} is for TCP")
    return address


def _check_server_hostname(
    ssl_context: ssl.SSLContext | None, server_hostname: object, address: Address
) -> None:
    """Raise for a name that is none, that no TLS would check, or that is missing."""
    if server_hostname is not None:
        check_instance("server_hostname", server_hostname, str)
        if not server_hostname:
            raise ValueError("server_hostname must not be empty")
        if ssl_context is None:
            raise ValueError(f"server_hostname={server_hostname!r} is for TLS: give an ssl_context")
    elif ssl_context is not None and isinstance(address, UnixAddress):
        raise ValueError(f"server_hostname must be given for TLS over {address.host!r}")
    if ssl_context is not None:
        check_hostname("server_hostname", server_hostname or address.host, ssl_context)


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
            for watcher in (watched._read_event, watched._write_event):
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
