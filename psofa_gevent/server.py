"""The server: it binds, accepts, and shuts down. `PsSession` does what happens on a connection.

This file is longer than others because it contains the documentation of all settings of a server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import ssl
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

import gevent
from gevent import getcurrent

from psofa_gevent.callback import PsCallback
from psofa_gevent.checks import check_seconds, check_ssl_context
from psofa_gevent.enums import PsCloseReason, PsOverflow, PsRefusal, PsSocketAddressFamily
from psofa_gevent.errors import PsServerError
from psofa_gevent.framing import Framing
from psofa_gevent.hub.greenlets import may_wait_for_callbacks
from psofa_gevent.hub.logs import log
from psofa_gevent.hub.signals import ask_on_signals
from psofa_gevent.listening.admission import Admission
from psofa_gevent.listening.binds import (
    BIND_PATIENCE,
    DEFAULT_HOST,
    DEFAULT_PORT,
    BindOptions,
    Given,
    check_binds,
    check_reuse_port,
    open_when_free,
)
from psofa_gevent.listening.listener import Listeners
from psofa_gevent.listening.notifier import ServiceNotifier
from psofa_gevent.listening.preamble import Preamble
from psofa_gevent.listening.settings import ServerSettings
from psofa_gevent.listening.sockets import ListeningSocket
from psofa_gevent.messages import M
from psofa_gevent.net.addresses import format_address
from psofa_gevent.net.sockopts import Endpoint
from psofa_gevent.owner.base import SessionOwner
from psofa_gevent.owner.manager import SessionManager
from psofa_gevent.settings import Heartbeat, SessionKeywords, in_effect

if TYPE_CHECKING:
    from gevent.hub import Hub

__all__ = ["PsServer"]

DESCRIPTORS_FOR_OTHERS = 64
"""File descriptors that the default cap of sessions leaves to the rest of the process, at least; a
sixteenth of all if that is more."""
CAP_WITHOUT_LIMIT = 1_000_000
"""Sessions: the default cap where the process may open any number of files."""
SHUTDOWN_TIMEOUT = 5.0
"""Seconds: the default ``timeout`` of a shutdown."""


class ServerKeywords(SessionKeywords, total=False):
    """The parameters of `PsServer`, except ``callback`` and ``framing``."""

    host: str
    port: int
    listener: Given | Sequence[Given] | None
    socket_address_family: PsSocketAddressFamily
    backlog: int
    receive_buffer_size: int | None
    unix_mode: int | None
    reuse_port: bool
    max_sessions: int | None
    ssl_context: ssl.SSLContext | None
    handshake_timeout: float | None
    proxy_protocol: bool
    trusted_proxies: Collection[str]
    allowed_networks: Collection[str] | None
    denied_networks: Collection[str]
    max_sessions_per_peer: int | None
    refuse_when_full: bool
    farewell: bytes | str | None


class PsServer(SessionOwner[M]):
    """A TCP server: accepts connections, and gives each one a session with a greenlet of its own.

    `start`, `wait_for` and `serve_forever` belong to the thread whose hub serves; the other methods
    may be called from any greenlet and any OS thread. As a context manager the server is started on
    entry, unless it is started already, and shut down on exit.

    In a child process that was forked while the server ran, the server is stopped: see `start`.
    """

    _settings_class = ServerSettings
    _settings: ServerSettings

    @overload
    def __init__(
        self: PsServer[bytes],
        callback: PsCallback[bytes],
        *,
        framing: Framing[bytes] | None = None,
        **settings: Unpack[ServerKeywords],
    ) -> None: ...
    @overload
    def __init__(
        self,
        callback: PsCallback[M],
        *,
        framing: Framing[M],
        **settings: Unpack[ServerKeywords],
    ) -> None: ...
    def __init__(
        self,
        callback: PsCallback[Any],
        *,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        listener: Given | Sequence[Given] | None = None,
        socket_address_family: PsSocketAddressFamily = PsSocketAddressFamily.IPV4,
        backlog: int = 1024,
        receive_buffer_size: int | None = None,
        unix_mode: int | None = None,
        reuse_port: bool = False,
        max_sessions: int | None = None,
        ssl_context: ssl.SSLContext | None = None,
        handshake_timeout: float | None = 10.0,
        proxy_protocol: bool = False,
        trusted_proxies: Collection[str] = ("127.0.0.0/8", "::1/128"),
        allowed_networks: Collection[str] | None = None,
        denied_networks: Collection[str] = (),
        max_sessions_per_peer: int | None = None,
        refuse_when_full: bool = False,
        farewell: bytes | str | None = None,
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
        """Check the settings; nothing is opened before `start`.

        Args:
            callback: the object whose methods are called for every session.
            host: the address or name to listen on, or a Unix domain socket: ``unix:`` and its path.
                0.0.0.0 (on IPv6 ``::``) is every address of the machine.
            port: the port; 0 asks for any free one, which `address` then tells.
            listener: instead of `host` and `port`: a socket that listens already (Python's or
                gevent's), its descriptor, a tuple of host and port, ``unix:`` and a path, or a list
                of several such listeners, which the server serves as one. A given socket stays
                yours: the server duplicates it at each start, makes it non-blocking (your own
                descriptor too), and neither closes it nor removes its file. `backlog`,
                `receive_buffer_size` and `unix_mode` are not for given sockets. ``None``: `host`
                and `port`.
            socket_address_family: IPv4, or IPv6, which is dual-stack: on ``::`` IPv4 clients are
                served by the same socket.
            backlog: connections that the kernel holds until they are accepted; Linux allows no more
                than net.core.somaxconn.
            receive_buffer_size: SO_RCVBUF in bytes. A number turns the kernel's own tuning off,
                which is rarely better. ``None``: the kernel's own tuning.
            unix_mode: the permissions of a Unix socket's file, such as ``0o660``. ``None``: what
                the process's umask leaves.
            reuse_port: SO_REUSEPORT for each host and port: further servers that set it, in this
                process and in others, may listen on the same port, and share its connections.
            max_sessions: sessions at a time, of all listeners together. Further clients wait in the
                backlog, or are refused with `refuse_when_full`. ``None``: as many as the process
                has file descriptors, less a reserve.
            ssl_context: TLS with the certificate of this context
                (`ssl.SSLContext.load_cert_chain`), which is made with ``ssl.PROTOCOL_TLS_SERVER``.
                ``None``: plain TCP.
            handshake_timeout: seconds that a client has for everything before ``on_open``: the
                header of the PROXY protocol and the TLS handshake. ``None``: any time.
            proxy_protocol: every connection begins with the header of the PROXY protocol, version 1
                or 2, in which a load balancer says who its client is.
            trusted_proxies: the addresses and networks ("10.0.0.0/8") of load balancers that may
                send that header; connections from others are refused. An IPv4-mapped address counts
                as its IPv4 address. Peers on Unix sockets are trusted.
            allowed_networks: the addresses and networks of clients that are let in. Peers on Unix
                sockets are always let in. ``None``: all clients.
            denied_networks: the addresses and networks of clients that are not let in, even if they
                are allowed.
            max_sessions_per_peer: sessions that one address may have at a time. Peers on Unix
                sockets have no address, so they are not counted. ``None``: any number.
            refuse_when_full: at `max_sessions`, accept further clients and close them at once.
            farewell: the text (sent as UTF-8) or bytes that clients are sent when they are refused
                at `max_sessions` or `max_sessions_per_peer`, 4,096 bytes at most. Not with TLS.
                ``None``: nothing.
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
            ServerSettings(
                host=host,
                port=port,
                listener=listener,
                socket_address_family=socket_address_family,
                backlog=backlog,
                receive_buffer_size=receive_buffer_size,
                unix_mode=unix_mode,
                reuse_port=reuse_port,
                max_sessions=max_sessions,
                ssl_context=ssl_context,
                handshake_timeout=handshake_timeout,
                proxy_protocol=proxy_protocol,
                trusted_proxies=trusted_proxies,
                allowed_networks=allowed_networks,
                denied_networks=denied_networks,
                max_sessions_per_peer=max_sessions_per_peer,
                refuse_when_full=refuse_when_full,
                farewell=farewell,
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
        )
        self._binds = check_binds(listener, host, port, socket_address_family)
        if reuse_port:
            check_reuse_port(self._binds)
        self._bind_options = BindOptions(
            backlog=backlog,
            receive_buffer_size=receive_buffer_size,
            unix_mode=unix_mode,
            reuse_port=reuse_port,
            settings=self._settings,
        )
        self._ssl_context = ssl_context
        self._admission = Admission(
            allowed_networks=allowed_networks,
            denied_networks=denied_networks,
            max_sessions_per_peer=max_sessions_per_peer,
            refuse_when_full=refuse_when_full,
            farewell=farewell,
            proxy_protocol=proxy_protocol,
            trusted_proxies=trusted_proxies,
        )
        if farewell is not None and ssl_context is not None:
            raise ValueError(
                f"farewell must be None where there is an ssl_context, not {farewell!r}: it would "
                "be sent before the handshake, unencrypted"
            )
        self._listeners: Listeners | None = None
        self._bound_to: list[Endpoint] | None = None
        self._notifier: ServiceNotifier | None = None
        self._left_in: int | None = None
        """In a child process: the id of the process in which the server ran at the fork, until the
        server is started or shut down here; else None."""

    def __repr__(self) -> str:
        state = "started" if self.started else "stopped"
        if self._is_shutting_down:
            state = "shutting down"
        more = f" and {len(self._binds) - 1} more" if len(self._binds) > 1 else ""
        return f"<PsServer {format_address(*self.address[:2])}{more} {state}>"

    def start(self) -> None:
        """Listen and accept; return when the server can be reached.

        While another process listens at the address, `start` tries again for ten seconds, as nginx
        and gunicorn do: a process that is being replaced may have a last request to answer. It does
        so on Linux only, and only where the caller may wait.

        In a child process that was forked while the server ran, it listens at the same addresses,
        as soon as the parent process has ended. It tries for the same ten seconds.

        Raises:
            PsServerError: the server is started already, or was shut down while it started; or the
                address is in use, not this machine's, not known, or not allowed.
            Exception: what ``on_start`` raised; the server is not started then.
        """
        self._forget_if_hub_is_gone()
        if self._manager is not None:
            raise PsServerError(f"{self!r} is started already")
        manager = self._manager = self._new_manager(self._settings.max_sessions or _default_cap())
        with self._starting(manager):
            opened = self._open(manager)
            try:
                if manager.shutdown is not None:
                    raise PsServerError(f"{self!r} was shut down while it started")
                admission = self._admit_by_rules(manager)
                listeners = self._listeners = Listeners(opened, manager, admission)
            except BaseException:
                for each in opened:
                    each.close()
                raise
            self._bound_to = listeners.endpoints
            manager.callbacks.on_start(self)
            manager.has_started = True
            if manager.process != os.getpid():
                raise PsServerError(f"{self!r} is starting in process {manager.process}, not here")
            if self._manager is not manager or not self.started:
                raise PsServerError(f"{self!r} was shut down while it started")
            listeners.start()
            self._left_in = None
        log(logging.INFO, "%r: listening, for %s sessions at most", self, manager.pool.size)

    def wait_for(self, timeout: float | None = None) -> bool:
        """Wait until the server has shut down, its last callback included.

        In a child process that was forked while the server ran, it starts the server first
        (`start`).

        Args:
            timeout: seconds; ``None``: as long as it takes.

        Returns:
            True when the server has shut down (or was never started), False when `timeout` was over
            first.

        Raises:
            PsServerError: called in another thread than the server's, in a callback (``on_start``
                included), in a coroutine or in the hub; or, in a child process, for the reasons of
                `start`.
            TypeError, ValueError: `timeout` is not a number of seconds.
        """
        check_seconds("timeout", timeout)
        self._forget_if_hub_is_gone()
        manager = self._manager
        if manager is None and self._left_in is None:
            return True
        starts = manager is not None and getcurrent() in manager.starters
        is_elsewhere = manager is not None and not manager.thread.is_current()
        if starts or is_elsewhere or not may_wait_for_callbacks():
            raise PsServerError(
                "wait_for must be called in a greenlet of the server's own thread, "
                "not in a callback"
            )
        if manager is None:
            self.start()
            manager = self._manager
        return manager is None or bool(manager.stopped.wait(timeout))

    def serve_forever(
        self, *, shutdown_timeout: float | None = SHUTDOWN_TIMEOUT, drain: float = 0.0
    ) -> None:
        """Start the server, unless it is started, and serve until it is shut down.

        In the main thread SIGINT (Ctrl-C) and SIGTERM shut the server down gracefully, and this
        method returns, so that the program can end with exit code 0. A second signal ends the
        process at once, even process 1 of a container. If one of these two signals is ignored, it
        stays ignored. Other signals are left alone: SIGHUP ends the process, unless the program
        handles it. An exception also shuts the server down. Afterwards the program's own signal
        handlers work again.

        Under systemd (NOTIFY_SOCKET is set) it notifies systemd when it listens and when it begins
        to shut down, and feeds the unit's watchdog: see `psofa_gevent.systemd`.

        Args:
            shutdown_timeout: the ``timeout`` of the `shutdown`, in seconds.
            drain: the ``drain`` of the `shutdown`, in seconds.

        Raises:
            PsServerError: for the reasons of `start`.
            TypeError, ValueError: a time is not a number of seconds.
        """
        check_seconds("shutdown_timeout", shutdown_timeout)
        check_seconds("drain", drain, optional=False)
        signals: list[str] = []

        def shut_down() -> None:
            log(logging.INFO, "%r: %s: shutting down", self, signals[0])
            self.shutdown(shutdown_timeout, drain=drain)

        def ask(name: str) -> None:
            signals.append(name)
            manager = self._manager
            if manager is not None:
                manager.thread.call_soon(gevent.spawn, shut_down)

        with ask_on_signals(ask), self._telling_the_service_manager() as ready:
            try:
                self._forget_if_hub_is_gone()
                if self._manager is None:
                    self.start()
                if not signals:  # a signal that came before there was a manager counts, too
                    ready()
                    self.wait_for()
            except PsServerError:
                if not signals:  # else it was shut down while it started
                    raise
            finally:
                self.shutdown(shutdown_timeout, drain=drain)

    @contextlib.contextmanager
    def _telling_the_service_manager(self) -> Iterator[Callable[[], None]]:
        if self._notifier is not None:  # another greenlet is in `serve_forever`, and notifies
            yield lambda: None
            return
        notifier = self._notifier = ServiceNotifier(gevent.get_hub().loop)

        def ready() -> None:
            if self.started:
                where = [format_address(*address[:2]) for address in self.addresses]
                notifier.ready(", ".join(where))
            if not self.started:  # a signal handler has shut it down meanwhile
                notifier.stopping()

        try:
            yield ready
        finally:
            self._notifier = None
            notifier.close()

    def stop_accepting(self) -> None:
        """Let new connections wait in the backlog; the open sessions go on.

        Returns at once. Has no effect when the server is not started.
        """
        listeners = self._listeners
        if listeners is not None:
            listeners.pause()

    def resume_accepting(self) -> None:
        """Accept again; the connections that wait in the backlog come first.

        Has no effect when the server is not started.
        """
        listeners = self._listeners
        if listeners is not None:
            listeners.resume()

    def reload_tls(self, ssl_context: ssl.SSLContext) -> None:
        """Use another context, with new certificates, for the connections that come from now on.

        From any greenlet and any OS thread, whether the server is started or not. Open sessions go
        on as they are.

        Raises:
            TypeError, ValueError: as in the constructor.
            PsServerError: the server was made without TLS.
        """
        if ssl_context is None:
            raise TypeError("ssl_context must be an ssl.SSLContext, not None")
        check_ssl_context("ssl_context", ssl_context, server_side=True)
        if self._ssl_context is None:
            raise PsServerError(f"{self!r} has no TLS: give the constructor an ssl_context")
        self._ssl_context = ssl_context

    def shutdown(self, timeout: float | None = SHUTDOWN_TIMEOUT, *, drain: float = 0.0) -> None:
        """Stop accepting, close every session, call every ``on_close``, and return.

        In a callback, a coroutine or the hub it returns at once, and the shutdown goes on. A second
        call waits for the first shutdown, and may shorten either time. Has no effect when the
        server is not started. Afterwards `start` works again.

        In another OS thread it also returns when `drain` and `timeout` are over and the hub has not
        run in the last second: then the hub's thread is blocked, and the shutdown goes on when the
        hub runs again. It returns at once when the hub was destroyed or its thread has ended; then
        no callback is called.

        Args:
            timeout: seconds that running callbacks have, after `drain`. Then they are killed, and
                have as long again to end, at least a second; ``on_stop`` has a third of that more.
                So if all of them swallow the kills, the call may take 2⅓ times `timeout` and a
                second after `drain`; below a `timeout` of one second, about 3 s. It takes up to one
                second more if a handler of the log waits. ``None``: as long as they take.
            drain: seconds in which the sessions go on and may end by themselves, before they are
                closed.

        Raises:
            TypeError: a time is not a number.
            ValueError: a time is negative.
        """
        self._shut_down(PsCloseReason.SHUTDOWN, timeout, drain)
        if self._left_in is not None and self._manager is None:
            self._left_in = self._bound_to = None

    @property
    def settings(self) -> ServerSettings:
        """The settings in effect, all of them, as they are now; read-only.

        Where a setting left the choice to the library (``None``), the result has what it chose: the
        cap for `max_sessions`, and the bound for `unsent_low_water`. The `ssl_context` is that of
        the last `reload_tls`. From any greenlet and any OS thread.
        """
        manager = self._manager
        return in_effect(
            self._settings,
            max_sessions=self._settings.max_sessions
            or (_default_cap() if manager is None else manager.pool.size),
            ssl_context=self._ssl_context,
        )

    @property
    def refused(self) -> dict[PsRefusal, int]:
        """The number of connections refused since the server was made, by reason."""
        return self._admission.refused

    @property
    def address(self) -> Endpoint:
        """What the server is bound to: (host, port), or (host, port, flow info, scope id).

        For a Unix socket: the host as it was given, and the port 0. For several listeners: the
        address of the first one.

        While the server is stopped: the host and port that were asked for. In a child process that
        was forked while the server ran: what the server was bound to in the parent process.
        """
        return self.addresses[0]

    @property
    def addresses(self) -> list[Endpoint]:
        """The `address` of each listener, in the order in which they were given."""
        return list(self._bound_to or [each.asked_for for each in self._binds])

    def __enter__(self) -> Self:
        self._forget_if_hub_is_gone()
        if self._manager is None:
            self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _open(self, manager: SessionManager) -> list[ListeningSocket]:
        """Listen on all binds. May switch.

        In a child of a process that listened: at the same addresses, when the parent has ended.
        """
        binds = self._binds
        if self._left_in is not None:
            bound = zip(binds, self.addresses, strict=True)
            binds = [each.where(endpoint) for each, endpoint in bound]

        def tell(why: str) -> None:
            log(logging.WARNING, "%r: %s: trying again for %g s", self, why, BIND_PATIENCE)

        return open_when_free(
            binds,
            self._bind_options,
            left_in=self._left_in,
            is_wanted=lambda: manager.shutdown is None and manager.process == os.getpid(),
            told=tell,
        )

    def _let_go(self, hub: Hub | None) -> None:
        manager = self._manager
        if manager is not None:
            has_hub = hub is manager.thread.hub
            if manager.has_started and manager.shutdown is None:
                self._left_in = manager.process
            if self._listeners is not None:
                self._listeners.let_go(has_hub=has_hub)
                self._listeners = None
            self._admission.let_go(has_hub=has_hub)
        self._notifier = None
        super()._let_go(hub)

    def _admit_by_rules(self, manager: SessionManager) -> Admission | None:
        """Give the manager its preamble and the counter of peers, if the settings need them.

        Returns the rules that the hub applies to accepted connections; ``None``: no rules.
        """
        admission = self._admission
        if admission.has_rules:
            admission.begin()
            manager.counter = admission
        asks = manager.callbacks.on_accept is not None
        if self._ssl_context is not None or admission.proxy_protocol or asks:
            manager.preamble = Preamble(
                lambda: self._ssl_context,
                self._settings.handshake_timeout,
                admission.admits,
                proxy_protocol=admission.proxy_protocol,
            )
        return admission if admission.has_rules else None

    def _stop_admitting(self) -> None:
        if self._notifier is not None:
            self._notifier.stopping()
        # This sets one flag, and no more: a signal handler may call it in the middle of an accept,
        # or while the listeners are being closed.
        self.stop_accepting()

    def _close_listeners_or_attempts(self) -> None:
        if self._listeners is not None:
            self._listeners.close()
            self._listeners = None

    def _stopped(self) -> None:
        manager = self._manager
        has_started = manager is not None and manager.has_started
        stopped = repr(self)
        if self._left_in is None:  # else a later start may try again to take the addresses over
            self._bound_to = None
        super()._stopped()
        listeners, self._listeners = self._listeners, None
        if listeners is not None:  # on_start has outlived the shutdown, or the hub was destroyed
            with contextlib.suppress(ValueError):  # a watcher whose loop is gone raises it
                listeners.close()
        self._admission.close()
        if has_started:
            log(logging.INFO, "%s: stopped", stopped)


def _default_cap() -> int:
    limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return CAP_WITHOUT_LIMIT
    return max(1, limit - max(DESCRIPTORS_FOR_OTHERS, limit // 16))
