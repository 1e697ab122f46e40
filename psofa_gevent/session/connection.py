"""The state of a session: every slot of it, and what all of its parts do with that.

Rules:

- All state of a session is declared in `Connection`, grouped by the part that changes it.
- `Connection._request_close` is the only way to a close reason. The first reason wins. It wakes the
  session where the session waits on its own socket, and interrupts its senders. It never switches.
  A close from another thread is decided there and then (`Connection._ask_to_close`), and carried
  out in the hub.
- The session waits in one way: `waiting_since` is not 0 while its greenlet is switched out in a
  wait of its own, and only then may anyone switch into it (`_resume`, `psofa_gevent.hub.ready`). No
  event of the socket disturbs a callback that waits on something else: the read watcher only puts
  the session into the run queue, and is stopped when a busy session is taken out of the queue.
- The parts of a session import this file, and this file imports none of them. Each half adds its
  methods to the one below: `Connection`, `SendingHalf`, `ReceivingHalf`, `SessionLife`,
  `PsSession`. A chain costs nothing on the way of a message; owned parts, or properties that hand
  on, would.

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

This file is longer than others, so that the state stands together with what all parts do with it:
whoever wants to know who may close the socket, or wake the session, reads one file.

What may switch here: `Connection._wait_until_woken` and `Connection._give_up_turn`, in the
session's own greenlet. All else, logging too, runs through without another greenlet in between.

All attributes belong to the hub's thread, and callers in other OS threads are handed over
(`HubThread`). These change attributes where they are called: `_note_asked` notes at once that a
close was asked for (with ``_abort_asked``, for an abort), ``post`` and ``send_eof`` put what they
are given into the outbox, under a lock, and make that if there is none, `_join` and `_leave` change
the memberships in steps that no thread can divide, ``connection_id`` makes an id of the random
bytes, and `_end_with_hub` ends a session whose hub runs no more.
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
from psofa_gevent.hub.io_events import READ
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
"""Seconds after which a full kernel is asked again to take the end of a TLS stream."""
_NOT_A_MEMBER = object()


class Callbacks(Protocol):
    """The callbacks of a session's owner, as functions (`psofa_gevent.owner.callbacks`)."""

    on_open: Callable[[Any], None]
    on_message: Callable[[Any, bytes], None]
    on_eof: Callable[[Any], None]
    on_idle: Callable[[Any], object] | None
    on_accept: Callable[[Any, Endpoint | None], object] | None


class TimeLimit(Protocol):
    """What ends a callback that runs too long (`psofa_gevent.owner.time_limit`)."""

    def paused(self) -> AbstractContextManager[None]:
        """Do not count the time in the block."""

    def restart(self) -> None:
        """Begin anew."""


class Manager(Protocol):
    """What a session needs of the manager that it belongs to (`psofa_gevent.owner.manager`)."""

    owner: Owner
    thread: HubThread
    ready: ReadySessions
    settings: SessionSettings
    peer_log: PeerLog
    preamble: Callable[[Any], None] | None
    """What comes before ``on_open``, in the session's greenlet; it may close the session."""

    @property
    def callbacks(self) -> Callbacks:
        """What the session calls."""

    def session_ended(self, session: Any) -> None:
        """The session has ended and its socket is released. Called in the session's greenlet."""


class Membership(Protocol):
    """Something that a session belongs to until its close is requested."""

    def _left(self, session: Any, state: Any) -> None:
        """The session has left, with what was kept for it. From any thread; does not switch."""

    def _let_go(self, session: Any, state: Any) -> None:
        """The session was the parent process's. Wakes nobody (`psofa_gevent.hub.forking`)."""


