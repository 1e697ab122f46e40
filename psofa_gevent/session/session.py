"""A session: one connection, from the connected socket to the moment it is queued for ``on_close``.

Rules, kept in this file, and by the parts of a session's life that are files of their own
(`psofa_gevent.listening.preamble`, `psofa_gevent.session.starttls`, `psofa_gevent.session.reading`,
`psofa_gevent.session.receiving`, `psofa_gevent.session.lingering`, `psofa_gevent.session.tasks`):

- The session lives in its own greenlet (`_live`): ``on_open``, then wait, read, ``on_message``, …,
  then the end. That greenlet is the only one that ends it. It closes the socket too, unless that
  was done for it: by `abort`, or for a session that never began (`_drop`), never ends, or has lost
  its hub (`_end_with_hub`).
- `_request_close` is the only way to a close reason. The first one wins. It sets the reason, wakes
  the session where it waits on its own socket, and interrupts its senders. It never switches. What
  another thread asks for is decided there and then (`_ask_to_close`), and done when it comes here.
- The session waits in one way: `_waiting_since` is not 0 while its greenlet is switched out in a
  wait of its own, and only then may anyone switch into it (`_resume`, `psofa_gevent.hub.ready`). A
  callback that waits on something else is never disturbed by an event of the socket: the read
  watcher only puts the session into a list, and is stopped when it is taken out of that while busy.

What may switch: whatever runs a callback, `read` (and `receive`), the preamble and a handshake,
`linger`, a send that waits, and the end of a turn between two messages of one read. All else,
logging too, runs through without another greenlet in between.

All attributes belong to the hub's thread, and callers in other OS threads are handed over
(`HubThread`). These change attributes where they are called: `close` and `abort` note at once that
they were asked (`_open`, `_asked_reason`, `_abort_asked`), `post` and `send_eof` put what they are
given into the outbox, under a lock, and make that if there is none, `_join` and `_leave` change the
memberships in steps that no thread can divide, `connection_id` makes an id of the random bytes, and
`_end_with_hub` ends a session whose hub runs no more.
"""

from __future__ import annotations

import _socket
import contextlib
import logging
import ssl
import uuid
from collections.abc import Callable, Iterator
from contextvars import Context
from datetime import UTC, datetime
from functools import partial
from time import monotonic, time
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeAlias, overload

from gevent import GreenletExit, getcurrent

from psofa_gevent.checks import check_instance, check_seconds
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsClosedError, PsSendError, PsTlsError, SlowPeerError
from psofa_gevent.framing import Framing, Raw
from psofa_gevent.hub.forking import keep, leave_behind, release, unwatch, watch
from psofa_gevent.hub.greenlets import LibraryGreenlet
from psofa_gevent.hub.logs import PeerLog
from psofa_gevent.hub.ready import ReadySessions, switch
from psofa_gevent.hub.thread import HubThread, get_ident
from psofa_gevent.hub.times import NEVER
from psofa_gevent.messages import M
from psofa_gevent.net.addresses import format_address
from psofa_gevent.net.proxy_protocol import PsProxyInfo
from psofa_gevent.net.sockopts import Endpoint, end, endpoint, keep_urgent_in_line, reset
from psofa_gevent.session.connection_id import random_bytes
from psofa_gevent.session.framed import FramedReceiver
from psofa_gevent.session.lingering import linger
from psofa_gevent.session.reading import read
from psofa_gevent.session.receiving import receive_next
from psofa_gevent.session.sending import SendingHalf
from psofa_gevent.session.starttls import Handshake, begin_tls, begin_tls_async
from psofa_gevent.session.tasks import TaskReaper, spawn_task
from psofa_gevent.settings import SessionSettings, check_framing, check_idle
from psofa_gevent.tls.socket import PsTlsInfo, TlsSocket, TlsWatcher

