"""The client of one connection."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack, overload

from psofa_gevent.callback import PsCallback
from psofa_gevent.checks import check_seconds
from psofa_gevent.connecting.base import ConnectingOwner
from psofa_gevent.connecting.link import Link
from psofa_gevent.connecting.reconnect import PsReconnect
from psofa_gevent.connecting.settings import ClientSettings
from psofa_gevent.enums import PsCloseReason, PsOverflow, PsSocketAddressFamily
from psofa_gevent.errors import PsClientError
from psofa_gevent.framing import Framing
from psofa_gevent.messages import M
from psofa_gevent.session.session import PsSession
from psofa_gevent.settings import Heartbeat, SessionKeywords, in_effect

__all__ = ["PsClient"]


class ClientKeywords(SessionKeywords, total=False):
    """The parameters of `PsClient`, except its first three and ``framing``."""

    socket_address_family: PsSocketAddressFamily
    ssl_context: ssl.SSLContext | bool | None
    server_hostname: str | None
    source_address: tuple[str, int] | None
    endpoints: Sequence[tuple[str, int]]
    reconnect: PsReconnect | bool | None


class PsClient(ConnectingOwner[M]):
    """A TCP client: one connection at a time, which may be made again and again.

    `connect` belongs to one thread, whose hub then serves the session; `disconnect` may be called
    from any greenlet and any OS thread. ``on_start`` runs before the first connect, and again
    before the first connect after a `disconnect`; ``on_stop`` runs at the end of `disconnect`. As a
    context manager the client is connected on entry, unless it is connected or stays connected by
    `reconnect` already, and disconnected on exit.
    """

    _settings_class = ClientSettings
    _settings: ClientSettings

    @overload
    def __init__(
        self: PsClient[bytes],
        callback: PsCallback[bytes],
        host: str,
        port: int,
        *,
        framing: Framing[bytes] | None = None,
        **settings: Unpack[ClientKeywords],
    ) -> None: ...
    @overload
    def __init__(
        self,
        callback: PsCallback[M],
        host: str,
        port: int,
        *,
        framing: Framing[M],
        **settings: Unpack[ClientKeywords],
    ) -> None: ...
    def __init__(
        self,
        callback: PsCallback[Any],
        host: str,
        port: int,
        *,
        socket_address_family: PsSocketAddressFamily = PsSocketAddressFamily.IPV4,
        ssl_context: ssl.SSLContext | bool | None = None,
        server_hostname: str | None = None,
        source_address: tuple[str, int] | None = None,
        endpoints: Sequence[tuple[str, int]] = (),
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
            callback: the object whose methods are called for the session.
            host: the address or name to connect to, or a Unix domain socket: ``unix:`` and its
                path.
            port: the port, 1 to 65535; 0 for a Unix domain socket.
            socket_address_family: IPv4, or IPv6, which reaches IPv4 hosts too.
            ssl_context: TLS: a context of yours, made with ``ssl.PROTOCOL_TLS_CLIENT``, or True for
                one that verifies the server's certificate, against the system's authorities, and
                its name. ``None``: plain TCP.
            server_hostname: with TLS, the name that the certificate must be for. ``None``: `host`.
            source_address: the host and port to connect from, such as ``("192.0.2.7", 0)``.
                ``None``: whatever the system chooses.
            endpoints: more hosts and ports, tried in turn when those before do not answer.
            reconnect: connect again whenever a session ends, until `disconnect`: True, or a
                `PsReconnect` that says when. ``None``: not by itself.
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
            ClientSettings(
                ssl_context=ssl_context,
                reconnect=reconnect,
                host=host,
                port=port,
                socket_address_family=socket_address_family,
                server_hostname=server_hostname,
                source_address=source_address,
                endpoints=endpoints,
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
            PsClientError,
        )
        self._asked_for = self._target(
            host,
            port,
            socket_address_family,
            endpoints=endpoints,
            source_address=source_address,
            server_hostname=server_hostname,
        )
        by_itself = (
            "does not connect by itself" if self._reconnect is None else "call connect first"
        )
        self._why_not_connected = f"{self!r}: {by_itself}"
        """The text of the error that `wait_connected` raises when nothing connects."""

    @property
    def settings(self) -> ClientSettings:
        """The settings in effect, all of them; read-only.

        Where a setting left the choice to the library, the result has what it chose: the context
        and the policy for the True of `ssl_context` and `reconnect`, and the bound for the ``None``
        of `unsent_low_water`. From any greenlet and any OS thread.
        """
        return in_effect(self._settings, ssl_context=self._ssl_context, reconnect=self._reconnect)

    def __repr__(self) -> str:
        state = "disconnected" if self.session is None else "connected"
        if self.session is None and self._stays_connected:
            state = "connecting"
        return f"<PsClient {self._asked_for} {state}>"

    @property
    def _link(self) -> Link | None:
        """The link that keeps the client connected; ``None``: there is none."""
        links = list(self._links)  # copied in one step, for callers in other threads
        return links[0] if links else None

    @property
    def _stays_connected(self) -> bool:
        return self._link is not None

    def _link_ended(self, link: Link) -> None:
        super()._link_ended(link)
        self._why_not_connected = str(link.not_connected())

    @property
    def session(self) -> PsSession[M] | None:
        """The open session; ``None`` before `connect`, and as soon as it is closing."""
        sessions = self.sessions
        return sessions[-1] if sessions else None

    def connect(
        self, connection_id: uuid.UUID | None = None, *, timeout: float | None = 10.0
    ) -> PsSession[M]:
        """Connect, and return the open session; its ``on_open`` has run or is about to.

        With `reconnect` the client goes on trying for `timeout`, and afterwards it stays connected.

        Args:
            connection_id: the session's id; random by default. With `reconnect`: the id of each
                session.
            timeout: seconds for the lookup of names, the connections and TLS together; ``None``: as
                long as the system takes, or, with `reconnect`, until it gives up.

        Raises:
            PsClientError: the client is connected or connecting already, or is disconnecting; the
                name is not known; or the connection was refused, or timed out, or could not be
                made.
            TypeError, ValueError: an argument is of the wrong type, or out of range.
            Exception: what ``on_start`` raised.
        """
        target = self._asked_for.with_id(connection_id)
        check_seconds("timeout", timeout)
        self._check_idle()
        was_started = self._manager is not None
        manager = self._manager or self._start()
        link: Link | None = None
        try:
            if self._reconnect is None:
                return self._connect(manager, target, timeout)
            link = self._new_link(manager, target, self._reconnect)
            return link.wait_connected(timeout, is_makers_wait=True)
        except BaseException:
            if link is not None:
                link.disconnect()  # the link may have connected just now
            if not (was_started or self._stays_connected):  # another greenlet may have been faster
                self._undo(manager)
            raise

    def connect_in_background(self, connection_id: uuid.UUID | None = None) -> None:
        """Begin to connect, return at once, and stay connected; only with `reconnect`.

        `wait_connected` waits for the session.

        Args:
            connection_id: the id of each session; random by default.

        Raises:
            PsClientError: there is no `reconnect`; or the client is connected or connecting
                already, or is disconnecting.
            TypeError: `connection_id` is not a `uuid.UUID`.
            Exception: what ``on_start`` raised.
        """
        target = self._asked_for.with_id(connection_id)
        if self._reconnect is None:
            raise PsClientError(f"{self!r}: connect_in_background needs reconnect")
        self._check_idle()
        self._new_link(self._manager or self._start(), target, self._reconnect)

    def wait_connected(self, timeout: float | None = None) -> PsSession[M]:
        """Return the open session; if there is none at the moment, wait for the next one.

        May be called in any greenlet of the client's thread. A call that would have to wait is
        refused in a coroutine, in the hub, and where the next session would wait for the caller: in
        ``on_close``, in ``should_retry``, and in other callbacks of the session once it is closed.

        Args:
            timeout: seconds; ``None``: as long as it takes.

        Raises:
            PsClientError: no session opened within `timeout`; or no session will come, as the
                client has no `reconnect`, is disconnected, or has given up; or the caller may not
                wait.
            TypeError, ValueError: `timeout` is not a number of seconds.
        """
        check_seconds("timeout", timeout)
        self._forget_if_hub_is_gone()
        session, link = self.session, self._link
        if session is not None:
            return session
        if link is None:
            raise PsClientError(self._why_not_connected)
        return link.wait_connected(timeout)

    def _check_idle(self) -> None:
        """Raise `PsClientError` unless the client may begin to connect."""
        self._forget_if_hub_is_gone()
        if self._is_shutting_down:
            raise PsClientError(
                f"the client of {self._asked_for} is disconnecting, so it does not connect"
            )
        if self._is_starting:
            raise PsClientError(f"{self!r} is starting: on_start has not returned")
        # With `reconnect`, a connector alone says nothing: it may belong to a link that has ended.
        connects = self._stays_connected if self._reconnect else self._connectors
        if connects or self.session is not None:
            raise PsClientError(f"{self!r} is connected, or connecting, already")

    def disconnect(self, timeout: float | None = 5.0) -> None:
        """Close the session (SELF_CLOSE) and return after ``on_close`` and ``on_stop``.

        With `reconnect` the client stops connecting again, and a `wait_connected` raises at once.

        In a callback, a coroutine or the hub it returns at once, and the shutdown goes on. An
        attempt to connect that is under way fails. Has no effect when the client is not started.

        In another OS thread it also returns when `timeout` is over and the hub has not run in the
        last second, and at once when the hub was destroyed or its thread has ended (see
        `PsServer.shutdown`).

        Args:
            timeout: seconds that a running callback has. Then it is killed, and has as long again
                to end, at least a second. ``None``: as long as it takes.

        Raises:
            TypeError, ValueError: `timeout` is not a number of seconds.
        """
        self._shut_down(PsCloseReason.SELF_CLOSE, timeout)

    def __enter__(self) -> Self:
        self._forget_if_hub_is_gone()
        if self.session is None and not self._stays_connected:
            self.connect()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disconnect()
