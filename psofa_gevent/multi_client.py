"""The client of many connections, which share one idle timer and one close greenlet."""

from __future__ import annotations

import _socket
import ssl
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Generic, Self, Unpack, overload

from psofa_gevent.callback import PsCallback
from psofa_gevent.checks import check_instance, check_seconds
from psofa_gevent.connecting.base import ConnectingOwner
from psofa_gevent.connecting.link import Link
from psofa_gevent.connecting.reconnect import PsReconnect
from psofa_gevent.connecting.settings import ConnectingSettings
from psofa_gevent.enums import PsCloseReason, PsOverflow, PsSocketAddressFamily
from psofa_gevent.errors import PsMultiClientError
from psofa_gevent.framing import Framing
from psofa_gevent.messages import M
from psofa_gevent.net.addresses import format_address
from psofa_gevent.net.sockopts import set_options
from psofa_gevent.owner.manager import SessionManager
from psofa_gevent.session.session import PsSession
from psofa_gevent.settings import Heartbeat, SessionKeywords, in_effect

__all__ = ["PsMultiClient", "PsMultiClientConnection"]


class PsMultiClientConnection(Generic[M]):
    """One connection of a `PsMultiClient`; `PsMultiClient.connect` makes it.

    Attributes:
        host: the host that `PsMultiClient.connect` was given.
        port: the port that it was given.
    """

    __slots__ = ("_link", "_session", "host", "port")

    def __init__(
        self, host: str, port: int, session: PsSession[M] | None, link: Link | None
    ) -> None:
        self.host = host
        self.port = port
        self._session = session
        self._link = link

    def __repr__(self) -> str:
        session = self._session if self._link is None else self._link.session
        return f"<PsMultiClientConnection {format_address(self.host, self.port)} {session!r}>"

    @property
    def session(self) -> PsSession[M] | Any:
        """The session; with ``reconnect`` the last one. It may have closed.

        ``None`` only if there was no session yet, which can only be after
        `PsMultiClient.connect_in_background`. So its type lets type checkers take it for a session.
        """
        return self._session if self._link is None else self._link.session

    def wait_connected(self, timeout: float | None = None) -> PsSession[M]:
        """Return the open session; if there is none at the moment, wait for the next one.

        May be called in any greenlet of the client's thread. A call that would have to wait is
        refused in a coroutine, in the hub, and where the next session would wait for the caller: in
        ``on_close``, in ``should_retry``, and in other callbacks of the session once it is closed.

        Args:
            timeout: seconds; ``None``: as long as it takes.

        Raises:
            PsMultiClientError: no session opened within `timeout`; or no session will come, as the
                connection has no ``reconnect``, is disconnected, or has given up; or the caller may
                not wait.
            TypeError, ValueError: `timeout` is not a number of seconds.
        """
        check_seconds("timeout", timeout)
        if self._link is None:
            if not self.session.is_open:
                raise PsMultiClientError(f"{self!r} does not connect by itself")
            return self.session
        return self._link.wait_connected(timeout)


class MultiClientKeywords(SessionKeywords, total=False):
    """The parameters of `PsMultiClient`, except ``callback`` and ``framing``."""

    ssl_context: ssl.SSLContext | bool | None
    reconnect: PsReconnect | bool | None


