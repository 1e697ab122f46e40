"""The state of a session: all its slots, and the methods that several of its parts use.

Rules:

- `Connection` declares all state of a session, grouped by the part that changes it.
- `Connection._request_close` settles the close reason. The first reason wins. The request wakes the
  session from a wait of its own, interrupts its senders, and never switches. Another thread's
  request is settled at once in that thread (`Connection._ask_to_close`), and carried out in the
  hub. Other functions settle the reason only where the session's greenlet will not run:
  `Connection._end_with_hub`, `Connection._let_go`, `SessionLife._drop`.
- The session waits in one way: `waiting_since` is not 0 while its greenlet is switched out in a
  wait of the session itself, and only then may other code switch into that greenlet (`_resume`,
  `psofa_gevent.hub.ready`). Socket events do not disturb a callback that waits on something else:
  the read watcher only puts the session into the run queue, and stops when a busy session is taken
  out of the queue.
- The parts of a session import this file; this file imports no part. Each class adds its methods to
  the class before it: `Connection`, `SendingHalf`, `ReceivingHalf`, `SessionLife`, `PsSession`.
  Inheritance adds no cost per message; owned parts or forwarding properties would.

The phases of a session, and which part moves it on to the next one:

======================  ========  ===========  =====  =======  =========  ==========================
phase                   _started  _is_opening  _open  _reason  _released  moved on by
======================  ========  ===========  =====  =======  =========  ==========================
made                    no        ?            yes    NONE     no         the manager, in ``open``
before ``on_open``      yes       yes          yes    NONE     no         the manager's preamble
open                    yes       no           yes    NONE     no         `ReceivingHalf._read`
close asked, by thread  ?         ?            no     NONE     no         the request, on its way
closing, lingering      yes       ?            no     set      no         `SessionLife._live`
aborted                 yes       ?            no     set      yes        `SessionLife._live`
ended                   yes       ?            no     set      yes        nobody: close queue
dropped, never began    no        ?            no     set      yes        nobody: no callback hears
======================  ========  ===========  =====  =======  =========  ==========================

``?``: either. A session that never opens keeps ``_is_opening``, also when it has ended.

This file is longer than others because it keeps the state together with the methods that all parts
use. `psofa_gevent.session.life` lists the functions that close the socket.

What may switch here: `Connection._wait_until_woken` and `Connection._give_up_turn`, in the
session's own greenlet, and `Connection._resume`, by which the hub switches into that greenlet.
Nothing else switches, not even logging.

All attributes belong to the hub's thread: `HubThread` takes the calls of other OS threads there.
These functions change attributes in the thread that calls them:

- `_note_asked` notes at once that a close was requested, and has the framed receiver look around;
  ``abort`` also sets ``_abort_asked``.
- ``post`` and ``send_eof`` change the outbox's inbox under `HubThread.lock`, and make the outbox if
  needed.
- `_join` and `_leave` change the memberships in atomic steps.
- ``connection_id`` makes an id from the random bytes.
- `_end_with_hub` ends a session whose hub will not run again.
"""

from __future__ import annotations

import _socket
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import Context
from time import monotonic, time
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol

from gevent import GreenletExit

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsClosedError, PsSendError, PsTlsError, SlowPeerError
from psofa_gevent.hub.forking import keep, leave_behind, release, unwatch, watch
from psofa_gevent.hub.greenlets import LibraryGreenlet, sends_to_the_end
from psofa_gevent.hub.io_masks import READ
from psofa_gevent.hub.logs import PeerLog, log
from psofa_gevent.hub.ready import ReadySessions, switch
from psofa_gevent.hub.thread import HubThread, get_ident
from psofa_gevent.hub.times import NEVER
from psofa_gevent.messages import M
from psofa_gevent.net.sockopts import (
    SENDFILE_REFUSALS,
    Endpoint,
    end,
    endpoint,
    keep_urgent_in_line,
    reset,
)
from psofa_gevent.proxy_protocol import PsProxyInfo
from psofa_gevent.session.connection_id import random_bytes
from psofa_gevent.settings import SessionSettings
from psofa_gevent.tls.socket import TlsSocket, TlsWatcher