if TYPE_CHECKING:
    from gevent import Greenlet

    from psofa_gevent.client import PsClient
    from psofa_gevent.multi_client import PsMultiClient
    from psofa_gevent.owner.callbacks import Callbacks
    from psofa_gevent.owner.idle import IdleSlice
    from psofa_gevent.owner.time_limit import TimeLimit
    from psofa_gevent.server import PsServer

    Owner: TypeAlias = PsServer[Any] | PsClient[Any] | PsMultiClient[Any]

__all__ = ["Host", "Membership", "PsSession", "SessionGreenlet"]

P = ParamSpec("P")

READ = 1
"""The event mask of gevent's io watchers (libev's EV_READ)."""
REQUEST_LOOK = 0.05
"""Seconds between two looks whether a close that another thread has asked for has come."""
_NOTHING = object()


class Host(Protocol):
    """What a session needs of the manager that it belongs to."""

    owner: Owner
    thread: HubThread
    ready: ReadySessions
    settings: SessionSettings
    callbacks: Callbacks
    peer_log: PeerLog
    preamble: Callable[[PsSession[Any]], None] | None
    """What comes before ``on_open``, in the session's greenlet; it may close the session."""

    def session_ended(self, session: PsSession[Any]) -> None:
        """The session has ended and its socket is released. Called in the session's greenlet."""


class Membership(Protocol):
    """Something that a session belongs to until its close is requested."""

    def _left(self, session: PsSession[Any], state: Any) -> None:
        """The session has left, with what was kept for it. From any thread; does not switch."""

    def _let_go(self, session: PsSession[Any], state: Any) -> None:
        """The session was the parent process's. Wakes nobody (`psofa_gevent.hub.forking`)."""


class SessionGreenlet(LibraryGreenlet):
    """The greenlet of one session."""

    __slots__ = ("session",)

    def __init__(self, session: PsSession[Any]) -> None:
        # Past that of `LibraryGreenlet`: it is known by its manager's pool.
        super(LibraryGreenlet, self).__init__()
        # Once, so a message costs nothing; and not by Context.run, which one greenlet could be in.
        self.gr_context = session._context
        self.session: PsSession[Any] | None = session
        """None when the session has ended: whoever switched here last may hold this greenlet."""

    def switch_out(self) -> None:
        """Called by gevent when the session's greenlet is about to wait."""
        if self.session is not None and self.session._cork is not None:
            self.session._uncork_without_waiting()
            if self.session._framed is not None:
                self.session._framed.waits()

    def _run(self) -> None:
        assert self.session is not None
        self.session._live()
        self.session = None