class PsMultiClient(ConnectingOwner[M]):
    """A TCP client of many connections, to one server or to many.

    `init_bundle` and `connect` belong to one thread, whose hub serves the sessions; `disconnect`
    and `destroy_bundle` may be called from any greenlet and any OS thread. As a context manager the
    client is initialised on entry, unless it is initialised already, and destroyed on exit.
    """

    _settings_class = ConnectingSettings
    _settings: ConnectingSettings

    @overload
    def __init__(
        self: PsMultiClient[bytes],
        callback: PsCallback[bytes],
        *,
        framing: Framing[bytes] | None = None,
        **settings: Unpack[MultiClientKeywords],
    ) -> None: ...
    @overload
    def __init__(
        self,
        callback: PsCallback[M],
        *,
        framing: Framing[M],
        **settings: Unpack[MultiClientKeywords],
    ) -> None: ...
    def __init__(
        self,
        callback: PsCallback[Any],
        *,
        ssl_context: ssl.SSLContext | bool | None = None,
        reconnect: PsReconnect | bool | None = None,
        read_buffer_size: int = 65536,
        divide: int = 10,
        idle_milliseconds: int | None = 60_000,
        send_timeout: float | None = 1.5,
        callback_timeout: float | None = None,
        linger_timeout: float = 1.0,
        no_delay: bool = True,
        allow_half_open: bool = False,
        framing: Framing[Any] | None = None,
        frame_timeout: float | None = None,
        high_water: int = 1_048_576,
        overflow: PsOverflow = PsOverflow.CLOSE,
        send_buffer_size: int | None = None,
        unsent_low_water: int | None = None,
        keep_alive: float | None = None,
        user_timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        """Check the settings; nothing is opened before `connect`.

        Args:
            callback: the object whose methods are called for every session.
            ssl_context: TLS: a context of yours, made with ``ssl.PROTOCOL_TLS_CLIENT``, or True for
                one that verifies the server's certificate, against the system's authorities, and
                its name. ``None``: plain TCP.
            reconnect: make a connection again whenever its session ends, until `disconnect`: True,
                or a `PsReconnect` that says when. ``None``: not by itself.
            read_buffer_size: the most bytes that one ``on_message`` gets without a framing.
            divide: slices of the idle check, which looks at each session once a second, one slice
                at a time.
            idle_milliseconds: milliseconds that a session waits for bytes before it closes with
                TIMEOUT. ``None``: never.
            send_timeout: seconds without progress (the peer accepts no data) after which a send
                fails and the session closes. ``None``: wait for ever.
            callback_timeout: seconds after which a running callback is ended, and its session
                closes with FAILED. ``None``: never.
            linger_timeout: seconds that a close waits, at most, for the peer to take the last
                bytes.
            no_delay: TCP_NODELAY: small messages leave at once.
            allow_half_open: when the peer shuts its sending side (FIN), call ``on_eof`` and let
                the session go on until it is closed.
            framing: how the stream is split into messages (`psofa_gevent.framing`). ``None``:
                ``on_message`` gets the bytes as they come.
            frame_timeout: seconds that a message may take from its first byte to its last before
                the session closes with FAILED. ``None``: any time.
            high_water: bytes of posts (`PsSession.post`) that wait for a slow peer, at most, with
                those that threads have posted and the hub has not come to. In memory they take
                less than twice as many, whatever the sizes of the messages.
            overflow: what happens to a post beyond `high_water`: close the session with FAILED, or
                drop the newest message, or the oldest ones.
            send_buffer_size: SO_SNDBUF in bytes: a hard bound for what the kernel keeps for a
                peer, unsent and unacknowledged. Linux makes twice as much of it, for its own needs
                too, up to net.core.wmem_max. ``None``: the kernel's own tuning, up to megabytes.
            unsent_low_water: TCP_NOTSENT_LOWAT: bytes that the kernel may keep unsent for a slow
                peer before posts and sends wait. ``None``: on Linux four times `high_water`, from
                64 KiB to the kernel's own bound; elsewhere any number.
            keep_alive: seconds of silence after which the kernel probes whether the peer is there
                (TCP keep-alive); three probes without an answer close the session with FAILED.
                ``None``: never.
            user_timeout: TCP_USER_TIMEOUT in seconds: the session closes with FAILED when sent
                data stays unacknowledged for this time, or a full peer accepts no data. ``None``:
                the kernel's own time.
            heartbeat: milliseconds, and what a session sends when it has sent nothing for this
                time, such as ``(30_000, b"ping")``: a message, or a function of the session (also
                ``async``) that returns one, or ``None`` to send nothing. A `PsHeartbeat` can also
                send its message past the framing. ``None``: no heartbeat.

        Raises:
            PsCallbackError: the callback could never work.
            TypeError: a setting is of the wrong type.
            ValueError: a setting is out of range.
        """
        super().__init__(
            callback,
            ConnectingSettings(
                ssl_context=ssl_context,
                reconnect=reconnect,
                read_buffer_size=read_buffer_size,
                divide=divide,
                idle_milliseconds=idle_milliseconds,
                send_timeout=send_timeout,
                callback_timeout=callback_timeout,
                linger_timeout=linger_timeout,
                no_delay=no_delay,
                allow_half_open=allow_half_open,
                framing=framing,
                frame_timeout=frame_timeout,
                high_water=high_water,
                overflow=overflow,
                send_buffer_size=send_buffer_size,
                unsent_low_water=unsent_low_water,
                keep_alive=keep_alive,
                user_timeout=user_timeout,
                heartbeat=heartbeat,
            ),
            PsMultiClientError,
        )

    @property
    def settings(self) -> ConnectingSettings:
        """The settings in effect, all of them; read-only.

        Where a setting left the choice to the library, the result has what it chose: the context
        and the policy for the True of `ssl_context` and `reconnect`, and the bound for the ``None``
        of `unsent_low_water`. From any greenlet and any OS thread.
        """
        return in_effect(self._settings, ssl_context=self._ssl_context, reconnect=self._reconnect)

    def __repr__(self) -> str:
        if self._manager is None:
            return "<PsMultiClient not initialised>"
        return f"<PsMultiClient {self.get_session_count()} sessions>"

    def init_bundle(self) -> None:
        """Get ready to connect; runs ``on_start``.

        Raises:
            PsMultiClientError: the client is initialised already, or was destroyed while it
                started.
            Exception: what ``on_start`` raised; the client is not initialised then.
        """
        self._forget_if_hub_is_gone()
        if self._manager is not None:
            raise PsMultiClientError(f"{self!r} is initialised already")
        manager = self._start()
        if not self._is_still_wanted(manager):
            raise PsMultiClientError(f"{self!r} was destroyed while it started")

    def connect(
        self,
        host: str,
        port: int,
        *,
        connection_id: uuid.UUID | None = None,
        socket_address_family: PsSocketAddressFamily = PsSocketAddressFamily.IPV4,
        timeout: float | None = 10.0,
        server_hostname: str | None = None,
        source_address: tuple[str, int] | None = None,
        endpoints: Sequence[tuple[str, int]] = (),
    ) -> PsMultiClientConnection[M]:
        """Make one more connection; its ``on_open`` has run or is about to.

        Any number of greenlets may connect at once. With `reconnect` it goes on trying for
        `timeout`, and afterwards the connection stays connected.

        Args:
            host: the address or name to connect to, or a Unix domain socket: ``unix:`` and its
                path.
            port: the port, 1 to 65535; 0 for a Unix domain socket.
            connection_id: the session's id; random by default. With `reconnect`: the id of each
                session.
            socket_address_family: IPv4, or IPv6, which reaches IPv4 hosts too.
            timeout: seconds for the lookup of names, the connections and TLS together; ``None``: as
                long as the system takes, or, with `reconnect`, until it gives up.
            server_hostname: with TLS, the name that the certificate must be for. ``None``: `host`.
            source_address: the host and port to connect from. ``None``: whatever the system
                chooses.
            endpoints: more hosts and ports, tried in turn when those before do not answer.

        Raises:
            PsMultiClientError: the client is not initialised; the name is not known; or the
                connection was refused, or timed out, or could not be made.
            TypeError, ValueError: an argument is of the wrong type, or out of range.
        """
        target = self._target(
            host,
            port,
            socket_address_family,
            endpoints=endpoints,
            source_address=source_address,
            server_hostname=server_hostname,
        ).with_id(connection_id)
        check_seconds("timeout", timeout)
        manager = self._running_manager()
        if self._reconnect is None:
            session = self._connect(manager, target, timeout)
            return PsMultiClientConnection(host, port, session, None)
        link = self._new_link(manager, target, self._reconnect)
        try:
            link.wait_connected(timeout, is_makers_wait=True)
        except BaseException:
            link.disconnect()  # it may have connected just now
            raise
        return PsMultiClientConnection(host, port, None, link)

    def connect_in_background(
        self,
        host: str,
        port: int,
        *,
        connection_id: uuid.UUID | None = None,
        socket_address_family: PsSocketAddressFamily = PsSocketAddressFamily.IPV4,
        server_hostname: str | None = None,
        source_address: tuple[str, int] | None = None,
        endpoints: Sequence[tuple[str, int]] = (),
    ) -> PsMultiClientConnection[M]:
        """Begin to make one more connection, return at once, and stay connected.

        Only with `reconnect`. `PsMultiClientConnection.wait_connected` waits for the session.

        Args:
            host: as for `connect`; so are the others.
            port: the port.
            connection_id: the id of each session; random by default.
            socket_address_family: IPv4 or IPv6.
            server_hostname: with TLS, the name that the certificate must be for.
            source_address: the host and port to connect from.
            endpoints: more hosts and ports.

        Raises:
            PsMultiClientError: there is no `reconnect`, or the client is not initialised.
            TypeError, ValueError: an argument is of the wrong type, or out of range.
        """
        target = self._target(
            host,
            port,
            socket_address_family,
            endpoints=endpoints,
            source_address=source_address,
            server_hostname=server_hostname,
        ).with_id(connection_id)
        if self._reconnect is None:
            raise PsMultiClientError(f"{self!r}: connect_in_background needs reconnect")
        link = self._new_link(self._running_manager(), target, self._reconnect)
        return PsMultiClientConnection(host, port, None, link)

    def disconnect(self, connection: PsMultiClientConnection[M] | PsSession[M]) -> None:
        """Ask for the close of one connection (SELF_CLOSE) and return at once.

        With `reconnect` the connection is not made again; an attempt that is under way fails.

        Args:
            connection: what `connect` returned, or its session, which callbacks have.

        Raises:
            TypeError: `connection` is neither.
            ValueError: it belongs to another client, or to a server.
        """
        self._forget_if_hub_is_gone()
        if isinstance(connection, PsSession):
            self._check_owns(connection, connection.owner)
            links = [link for link in list(self._links) if link.session is connection]
            connection.close()
        else:
            link = check_instance("connection", connection, PsMultiClientConnection)._link  # noqa: SLF001 - made here
            links = [] if link is None else [link]
            if link is None:
                self._check_owns(connection, connection.session.owner)
                connection.session.close()
            else:
                self._check_owns(connection, link.manager.owner)
        for link in links:
            if link.manager.thread.is_current():
                link.disconnect()
            else:
                link.manager.thread.call_soon(link.disconnect)

    def destroy_bundle(self, timeout: float | None = 5.0) -> None:
        """Close all sessions (SELF_CLOSE) and return after every ``on_close``, and ``on_stop``.

        In a callback, a coroutine or the hub it returns at once, and the shutdown goes on. Attempts
        to connect that are under way fail. Has no effect when the client is not initialised.
        Afterwards `init_bundle` works again.

        In another OS thread it also returns when `timeout` is over and the hub has not run in the
        last second, and at once when the hub was destroyed or its thread has ended (see
        `PsServer.shutdown`).

        Args:
            timeout: seconds that running callbacks have. Then they are killed, and have as long
                again to end, at least a second. ``None``: as long as they take.

        Raises:
            TypeError, ValueError: `timeout` is not a number of seconds.
        """
        self._shut_down(PsCloseReason.SELF_CLOSE, timeout)

    def __enter__(self) -> Self:
        self._forget_if_hub_is_gone()
        if self._manager is None:
            self.init_bundle()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.destroy_bundle()

    def _adopt(self, connected: _socket.socket) -> PsSession:
        """Take over a connected stream socket of any kind: for `psofa_gevent.testing`."""
        manager = self._running_manager()
        sock = _socket.socket(connected.family, connected.type, connected.proto, connected.detach())
        try:
            set_options(sock, self._settings)
            return manager.open(sock, sock.getpeername())
        except BaseException:
            sock.close()
            raise

    def _running_manager(self) -> SessionManager:
        self._forget_if_hub_is_gone()
        manager = self._manager
        if manager is None or manager.shutdown is not None:
            raise PsMultiClientError(f"{self!r}: call init_bundle first")
        if not manager.has_started:
            raise PsMultiClientError(f"{self!r} is starting: on_start has not returned")
        return manager