if TYPE_CHECKING:
    from psofa_gevent.typing import Owner

__all__ = ["Callbacks", "Connection", "Manager", "Membership", "TimeLimit"]

SHUT_AGAIN = 0.02
"""Seconds until the next try to send the end of a TLS stream to a full kernel buffer."""
_NOT_A_MEMBER = object()


class Callbacks(Protocol):
    """The callbacks of a session's owner, as functions (`psofa_gevent.owner.callbacks`)."""

    on_open: Callable[[Any], None]
    on_message: Callable[[Any, bytes], None]
    on_eof: Callable[[Any], None]
    on_idle: Callable[[Any], object] | None
    on_accept: Callable[[Any, Endpoint | None], object] | None


class TimeLimit(Protocol):
    """Ends a callback that runs too long (`psofa_gevent.owner.time_limit`)."""

    def paused(self) -> AbstractContextManager[None]:
        """Stop the clock during the block, and start it again from zero after the block."""

    def restart(self) -> None:
        """Start the clock again from zero."""


class Manager(Protocol):
    """The parts of a manager that its sessions use (`psofa_gevent.owner.manager`)."""

    owner: Owner
    thread: HubThread
    ready: ReadySessions
    settings: SessionSettings
    peer_log: PeerLog
    preamble: Callable[[Any], None] | None
    """Runs before ``on_open``, in the session's greenlet; it may close the session."""

    @property
    def callbacks(self) -> Callbacks:
        """The callbacks that the session calls."""

    def session_ended(self, session: Any) -> None:
        """Take note that the session has ended and released its socket. In its greenlet."""


class Membership(Protocol):
    """Something that a session belongs to until its close is requested."""

    def _left(self, session: Any, state: Any) -> None:
        """Take note that the session has left; `state` is what `Connection._join` was given.

        In any thread; does not switch.
        """

    def _let_go(self, session: Any, state: Any) -> None:
        """Leave the session to the parent process. Wakes nobody (`psofa_gevent.hub.forking`)."""


