"""The server: it binds, accepts, and shuts down. What happens on a connection is `PsSession`'s."""

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
"""File descriptors that the default cap leaves to others in the process, or a sixteenth of all."""
CAP_WITHOUT_LIMIT = 1_000_000
"""The default cap where the process may open any number of files."""
SHUTDOWN_TIMEOUT = 5.0


class ServerKeywords(SessionKeywords, total=False):
    """The parameters of `PsServer`, but for ``callback`` and ``framing``."""

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
    """A TCP server: accepts connections, one session and one greenlet each.

    `start`, `wait_for` and `serve_forever` belong to the thread whose hub serves; the others may be
    called from any greenlet and any OS thread. As a context manager it is started on entry and shut
    down on exit.

    A process that is forked from the one in which it runs has a stopped one: see `start`.
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
            callback: what is called for every session.
            host: the address or name to listen on; 0.0.0.0 (on IPv6 ``::``): every address; or a
                Unix domain socket, ``unix:`` and its path.
            port: 0 asks for a free port, which `address` then tells.
            listener: instead of host and port: a socket that listens already (Python's or
                gevent's), the descriptor of one, a tuple of host and port, ``unix:`` and a path, or
                a list of such, which the server serves as one. A given socket stays yours: the
                server duplicates it at each start, makes it non-blocking (your own descriptor too),
                and never closes it nor removes its file; `backlog`, `receive_buffer_size` and
                `unix_mode` are not for it.
            socket_address_family: IPV6 is dual-stack: IPv4 clients reach the server too.
            backlog: connections that the kernel keeps waiting until they are accepted; Linux takes
                no more than net.core.somaxconn.
            receive_buffer_size: SO_RCVBUF in bytes; ``None`` leaves it to the kernel's own tuning,
                which is what most want.
            unix_mode: the permissions of a Unix socket's file, such as ``0o660``; ``None``: what
                the process's umask leaves.
            reuse_port: SO_REUSEPORT for each host and port: further servers, of this process and of
                others, may listen there too if they set it, and share the connections.
            max_sessions: sessions at a time, of all listeners together. At the cap, further clients
                wait in the backlog, or with `refuse_when_full` are refused. ``None``: as many as
                the process has file descriptors, less a reserve.
            ssl_context: TLS with this certificate (`ssl.SSLContext.load_cert_chain`), made with
                ``ssl.PROTOCOL_TLS_SERVER``; ``None``: plain TCP.
            handshake_timeout: seconds that a peer has for all that comes before ``on_open``, the
                header of the PROXY protocol and the TLS handshake; ``None``: any time.
            proxy_protocol: every connection begins with the header of the PROXY protocol, in which
                a load balancer says who its client is, version 1 or 2.
            trusted_proxies: who may send it, addresses and networks ("10.0.0.0/8"); all others are
                refused. An IPv4-mapped address counts as its IPv4 address. Peers on Unix sockets
                are trusted.
            allowed_networks: the addresses and networks of clients that are let in, with peers on
                Unix sockets; ``None``: all.
            denied_networks: those that are not, even if they are among the allowed ones.
            max_sessions_per_peer: sessions that one address may have at a time; ``None``: any
                number. Peers on Unix sockets have none in common.
            refuse_when_full: at `max_sessions` further clients are accepted, and closed at once.
            farewell: what clients get to read that are refused at `max_sessions` or
                `max_sessions_per_peer`, text (as UTF-8) or bytes, 4,096 at most. Not with TLS.
            read_buffer_size: the most bytes that one ``on_message`` gets.
            divide: slices of the idle scan.
            idle_milliseconds: a session that waits longer for bytes closes with TIMEOUT; ``None``:
                never.
            send_timeout: seconds in which the peer takes nothing, after which a send fails and the
                session closes; ``None``: never.
            callback_timeout: seconds after which a running callback is ended; ``None``: never.
            linger_timeout: seconds for which a close waits for the peer to take the last bytes.
            no_delay: TCP_NODELAY: small messages leave at once.
            allow_half_open: the peer's FIN calls ``on_eof``, and sending goes on.
            framing: what cuts the stream into messages (`psofa_gevent.framing`); ``None``:
                ``on_message`` gets the bytes as they come.
            frame_timeout: seconds that a message may take from its first byte to its last, after
                which the session closes with FAILED; ``None``: any time.
            high_water: bytes of `PsSession.post` that wait for the peer, at most; in memory less
                than twice as many, whatever the sizes of messages.
            overflow: what happens to a post beyond that.
            send_buffer_size: SO_SNDBUF in bytes; Linux makes twice as many of it, for its own needs
                too, up to net.core.wmem_max. ``None``: the kernel's own tuning, up to megabytes.
            unsent_low_water: bytes that the kernel may keep unsent, beyond which posts and sends
                wait here (TCP_NOTSENT_LOWAT). ``None``: on Linux four times `high_water`,
                and 65,536 at least; elsewhere any number.
            keep_alive: seconds of silence after which the kernel probes whether the peer is there
                (TCP keep-alive); one that does not answer closes with FAILED. ``None``: never.
            user_timeout: seconds that what was sent may stay unacknowledged, after which the
                session closes with FAILED (TCP_USER_TIMEOUT); ``None``: the kernel's own time.
            heartbeat: milliseconds, and what a session sends when it has sent nothing for so long:
                a message, or a function of the session (also ``async``) that returns one, or
                ``None`` for none; or a `PsHeartbeat`, which can leave the framing out.

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
        """In a child process: the one in which it ran at the fork, until it is started anew."""

    def __repr__(self) -> str:
        state = "started" if self.started else "stopped"
        if self._is_shutting_down:
            state = "shutting down"
        more = f" and {len(self._binds) - 1} more" if len(self._binds) > 1 else ""
        return f"<PsServer {format_address(*self.address[:2])}{more} {state}>"

    def start(self) -> None:
        """Listen and accept; returns when the server can be reached.

        While another process listens at the address, it tries again for ten seconds, as nginx and
        gunicorn do: one that is being replaced may have a last request to answer. (On Linux, and
        in greenlets, which may wait.) In a child process of one in which it ran at the fork: at the
        same addresses, when that has ended, for which it has the same time.

        Raises:
            PsServerError: it is started already, or was shut down while it started; or the address
                is in use, not this machine's, not known, or not allowed.
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

        In a child process of one in which it ran at the fork it is started first (`start`).

        Args:
            timeout: seconds; ``None``: as long as it takes.

        Returns:
            True when it is shut down (or was never started), False when the time was over before.

        Raises:
            PsServerError: called in another thread than the server's, in a callback (``on_start``
                included), in a coroutine or in the hub; or as of `start`, in a child process.
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
        """Start, unless started, and serve until shut down.

        In the main thread SIGINT (Ctrl-C) and SIGTERM shut the server down gracefully, and this
        returns, so that the program can end with exit code 0. A second signal ends the process at
        once, also as process 1 of a container. One of the two that is ignored stays ignored, and
        other signals are left alone: SIGHUP ends the process, unless the program handles it. On
        any other way out (an exception) the server is shut down too. Afterwards the program's own
        signal handlers work again.

        Under systemd (NOTIFY_SOCKET is set) it tells when it listens and when it begins to stop,
        and feeds the unit's watchdog: see `psofa_gevent.systemd`.

        Args:
            shutdown_timeout: the ``timeout`` of that `shutdown`, in seconds.
            drain: the ``drain`` of that `shutdown`, in seconds.

        Raises:
            PsServerError: as of `start`.
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
                if not signals:  # one that came before there was a manager is for us too
                    ready()
                    self.wait_for()
            except PsServerError:
                if not signals:  # else it was shut down while it started
                    raise
            finally:
                self.shutdown(shutdown_timeout, drain=drain)

    @contextlib.contextmanager
    def _telling_the_service_manager(self) -> Iterator[Callable[[], None]]:
        if self._notifier is not None:  # another greenlet is in `serve_forever`, and tells
            yield lambda: None
            return
        notifier = self._notifier = ServiceNotifier(gevent.get_hub().loop)

        def ready() -> None:
            if self.started:
                where = [format_address(*address[:2]) for address in self.addresses]
                notifier.ready(", ".join(where))
            if not self.started:  # any more: a signal handler has shut it down meanwhile
                notifier.stopping()

        try:
            yield ready
        finally:
            self._notifier = None
            notifier.close()

    def stop_accepting(self) -> None:
        """Let new connections wait in the backlog; the open sessions go on.

        Returns at once. Without effect when the server is not started.
        """
        listeners = self._listeners
        if listeners is not None:
            listeners.pause()

    def resume_accepting(self) -> None:
        """Accept again, first those that waited. Without effect when not started."""
        listeners = self._listeners
        if listeners is not None:
            listeners.resume()

    def reload_tls(self, ssl_context: ssl.SSLContext) -> None:
        """Use another context, with new certificates, for the connections that come from now on.

        From any greenlet and any OS thread, started or not. Open sessions go on as they are.

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
        """Stop accepting, close every session, deliver every ``on_close``, and return.

        Returns at once, the work going on, when called in a callback, a coroutine or the hub. A
        second call waits for the first, and may shorten either time. Without effect when not
        started; afterwards `start` works again.

        In another OS thread it returns, too, when `drain` and `timeout` are over and the hub has
        not run in the last second: its thread is blocked. The stop goes on when the hub runs again.
        At once, when the hub was destroyed or its thread has ended: no callback is called then.

        Args:
            timeout: seconds that running callbacks have, after `drain`; then they are killed, and
                have as long again, at least a second. ``None``: as long as they take.
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

        With what was chosen where a setting left it open (``None``): the cap that `max_sessions`
        is, the bound that `unsent_low_water` is; and with the context of the last `reload_tls`.
        From any greenlet and any OS thread.
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
        """How many connections were refused since the server was made, for each reason."""
        return self._admission.refused

    @property
    def address(self) -> Endpoint:
        """What the server is bound to: (host, port), or (host, port, flow info, scope id).

        A Unix socket is a host as it was given, and the port 0. Of several listeners the first.

        While it is stopped: the host and port that were asked for. In a child process of one in
        which it ran at the fork: what it was bound to there.
        """
        return self.addresses[0]

    @property
    def addresses(self) -> list[Endpoint]:
        """The same of all listeners, in the order in which they were given."""
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
        """Listen; in a child of a process that did, at the same addresses, when that has ended."""
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
        """Set what comes before ``on_open``. Returns the rules for the hub; ``None``: no rules."""
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
        # A flag for each, and no more: this may be in the middle of an accept, or of closing them.
        self.stop_accepting()

    def _close_listeners_or_attempts(self) -> None:
        if self._listeners is not None:
            self._listeners.close()
            self._listeners = None

    def _stopped(self) -> None:
        manager = self._manager
        has_started = manager is not None and manager.has_started
        stopped = repr(self)
        if self._left_in is None:  # else it may try again to take them over
            self._bound_to = None
        super()._stopped()
        listeners, self._listeners = self._listeners, None
        if listeners is not None:  # ``on_start`` has outlived the stop, or the hub was destroyed
            with contextlib.suppress(ValueError):  # of a watcher whose loop is gone
                listeners.close()
        self._admission.close()
        if has_started:
            log(logging.INFO, "%s: stopped", stopped)


def _default_cap() -> int:
    limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return CAP_WITHOUT_LIMIT
    return max(1, limit - max(DESCRIPTORS_FOR_OTHERS, limit // 16))