class PsSession(SendingHalf[M]):
    """One connection. The library makes it and hands it to every callback; never construct one.

    `send`, `send_file`, `post`, `send_eof`, `close` and `abort` may be called from any greenlet and
    any OS thread, the other methods from any greenlet of the hub's thread.
    """

    __slots__ = (
        "__weakref__",
        "_abort_asked",
        "_bytes_received",
        "_close_cause",
        "_connection_id",
        "_context",
        "_frame_deadline",
        "_framed",
        "_greenlet",
        "_idle",
        "_is_opening",
        "_local_endpoint",
        "_may_linger",
        "_memberships",
        "_messages_received",
        "_opened_at",
        "_proxy",
        "_ready",
        "_reaper",
        "_received_at",
        "_remote_endpoint",
        "_slice",
        "_started",
        "_stays_armed",
        "_tasks",
        "_time_limit",
        "_tls",
        "_values",
        "_waited",
        "_waiting_since",
        "_watcher",
        "_watches",
    )

    def __init__(
        self,
        host: Host,
        sock: _socket.socket | TlsSocket,
        remote_endpoint: object,
        connection_id: uuid.UUID | None,
        local_endpoint: Endpoint | None,
        context: Context,
    ) -> None:
        super().__init__(host, sock)
        settings = host.settings
        sock.setblocking(False)
        keep_urgent_in_line(sock)
        self._local_endpoint = local_endpoint or endpoint(sock.getsockname())
        self._remote_endpoint = endpoint(remote_endpoint)
        self._proxy: PsProxyInfo | None = None
        self._ready = host.ready
        self._stays_armed = host.ready.stays_armed
        self._is_opening = host.preamble is not None
        """Whether ``on_open`` has to wait for what comes before it."""
        self._connection_id: bytes | uuid.UUID = connection_id or random_bytes()
        self._opened_at = time()
        idle = settings.idle_milliseconds
        self._idle = NEVER if idle is None else idle / 1_000
        self._waiting_since = 0.0
        self._waited = (0.0, 0)
        """Seconds that a `receive` has waited in vain, and how many bytes had come by then."""
        self._time_limit: TimeLimit | None = None
        """What ends the running callback, if anything does."""
        self._watches = False
        self._started = False
        self._close_cause: BaseException | None = None
        self._may_linger = True
        self._abort_asked = False
        self._bytes_received = self._messages_received = 0
        self._received_at = 0.0
        self._framed = None if settings.framing is None else FramedReceiver(settings.framing)
        self._frame_deadline = NEVER
        self._values: dict[str, Any] | None = None
        self._memberships: dict[Membership, Any] | None = None
        """What it belongs to, each with what that keeps for it."""
        self._tasks: set[LibraryGreenlet] | None = None
        """The greenlets that belong to it, beside its own."""
        self._reaper: TaskReaper | None = None
        self._slice: IdleSlice | None = None
        self._tls: TlsSocket | None = None
        self._context: Context | None = context
        """Of all its callbacks and its work; None when ``on_close`` has returned, as what was set
        there may well hold the session."""
        self._greenlet: SessionGreenlet | None = None
        self._watcher: Any = self._loop.io(sock.fileno(), READ)
        try:  # what has to be undone where a later line fails, for want of memory, say
            if type(sock) is TlsSocket:
                self._use_tls(sock)
            self._greenlet = SessionGreenlet(self)
            self._ready.register()
        except BaseException:
            self._watcher.close()
            self._greenlet = None
            raise

    # What a callback asks

    @property
    def connection_id(self) -> uuid.UUID:
        """The session's id: random, or what the client chose in ``connect``."""
        chosen = self._connection_id
        if isinstance(chosen, bytes):
            # Another thread that asks just now makes an equal one.
            chosen = self._connection_id = uuid.UUID(bytes=chosen)
        return chosen

    @property
    def owner(self) -> Owner:
        """The server or client that the session belongs to."""
        return self._manager.owner

    @property
    def local_endpoint(self) -> Endpoint | None:
        """This end: (host, port), or (host, port, flow info, scope id) on IPv6 sockets.

        Still known after the close. ``None`` for a socket without an address.
        """
        return self._local_endpoint

    @property
    def remote_endpoint(self) -> Endpoint | None:
        """The peer's end, in the form of `local_endpoint`; still known after the close.

        With ``proxy_protocol`` it is the client's, as the load balancer has told.
        """
        return self._remote_endpoint

    @property
    def proxy(self) -> PsProxyInfo | None:
        """What the load balancer's header says, with ``proxy_protocol``. Known after the close."""
        return self._proxy

    def _use_proxy(self, proxy: PsProxyInfo) -> None:
        """The peer is the one of whom the header tells."""
        self._proxy = proxy
        if not proxy.is_local:
            self._remote_endpoint = proxy.source

    @property
    def is_open(self) -> bool:
        """Turns false in the moment in which a close is requested, by whomever."""
        return self._open

    @property
    def close_reason(self) -> PsCloseReason:
        """Why the session closed: what ``on_close`` is told, or will be. NONE: it is open.

        Changes once, together with `is_open`: in the moment in which a close is requested, by
        whomever and in whichever thread; ``on_close`` comes later. From any thread.
        """
        if self._open:
            return PsCloseReason.NONE
        # The hub has yet to come to it, if another thread has asked.
        return self._reason if self._reason is not PsCloseReason.NONE else self._asked_reason

    @property
    def close_cause(self) -> BaseException | None:
        """The exception behind a `PsCloseReason.FAILED`; ``None`` for every other reason.

        It has its traceback until ``on_close`` has returned, not longer.
        """
        return self._close_cause

    @property
    def opened_at(self) -> datetime:
        """When the connection was accepted or made, in UTC."""
        return datetime.fromtimestamp(self._opened_at, UTC)

    @property
    def last_received_at(self) -> datetime | None:
        """When the session last read bytes, in UTC; ``None``: it has read none yet.

        Bytes of a message that is not whole count, a FIN, a TLS handshake and the header of a load
        balancer do not; nor do bytes that wait in the kernel while a callback runs. Of the sessions
        that have become readable at the same time all have the moment in which the first of them
        was read: it is early by what the callbacks of those before it took.
        """
        return datetime.fromtimestamp(self._received_at, UTC) if self._received_at else None

    @property
    def bytes_received(self) -> int:
        """Bytes handed to ``on_message``, the current message included.

        With a framing, what was read: with lengths and delimiters, and of messages not whole yet.
        """
        return self._bytes_received

    @property
    def bytes_sent(self) -> int:
        """Bytes that the kernel took for sending."""
        return self._bytes_sent

    @property
    def messages_received(self) -> int:
        """Calls of ``on_message``, the current one included."""
        return self._messages_received

    def __repr__(self) -> str:
        state = "open" if self._open else self.close_reason.name
        return (
            f"<PsSession {self.connection_id} {_format(self._local_endpoint)} - "
            f"{_format(self._remote_endpoint)} {state}>"
        )

    @property
    def tls(self) -> PsTlsInfo | None:
        """What TLS says of the connection; ``None``: it is not encrypted. Known after the close."""
        return None if self._tls is None else self._tls.info

    def _use_tls(self, sock: TlsSocket) -> None:
        """From now on all bytes go through `sock`."""
        self._stop_watching()
        self._watcher = TlsWatcher(self._loop, self._ready, self._watcher, sock)
        self._tls = self._sock = sock

    # A user's values

    def set_value(self, name: str, value: object) -> None:
        """Keep `value`, of any type, with the session under `name`."""
        if self._values is None:
            self._values = {}
        self._values[check_instance("name", name, str)] = value

    @overload
    def get_value(self, name: str) -> Any: ...
    @overload
    def get_value(self, name: str, default: object) -> Any: ...
    def get_value(self, name: str, default: object = None) -> Any:
        """The value kept under `name`, or `default`."""
        return default if self._values is None else self._values.get(name, default)

    def clear_value(self, name: str) -> None:
        """Forget the value kept under `name`, if there is one."""
        if self._values is not None:
            self._values.pop(name, None)

    # Messages

    @property
    def framing(self) -> Framing[Any] | None:
        """What cuts the stream into messages; ``None``: nothing does."""
        return None if self._framed is None else self._framed.framing

    def set_framing(self, framing: Framing[Any] | None) -> None:
        """Go on with another framing, from the next byte on: for a handshake, or an upgrade.

        What was read already, and belongs to no message that was handed over, is the new framing's.
        `send` takes it at once. With ``Raw(size)`` the next `size` bytes come as they are, then the
        framing of before goes on; sending stays with that.

        To be called in a callback of this session.

        Args:
            framing: ``None``: bytes come and go as they are.

        Raises:
            TypeError: that is no framing.
            RuntimeError: the session waits for bytes, so this is no callback of it.
        """
        if self._waiting_since:
            raise RuntimeError(f"{self!r}: set_framing must be called in a callback of the session")
        if self._framed is None:
            check_framing("framing", framing)
            self._framed = FramedReceiver(Raw())
            self._framed.framing = None
        self._framed.set_framing(framing)
        self._encode = None if self.framing is None else self.framing.encode

    # What belongs to it

    def spawn(
        self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> Greenlet[..., Any]:
        """Run `function` beside the callbacks, as work of this session, which ends with it.

        When the session's callbacks are through it is killed (`gevent.GreenletExit` where it waits,
        which cancels a coroutine), again each second until it has ended, and then ``on_close``
        comes. What it raises is logged and closes the session with FAILED, as in a
        callback. ``callback_timeout`` does not count it. It runs in the session's own context: what
        it sets there, the callbacks see. A context of its own is
        ``session.spawn(contextvars.copy_context().run, function)``.

        In the hub's thread, in any greenlet or coroutine. Returns at once.

        Args:
            function: a function, or a coroutine function, which runs on the hub's asyncio loop.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            The greenlet, for ``join``, ``kill`` and ``get``, which gives what `function` returned,
            or ``None`` if it raised.

        Raises:
            PsClosedError: the session is closed.
            RuntimeError: called in another thread.
            TypeError: `function` can't be called.
        """
        if not callable(function):
            raise TypeError(f"function must be one, not {function!r}")
        if get_ident() != self._thread_ident:
            raise RuntimeError(f"{self!r}: spawn belongs to the thread of the session's hub")
        if not self._open:
            raise PsClosedError(f"{self!r}: the session is closed: it gets no more work")
        return spawn_task(self, partial(function, *args, **kwargs))

    # What it belongs to

    def _join(self, membership: Membership, state: object) -> None:
        """Belong to it until the close is requested; if that was before, not at all.

        From any thread, as `_leave`: each step here is one that no other thread can divide.
        """
        if self._memberships is None:
            self._memberships = {}
        self._memberships[membership] = state
        if not self._open:
            self._leave(membership)

    def _leave(self, membership: Membership) -> None:
        if self._memberships:
            state = self._memberships.pop(membership, _NOTHING)
            if state is not _NOTHING:
                membership._left(self, state)

    def _leave_all(self) -> None:
        while self._memberships:
            try:
                membership, state = self._memberships.popitem()
            except KeyError:  # another thread took the last one
                return
            membership._left(self, state)

    # TLS

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        timeout: float | None = 10.0,
    ) -> None:
        """Go over to TLS in the middle of the session (STARTTLS), and return when it is encrypted.

        What was sent before leaves unencrypted, what comes afterwards is encrypted. Bytes that were
        read already and belong to no message that was handed over came before the handshake: an
        attacker may have put them there (CVE-2011-0411), so they are refused.

        In a sync callback of this session, or a `PsHandler`; in async callbacks `start_tls_async`.
        What others send meanwhile is sent encrypted, after the handshake; if that is not completed
        nothing more is sent, also not of what was posted. A handshake that is broken off (by a
        ``gevent.Timeout``, say) closes the session with FAILED, as a part of it may have left.

        Args:
            ssl_context: for a server one with a certificate, for a client one that verifies it.
            server_side: whether this end is the server.
            server_hostname: at the client, the name that the certificate must be for.
            timeout: seconds for the handshake; ``None``: any time.

        Raises:
            PsTlsError: the handshake failed, or was not complete in time; or there were bytes
                before it. The session closes with FAILED.
            PsSendError: what was sent before could not leave.
            RuntimeError: called elsewhere, or the session has TLS already.
            TypeError, ValueError: an argument is not what it should be.
        """
        begin_tls(self, Handshake.of(ssl_context, server_side, server_hostname, timeout))

    async def start_tls_async(
        self,
        ssl_context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        timeout: float | None = 10.0,
    ) -> None:
        """`start_tls` for async callbacks: waits without holding up the loop.

        Arguments and errors as for `start_tls`. To be awaited in an async callback of this session
        itself: not in another task that the callback makes. Cancelling it breaks the handshake off.
        """
        handshake = Handshake.of(ssl_context, server_side, server_hostname, timeout)
        await begin_tls_async(self, handshake)

    # Idle time

    def change_idle_milliseconds(self, idle_milliseconds: int | None) -> None:
        """Change after how long a wait for bytes the session closes, and restart that clock.

        Args:
            idle_milliseconds: milliseconds, 1 or more; ``None``: never.

        Raises:
            TypeError: not a whole number.
            ValueError: less than 1.
        """
        check_idle("idle_milliseconds", idle_milliseconds)
        self._idle = NEVER if idle_milliseconds is None else idle_milliseconds / 1_000
        self._waited = (0.0, 0)
        if self._waiting_since:
            self._waiting_since = monotonic()
        if self._slice is not None:
            self._slice.due = 0.0  # it may be shorter than what was before

    # Closing

    def close(self) -> None:
        """Ask for the close (`PsCloseReason.SELF_CLOSE`) and return at once.

        What was sent before still reaches the peer. A callback that runs is not interrupted; the
        session ends when it returns. From any greenlet and any OS thread; again without effect.
        """
        self._ask_to_close(PsCloseReason.SELF_CLOSE)

    def _ask_to_close(self, reason: PsCloseReason) -> None:
        """Ask for the close, from any thread, and return at once."""
        if get_ident() != self._thread_ident:
            self._note_asked(reason)
            self._manager.thread.call_soon(self._request_close, reason)
        else:
            self._request_close(reason)

    def _note_asked(self, reason: PsCloseReason) -> None:
        """In another thread: from now on the session is closed, for `reason` if it was open."""
        # As in `_decide`: without a call in between, so that no other thread comes in between.
        if self._open:
            self._asked_reason = reason
            self._open = False
            if self._framed is not None:
                self._framed.look_soon()

    def abort(self) -> None:
        """Reset the connection (RST) at once: nothing is drained, also while a close lingers.

        The session ends in its own greenlet with `PsCloseReason.SELF_CLOSE`, unless it was closed
        for another reason before. From any greenlet and any OS thread.
        """
        if get_ident() != self._thread_ident:
            self._abort_asked = True
            self._note_asked(PsCloseReason.SELF_CLOSE)
            self._manager.thread.call_soon(self._abort)
        else:
            self._abort()

    def _abort(self) -> None:
        self._request_close(PsCloseReason.SELF_CLOSE, linger=False)
        if not self._released:
            self._release(with_reset=True)
            self._wake()

    def _request_close(
        self, reason: PsCloseReason, cause: BaseException | None = None, *, linger: bool = True
    ) -> None:
        """Ask the session to end. In the hub's thread; does not switch. The first reason wins."""
        self._may_linger = self._may_linger and linger
        if self._manager.thread.is_over():
            self._end_with_hub()
            return
        if not self._decide(reason, cause):
            return
        self._wake()
        if self._send_queue is not None:
            self._send_queue.interrupt()
        if self._memberships:
            self._leave_all()

    def _decide(self, reason: PsCloseReason, cause: BaseException | None = None) -> bool:
        """Settle the reason; false if it was settled. Without what follows from it."""
        if self._reason is not PsCloseReason.NONE:
            return False
        if not self._open:  # another thread asked before; its request is on its way
            reason, cause = self._asked_reason, None
        self._reason = reason
        self._close_cause = cause
        self._open = False
        if self._framed is not None:
            self._framed.look_soon()
        return True

    def _end_with_hub(self) -> None:
        """Close the socket: nothing will run for this session any more, as its hub was destroyed.

        From any thread. No callback hears of it; watchers and timers went with the hub.
        """
        self._decide(PsCloseReason.SELF_CLOSE)
        self._waiting_since = 0.0
        self._send_queue = None
        self._leave_all()
        if not self._released:
            self._released = True
            (end if self._may_linger else reset)(self._sock)

    def _let_go(self, *, has_hub: bool) -> None:
        """Leave the connection to the parent process (`psofa_gevent.hub.forking`).

        Neither the peer nor a callback hears of it, and nothing runs for this session any more.

        Args:
            has_hub: whether its hub goes on in this process; else that is not to be touched.
        """
        if self._reason is PsCloseReason.NONE:
            self._reason = PsCloseReason.SELF_CLOSE
        self._open = self._may_linger = self._abort_asked = self._watches = False
        self._waiting_since = 0.0
        if self._framed is not None:
            self._framed.look_soon()  # the fork may be in the middle of a read
        keep(self._send_queue, self._outbox, self._tasks, self._reaper, self._cork)
        line, self._send_queue = self._send_queue, None
        self._outbox = self._tasks = self._reaper = self._cork = None
        self._corked_size = 0
        while self._memberships:
            membership, state = self._memberships.popitem()
            membership._let_go(self, state)
        if self._greenlet is not None:
            leave_behind(self._greenlet)
        if self._released:
            return
        self._released = True
        if has_hub:
            release(self._watcher)
            if line is not None:
                line.let_go()
        self._sock.close()

    def _wake(self) -> None:
        if self._waiting_since:
            self._loop.run_callback(self._resume)

    def _resume(self) -> None:
        # Since the wake-up the greenlet may have gone on, and be in a callback now.
        if self._waiting_since and self._greenlet is not None:
            self._ready.now = time()  # there may be bytes to read
            switch(self._greenlet)

    # The life of the session, in its own greenlet

    def _live(self) -> None:
        self._started = True
        try:
            try:
                if self._is_opening and self._manager.preamble is not None:
                    self._manager.preamble(self)
                    self._is_opening = not self._open
                if not self._is_opening:
                    self._log(logging.DEBUG, "%r: opened", self)
                    self._manager.callbacks.on_open(self)
                    if self._framed is not None:  # on_open may have received messages itself
                        self._framed.hand_over(self)
                    read(self)
            except BaseException as exc:
                self._uncork_without_waiting()
                self._fail(exc)
            while self._reason is PsCloseReason.NONE and not self._open:
                # Another thread's request is on its way, with what that thread has posted before.
                self._wait_until_woken(REQUEST_LOOK)
            self._kill_tasks()
            linger(self)
        except BaseException as exc:
            # Killed since the last callback; the rest does not wait.
            if isinstance(exc, (KeyboardInterrupt, SystemExit)):
                self._manager.thread.raise_in_main(exc)
            self._log(logging.DEBUG, "%r: did not linger to the end: %r", self, exc)
        finally:
            self._end()

    def _end(self) -> None:
        """Take the last steps: all of them, wherever something was thrown in on the way here."""
        try:
            self._request_close(PsCloseReason.SELF_CLOSE)  # unless there is a reason
            self._release(with_reset=self._abort_asked)
        finally:
            try:
                self._kill_tasks()
                if self._reaper is not None:
                    self._reaper.wait()
                    self._reaper = None
            finally:
                self._greenlet = None
                self._manager.session_ended(self)

    def _kill_tasks(self) -> None:
        """Begin to kill what works beside the callbacks, which are through; unless that is done."""
        if self._tasks and self._reaper is None:
            self._reaper = TaskReaper(self, self._wake)

    def _wait_until_woken(self, seconds: float | None) -> None:
        """Wait, for so long at most, outside of `read`. In the session's own greenlet."""
        timer = None if seconds is None else watch(self._loop.timer(seconds))
        if timer is not None:
            timer.start(self._resume)
        self._waiting_since = monotonic()
        try:
            self._manager.thread.hub.switch()
        finally:
            self._waiting_since = 0.0
            unwatch(timer)

    def _give_up_turn(self) -> None:
        """Let all others go on that can, and the hub, and go on after them; or earlier, if woken.

        In the session's own greenlet, between two messages. What was collected leaves before.
        """
        self._stop_watching()  # its socket is readable, as a rule
        self._ready.resume_later(self)
        self._wait_until_woken(None)

    @property
    def _is_within_read(self) -> bool:
        """Whether it has given up its turn between two messages of one read."""
        return self._waiting_since > 0 and self._framed is not None and self._framed.has_messages

    def receive(self, timeout: float | None = None) -> M:
        """Wait for the next message, and return it: straight-line code instead of ``on_message``.

        For `PsHandler`, and for the sync callbacks ``on_open`` and ``on_message`` of this session:
        what they receive does not come to ``on_message`` any more. The wait is one for bytes, as
        between two callbacks: the session may close with TIMEOUT after the idle time, and
        ``callback_timeout`` does not count it.

        Args:
            timeout: seconds; ``None``: until there is a message, or the session closes.

        Raises:
            TimeoutError: no message came in that time. The session stays open.
            PsClosedError: no message will come: the peer has sent its FIN, or the session has
                closed for another reason.
            RuntimeError: called in another greenlet than the session's own, or in a coroutine.
            ValueError: `timeout` is negative.
        """
        if getcurrent() is not self._greenlet:
            raise RuntimeError(
                f"{self!r}: receive belongs to the greenlet of the session itself: a PsHandler, or "
                "a sync callback"
            )
        if timeout is not None:
            check_seconds("timeout", timeout)
        message: M = receive_next(self, timeout)
        return message

    def __iter__(self) -> Iterator[M]:
        """The messages, one after the other, until no more will come (`receive`)."""
        while True:
            try:
                message = self.receive()
            except PsClosedError:
                return
            yield message
            del message

    def _stop_watching(self) -> None:
        """Until the next wait: a socket that stays readable would keep the hub busy."""
        if self._watches:
            self._watches = False
            self._watcher.stop()

    def _fail(self, exc: BaseException) -> None:
        """A callback raised, or a stranger threw something into the session's greenlet."""
        was_open = self._open
        self._request_close(PsCloseReason.FAILED, exc)
        if isinstance(exc, (KeyboardInterrupt, SystemExit)):
            self._manager.thread.raise_in_main(exc)
        if isinstance(exc, (PsSendError, PsClosedError, PsTlsError)) and not was_open:
            # The session closed under a callback that was sending: no fault of the callback's.
            self._log(logging.DEBUG, "%r: a callback ended with its session", self, exc_info=exc)
        elif isinstance(exc, SlowPeerError):  # that is told already, as what a peer did
            self._log(logging.DEBUG, "%r: a callback was ended", self, exc_info=exc)
        elif isinstance(exc, GreenletExit) and not was_open:
            self._log(logging.WARNING, "%r: a callback was ended", self, exc_info=exc)
        else:
            self._log(logging.ERROR, "%r: failed: %r", self, exc, exc_info=exc)

    def _release(self, *, with_reset: bool = False) -> None:
        """Let go of watcher and socket, in this order: descriptors are used again at once."""
        if self._released:
            return
        self._released = True
        self._watches = False
        self._watcher.stop()
        self._watcher.close()
        self._ready.unregister()
        if self._send_queue is not None:
            self._send_queue.close()
        if with_reset:
            reset(self._sock)
            return
        if self._tls is not None and not self._eof_sent:
            with contextlib.suppress(OSError):
                self._shut_socket()
        if self._eof_sent and self._eof_received:
            self._sock.close()  # both ends know
        else:
            end(self._sock)

    def _drop(self, reason: PsCloseReason, cause: BaseException | None = None) -> None:
        """End a session whose greenlet has not started: no callback ever hears of it.

        Its work is the manager's affair. Again without effect.
        """
        self._decide(reason, cause)
        self._context = None
        self._leave_all()
        self._release()
        greenlet, self._greenlet = self._greenlet, None
        if greenlet is not None:
            greenlet.session = None
            greenlet.kill(block=False)


def _format(address: Endpoint | None) -> str:
    if address is None:
        return "?"
    return format_address(*address[:2])