class Connection(Generic[M]):
    """The state of one session. Only the parts of the session read it directly.

    Other files use `psofa_gevent.session.inside`. `greenlet`, `waiting_since` and `stop_watching`
    are not for users either: they have public names because the run queue's protocol does
    (`psofa_gevent.hub.ready.Ready`).
    """

    __slots__ = (  # noqa: RUF023 - grouped by the part that changes them
        "__weakref__",
        # Identity and place. Set once, but a PROXY header changes the peer's endpoint.
        "_manager",
        "_thread_ident",
        "_loop",
        "_ready",
        "_stays_armed",
        "_connection_id",
        "_opened_at",
        "_local_endpoint",
        "_remote_endpoint",
        "_proxy",
        "_context",
        # The wire: changed by `_use_tls`, by the waits for the socket, and by `_release`.
        "_sock",
        "_tls",
        "_watcher",
        "_watches",
        "_released",
        # Life: changed by the session's greenlet (`psofa_gevent.session.life`) and the manager.
        "greenlet",
        "_started",
        "_is_opening",
        "_time_limit",
        "_tasks",
        "_reaper",
        # Close: changed by `_request_close`, `_ask_to_close` and ``abort``.
        "_open",
        "_reason",
        "_asked_reason",
        "_close_cause",
        "_may_linger",
        "_abort_asked",
        "_memberships",
        # Receiving: changed by `psofa_gevent.session.receiving`, and by `_wait_until_woken`.
        "waiting_since",
        "_waited",
        "_received_at",
        "_bytes_received",
        "_messages_received",
        "_eof_received",
        "_framed",
        "_frame_deadline",
        "_idle",
        "_slice",
        # Sending: changed by `psofa_gevent.session.sending`, and its parts.
        "_encode",
        "_cork",
        "_corked_size",
        "_cork_has_posts",
        "_send_queue",
        "_outbox",
        "_bytes_sent",
        "_is_broken",
        "_eof_requested",
        "_eof_sent",
        "_shuts_later",
        # The user's values.
        "_values",
    )

    def __init__(  # noqa: PLR0915 - one line for each part of the state
        self,
        manager: Manager,
        sock: _socket.socket | TlsSocket,
        remote_endpoint: object,
        connection_id: uuid.UUID | None,
        local_endpoint: Endpoint | None,
        context: Context,
    ) -> None:
        settings = manager.settings
        self._manager = manager
        self._thread_ident = manager.thread.ident
        self._loop = manager.thread.loop
        self._ready = manager.ready
        self._stays_armed = manager.ready.stays_armed
        sock.setblocking(False)
        keep_urgent_in_line(sock)
        self._connection_id: bytes | uuid.UUID = connection_id or random_bytes()
        self._opened_at = time()
        self._local_endpoint = local_endpoint or endpoint(sock.getsockname())
        self._remote_endpoint = endpoint(remote_endpoint)
        self._proxy: PsProxyInfo | None = None
        self._context: Context | None = context
        """The context of its callbacks and session tasks. None when ``on_close`` has returned: a
        value that was set in the context may hold the session."""

        self._sock: Any = sock
        self._tls: TlsSocket | None = None
        self._watches = False
        """Whether the watcher runs."""
        self._released = False
        """The watcher and the socket are closed."""

        self.greenlet: Any = None
        """The session's own greenlet, a `SessionGreenlet`; None: the session has ended."""
        self._started = False
        """Whether the session's greenlet has begun to run."""
        self._is_opening = manager.preamble is not None
        """Whether ``on_open`` still waits for the preamble."""
        self._time_limit: TimeLimit | None = None
        """The time limit of the running callback; None: the callback has none."""
        self._tasks: set[LibraryGreenlet] | None = None
        """The session's tasks."""
        self._reaper: Any = None
        """The `TaskReaper` that kills the session's tasks; None: it has not begun."""

        self._open = True
        self._reason = PsCloseReason.NONE
        self._asked_reason = PsCloseReason.NONE
        """The reason that another thread asked for; its request may still be on its way."""
        self._close_cause: BaseException | None = None
        self._may_linger = True
        self._abort_asked = False
        """Whether another thread has asked for an abort; its request may still be on its way."""
        self._memberships: dict[Membership, Any] | None = None
        """What the session belongs to; the values are the state that each keeps for it."""

        self.waiting_since = 0.0
        """When its greenlet began to wait, on the monotonic clock; 0: it does not wait."""
        self._waited = (0.0, 0)
        """Seconds that a `receive` has waited in vain, and the bytes received by then."""
        self._received_at = 0.0
        self._bytes_received = self._messages_received = 0
        self._eof_received = False
        self._framed: Any = None
        """The `FramedReceiver`; None: the session has had no framing."""
        self._frame_deadline = NEVER
        """Monotonic time by which a message that has begun must be whole."""
        idle = settings.idle_milliseconds
        self._idle = NEVER if idle is None else idle / 1_000
        self._slice: Any = None
        """The `IdleSlice` of its owner that checks it for idleness, at the time in ``due``."""

        framing = settings.framing
        self._encode: Callable[[Any], bytes] | None = None if framing is None else framing.encode
        self._cork: list[bytes] | None = None
        """The messages collected by the cork; None: the session is not corked."""
        self._corked_size = 0
        """Bytes that the collected messages take, with `COLLECTED` for each."""
        self._cork_has_posts = False
        """Whether the cork has collected posts: then the messages leave without waiting."""
        self._send_queue: Any = None
        """The `SendQueue`; None: nobody waits to send."""
        self._outbox: Any = None
        """The `Outbox`, data accepted for sending that no caller waits for; None: never any."""
        self._bytes_sent = 0
        self._is_broken = False
        """Whether a message broke off in its middle: nothing may follow it."""
        self._eof_requested = False
        self._eof_sent = False
        self._shuts_later = False

        self._values: dict[str, Any] | None = None
        # Last: code that fails after this line has to close the watcher.
        self._watcher: Any = self._loop.io(sock.fileno(), READ)

    # Log

    def _log(
        self, level: int, message: str, *args: object, exc_info: BaseException | None = None
    ) -> None:
        """Log about the session, in its context (`psofa_gevent.hub.logs.log`)."""
        log(level, message, *args, exc_info=exc_info, context=self._context, stacklevel=2)

    def _log_peer(self, kind: str, message: str, *args: object) -> None:
        """Log what the peer did (`PeerLog.tell`)."""
        manager = self._manager
        manager.peer_log.tell(
            manager.owner, kind, message, *args, context=self._context, stacklevel=2
        )

    # Ask for the close

    @property
    def close_reason(self) -> PsCloseReason:
        """Why the session closed: the reason that ``on_close`` gets. NONE: the session is open.

        Changes once, together with `is_open`, in the moment in which any thread requests a close;
        ``on_close`` comes later. From any thread.
        """
        if self._open:
            return PsCloseReason.NONE
        # After another thread's request there is no reason yet, until the hub carries it out.
        return self._reason if self._reason is not PsCloseReason.NONE else self._asked_reason

    def _ask_to_close(self, reason: PsCloseReason) -> None:
        """Request the close, from any thread, and return at once."""
        if get_ident() != self._thread_ident:
            self._note_asked(reason)
            self._manager.thread.call_soon(self._request_close, reason)
        else:
            self._request_close(reason)

    def _note_asked(self, reason: PsCloseReason) -> None:
        """Mark an open session as closed, for `reason`. In another thread than the hub's."""
        # As in `_decide`, no call between the lines: so no other thread runs between them.
        if self._open:
            self._asked_reason = reason
            self._open = False
            if self._framed is not None:
                self._framed.look_soon()

    def _request_close(
        self, reason: PsCloseReason, cause: BaseException | None = None, *, linger: bool = True
    ) -> None:
        """Ask the session to end. The first reason wins. In the hub's thread; does not switch."""
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
        """Settle the close reason, and wake or interrupt nobody; false if it was settled before."""
        if self._reason is not PsCloseReason.NONE:
            return False
        if not self._open:  # another thread asked first; its request is on its way
            reason, cause = self._asked_reason, None
        self._reason = reason
        self._close_cause = cause
        self._open = False
        if self._framed is not None:
            self._framed.look_soon()
        return True

    def _fail(self, exc: BaseException) -> None:
        """Close with FAILED for `exc`, which a callback raised or foreign code threw in; log it."""
        was_open = self._open
        self._request_close(PsCloseReason.FAILED, exc)
        if isinstance(exc, (KeyboardInterrupt, SystemExit)):
            self._manager.thread.raise_in_main(exc)
        if isinstance(exc, (PsSendError, PsClosedError, PsTlsError)) and not was_open:
            # The session closed while a callback was sending: not the callback's fault.
            self._log(logging.DEBUG, "%r: a callback ended with its session", self, exc_info=exc)
        elif isinstance(exc, SlowPeerError):  # logged already, as an action of the peer
            self._log(logging.DEBUG, "%r: a callback was ended", self, exc_info=exc)
        elif isinstance(exc, GreenletExit) and not was_open:
            self._log(logging.WARNING, "%r: a callback was ended", self, exc_info=exc)
        else:
            self._log(logging.ERROR, "%r: failed: %r", self, exc, exc_info=exc)

    def _end_with_hub(self) -> None:
        """Close the socket of a session whose hub was destroyed: no code of it will run again.

        From any thread. No callback is called. The watchers and timers ended with the hub.
        """
        self._decide(PsCloseReason.SELF_CLOSE)
        self.waiting_since = 0.0
        self._send_queue = None
        self._leave_all()
        if not self._released:
            self._released = True
            (end if self._may_linger else reset)(self._sock)

    def _let_go(self, *, has_hub: bool) -> None:
        """Leave the connection to the parent process (`psofa_gevent.hub.forking`).

        Sends nothing to the peer and calls no callback; no code of this session runs again.

        Args:
            has_hub: whether its hub goes on in this process; otherwise its hub must not be touched.
        """
        if self._reason is PsCloseReason.NONE:
            self._reason = PsCloseReason.SELF_CLOSE
        self._open = self._may_linger = self._abort_asked = self._watches = False
        self.waiting_since = 0.0
        if self._framed is not None:
            self._framed.look_soon()  # the fork may be in the middle of a read
        keep(self._send_queue, self._outbox, self._tasks, self._reaper, self._cork)
        queue, self._send_queue = self._send_queue, None
        self._outbox = self._tasks = self._reaper = self._cork = None
        self._corked_size = 0
        while self._memberships:
            membership, state = self._memberships.popitem()
            membership._let_go(self, state)
        if self.greenlet is not None:
            leave_behind(self.greenlet)
        if self._released:
            return
        self._released = True
        if has_hub:
            release(self._watcher)
            if queue is not None:
                queue.let_go()
        self._sock.close()

    # Memberships: from any thread

    def _join(self, membership: Membership, state: object) -> None:
        """Belong to `membership` until the close is requested; not at all if it was before.

        From any thread, as is `_leave`: each step here is atomic.
        """
        if self._memberships is None:
            self._memberships = {}
        self._memberships[membership] = state
        if not self._open:
            self._leave(membership)

    def _leave(self, membership: Membership) -> None:
        if self._memberships:
            state = self._memberships.pop(membership, _NOT_A_MEMBER)
            if state is not _NOT_A_MEMBER:
                membership._left(self, state)

    def _leave_all(self) -> None:
        while self._memberships:
            try:
                membership, state = self._memberships.popitem()
            except KeyError:  # another thread took the last one
                return
            membership._left(self, state)

    # Wait, in the session's own greenlet, and be woken

    def _wait_until_woken(self, seconds: float | None) -> None:
        """Wait until woken, for `seconds` at most, outside of `ReceivingHalf._read`.

        In the session's own greenlet; switches.
        """
        timer = None if seconds is None else watch(self._loop.timer(seconds))
        if timer is not None:
            timer.start(self._resume)
        self.waiting_since = monotonic()
        try:
            self._manager.thread.hub.switch()
        finally:
            self.waiting_since = 0.0
            unwatch(timer)

    def _give_up_turn(self) -> None:
        """Let the hub and all ready sessions run, then go on; earlier if the session is woken.

        In the session's own greenlet, between two messages. Collected messages are sent first.
        """
        self.stop_watching()  # its socket is readable, as a rule
        self._ready.resume_later(self)
        self._wait_until_woken(None)

    def _wake(self) -> None:
        if self.waiting_since:
            self._loop.run_callback(self._resume)

    def _resume(self) -> None:
        # Since the wake-up, the greenlet may have gone on, and may be in a callback now.
        if self.waiting_since and self.greenlet is not None:
            self._ready.now = time()  # there may be bytes to read
            switch(self.greenlet)

    def stop_watching(self) -> None:
        """Stop the watcher until the next wait: a readable socket would keep the hub busy."""
        if self._watches:
            self._watches = False
            self._watcher.stop()

    # The wire

    def _use_tls(self, sock: TlsSocket) -> None:
        """Send and receive all further bytes through `sock`."""
        self.stop_watching()
        self._watcher = TlsWatcher(self._loop, self._ready, self._watcher, sock)
        self._tls = self._sock = sock

    def _use_proxy(self, proxy: PsProxyInfo) -> None:
        """Take the peer's endpoint from a load balancer's header."""
        self._proxy = proxy
        if not proxy.is_local:
            self._remote_endpoint = proxy.source

    def _send_now(self, data: bytes | bytearray | memoryview) -> int:
        """Give the kernel as much of `data` as it takes now; return the number of bytes taken."""
        try:
            sent: int = self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            self._send_failed(exc)
        self._bytes_sent += sent
        return sent

    def _send_file_now(self, descriptor: int, offset: int, count: int) -> int | None:
        """Give the kernel as much of a file as it takes now.

        Returns:
            The number of bytes taken; 0: the end of the file; None: the kernel takes nothing now.

        Raises:
            OSError: the kernel can't send this file by itself. Nothing was sent.
            PsSendError: the socket failed.
        """
        try:
            sent = os.sendfile(self._sock.fileno(), descriptor, offset, count)
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno in SENDFILE_REFUSALS:
                raise
            self._send_failed(exc)
        self._bytes_sent += sent
        return sent

    def _send_failed(self, exc: OSError) -> NoReturn:
        self._request_close(PsCloseReason.FAILED, exc, linger=False)
        raise PsSendError(f"{self!r}: send failed: {exc}") from exc

    @property
    def _wire_sent(self) -> int:
        """Bytes that the kernel took, counted as on the wire: with TLS, encrypted ones."""
        return self._sock.wire_sent if type(self._sock) is TlsSocket else self._bytes_sent

    @property
    def _half_sent(self) -> int:
        """Bytes that TLS has encrypted but not counted as sent: no other bytes may replace them."""
        return self._sock.half_sent if type(self._sock) is TlsSocket else 0

    def _check_new_send(self) -> None:
        """Raise `PsSendError` if no send may begin."""
        self._check_sending(in_callback=sends_to_the_end())
        if self._eof_requested:
            raise PsSendError(f"{self!r}: send after send_eof")

    def _check_sending(self, *, in_callback: bool, is_batch: bool = False) -> None:
        """Raise `PsSendError` if a send must not go on. SHUTDOWN lets sends of callbacks go on."""
        if self._open:
            return
        goes_on = is_batch or (in_callback and self._reason is PsCloseReason.SHUTDOWN)
        if self._released or self._eof_sent or self._is_broken or not goes_on:
            raise PsSendError(f"{self!r}: the session is closed")

    def _break_stream(self) -> None:
        """Let no bytes follow, until the session has ended: a message broke off in its middle."""
        if not self._is_broken:
            self._is_broken = True
            if self._send_queue is not None:
                self._send_queue.interrupt()

    def _send_queue_is_empty(self, queue: object) -> None:
        """Drop the queue, which its last sender has left; go on with a half-close or the close."""
        if self._send_queue is queue:
            self._send_queue = None
            if self._eof_requested:
                self._shut_writing()
            if not self._open:
                self._wake()

    def _shut_writing(self) -> None:
        if self._send_queue is not None or self._eof_sent or self._released:
            return
        try:
            self._shut_socket()
        except BlockingIOError:
            self._shut_later()
            return
        except OSError as exc:
            self._request_close(PsCloseReason.FAILED, exc, linger=False)
            return
        if self._eof_received:
            self._request_close(PsCloseReason.PEER_CLOSE)

    def _shut_socket(self) -> None:
        """Shut down writing. With TLS, first tell the peer that the stream is complete, if it is.

        Raises:
            BlockingIOError: the kernel does not take the end of the TLS stream now.
            OSError: the connection is gone.
        """
        is_complete = not (self._is_broken or self._half_sent or self._send_queue is not None)
        has_failed = self._reason is PsCloseReason.FAILED
        if type(self._sock) is TlsSocket and is_complete and not has_failed:
            self._sock.close_notify()
        self._eof_sent = True
        self._sock.shutdown(_socket.SHUT_WR)

    def _shut_later(self) -> None:
        def shut() -> None:
            unwatch(timer)
            self._shuts_later = False
            self._shut_writing()

        if not self._shuts_later:
            self._shuts_later = True
            timer = watch(self._loop.timer(SHUT_AGAIN, ref=False))
            timer.start(shut)