class Connection(Generic[M]):
    """The state of one session. Parts of the session read it directly, and nobody else does.

    `greenlet`, `waiting_since` and `stop_watching` are not for users either: they have their names
    from the run queue's protocol (`psofa_gevent.hub.ready.Ready`). All other files ask by
    `psofa_gevent.session.inside`.
    """

    __slots__ = (  # noqa: RUF023 - grouped by the part that changes them
        "__weakref__",
        # Who and where. Set once; TLS and a PROXY header change the endpoint and the socket.
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
        # The wire: changed by `_use_tls`, by whoever waits for the socket, and by `_release`.
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
        # The user's.
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
        """Of all its callbacks and its work; None when ``on_close`` has returned, as what was set
        there may well hold the session."""

        self._sock: Any = sock
        self._tls: TlsSocket | None = None
        self._watches = False
        """Whether the watcher runs."""
        self._released = False
        """The watcher and the socket are closed."""

        self.greenlet: Any = None
        """Its own, a `SessionGreenlet`; None: the session has ended."""
        self._started = False
        """Whether that greenlet has begun to run."""
        self._is_opening = manager.preamble is not None
        """Whether ``on_open`` has to wait for what comes before it."""
        self._time_limit: TimeLimit | None = None
        """What ends the running callback, if anything does."""
        self._tasks: set[LibraryGreenlet] | None = None
        """The greenlets that belong to it, beside its own."""
        self._reaper: Any = None
        """The `TaskReaper` that kills these, once that has begun."""

        self._open = True
        self._reason = PsCloseReason.NONE
        self._asked_reason = PsCloseReason.NONE
        """What another thread has asked for, whose request may be on its way."""
        self._close_cause: BaseException | None = None
        self._may_linger = True
        self._abort_asked = False
        """Whether another thread has asked for an abort, which is on its way."""
        self._memberships: dict[Membership, Any] | None = None
        """What it belongs to, each with what that keeps for it."""

        self.waiting_since = 0.0
        """Since when its greenlet waits, on the monotonic clock; 0: it does not wait."""
        self._waited = (0.0, 0)
        """Seconds that a `receive` has waited in vain, and how many bytes had come by then."""
        self._received_at = 0.0
        self._bytes_received = self._messages_received = 0
        self._eof_received = False
        self._framed: Any = None
        """The `FramedReceiver`; None: the session has had no framing."""
        self._frame_deadline = NEVER
        """When a message that has begun must be whole."""
        idle = settings.idle_milliseconds
        self._idle = NEVER if idle is None else idle / 1_000
        self._slice: Any = None
        """The `IdleSlice` of its owner that looks at it; its ``due`` says when."""

        framing = settings.framing
        self._encode: Callable[[Any], bytes] | None = None if framing is None else framing.encode
        self._cork: list[bytes] | None = None
        """What was sent while corked; None: the session is not."""
        self._corked_size = 0
        """Bytes that this takes."""
        self._cork_has_posts = False
        """Whether posts are among it: then it leaves without waiting."""
        self._send_queue: Any = None
        """The `SendQueue`; None: nobody waits to send."""
        self._outbox: Any = None
        """The `Outbox`: data accepted for sending that no caller waits on; None: never any."""
        self._bytes_sent = 0
        self._is_broken = False
        """A message broke off in its middle: nothing may follow it."""
        self._eof_requested = False
        self._eof_sent = False
        self._shuts_later = False

        self._values: dict[str, Any] | None = None
        # Last: whoever fails after it has to close it.
        self._watcher: Any = self._loop.io(sock.fileno(), READ)

    # Log

    def _log(
        self, level: int, message: str, *args: object, exc_info: BaseException | None = None
    ) -> None:
        """Log about the session, in its context: `psofa_gevent.hub.logs.log`."""
        log(level, message, *args, exc_info=exc_info, context=self._context, stacklevel=2)

    def _log_peer(self, kind: str, message: str, *args: object) -> None:
        """Log what the peer did: `PeerLog.tell`."""
        manager = self._manager
        manager.peer_log.tell(
            manager.owner, kind, message, *args, context=self._context, stacklevel=2
        )

    # Ask for the close

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

    def _end_with_hub(self) -> None:
        """Close the socket: nothing will run for this session any more, as its hub was destroyed.

        From any thread. No callback hears of it; watchers and timers went with the hub.
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

        Neither the peer nor a callback hears of it, and nothing runs for this session any more.

        Args:
            has_hub: whether its hub goes on in this process; else that is not to be touched.
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
        """Wait, for so long at most, outside of `ReceivingHalf._read`. In its own greenlet."""
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
        """Let all others go on that can, and the hub, and go on after them; or earlier, if woken.

        In the session's own greenlet, between two messages. What was collected leaves before.
        """
        self.stop_watching()  # its socket is readable, as a rule
        self._ready.resume_later(self)
        self._wait_until_woken(None)

    def _wake(self) -> None:
        if self.waiting_since:
            self._loop.run_callback(self._resume)

    def _resume(self) -> None:
        # Since the wake-up the greenlet may have gone on, and be in a callback now.
        if self.waiting_since and self.greenlet is not None:
            self._ready.now = time()  # there may be bytes to read
            switch(self.greenlet)

    def stop_watching(self) -> None:
        """Until the next wait: a socket that stays readable would keep the hub busy."""
        if self._watches:
            self._watches = False
            self._watcher.stop()

    # The wire

    def _use_tls(self, sock: TlsSocket) -> None:
        """From now on all bytes go through `sock`."""
        self.stop_watching()
        self._watcher = TlsWatcher(self._loop, self._ready, self._watcher, sock)
        self._tls = self._sock = sock

    def _use_proxy(self, proxy: PsProxyInfo) -> None:
        """The peer is the one of whom the header tells."""
        self._proxy = proxy
        if not proxy.is_local:
            self._remote_endpoint = proxy.source

    def _send_now(self, data: bytes | bytearray | memoryview) -> int:
        """Give the kernel what it takes of `data` now; return how many bytes that were."""
        try:
            sent: int = self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            self._send_failed(exc)
        self._bytes_sent += sent
        return sent

    def _send_file_now(self, descriptor: int, offset: int, count: int) -> int | None:
        """Give the kernel what it takes of a file now: how many bytes that were; 0 at its end.

        Returns:
            None: it takes nothing now.

        Raises:
            OSError: the kernel can't do that. Nothing has left.
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
        """Bytes that the kernel took, as they are on the wire."""
        return self._sock.wire_sent if type(self._sock) is TlsSocket else self._bytes_sent

    @property
    def _half_sent(self) -> int:
        """Bytes of the message that is on its way, and counts as not sent, but can't be another."""
        return self._sock.half_sent if type(self._sock) is TlsSocket else 0

    def _check_new_send(self) -> None:
        """Raise `PsSendError` where no send may begin."""
        self._check_sending(in_callback=sends_to_the_end())
        if self._eof_requested:
            raise PsSendError(f"{self!r}: send after send_eof")

    def _check_sending(self, *, in_callback: bool, is_batch: bool = False) -> None:
        """Raise `PsSendError` where no send may go on. SHUTDOWN lets those of callbacks go on."""
        if self._open:
            return
        goes_on = is_batch or (in_callback and self._reason is PsCloseReason.SHUTDOWN)
        if self._released or self._eof_sent or self._is_broken or not goes_on:
            raise PsSendError(f"{self!r}: the session is closed")

    def _break_stream(self) -> None:
        """A message broke off in its middle: let nothing follow it, until the session has ended."""
        if not self._is_broken:
            self._is_broken = True
            if self._send_queue is not None:
                self._send_queue.interrupt()

    def _send_queue_is_empty(self, queue: object) -> None:
        """The last sender left: let go of the queue, and let go on what waited for that."""
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
        """Send no more: with TLS the peer is told that it got all, if it did.

        Raises:
            BlockingIOError: the kernel does not take that now.
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
