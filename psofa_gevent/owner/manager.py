"""The manager: the common part of servers and clients, from the connected socket on.

One `SessionManager` lives from one start to the end of the next shutdown
(`psofa_gevent.owner.shutdown`). It holds the registry of sessions, their pool, the idle timer, the
heartbeats and the close queue. Servers and clients make the sockets, and pass them to `open`.

Everything belongs to the hub's thread; calls of other threads come through `HubThread`. There are
two exceptions: owners copy, count and search `SessionManager.sessions` in any thread, and
`SessionManager.end_with_hub` runs in any thread when the hub was destroyed. Only `release`
switches; `Shutdown` calls it in the shutdown's greenlet.
"""

from __future__ import annotations

import _socket
import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gevent import GreenletExit, getcurrent
from gevent.event import Event
from gevent.pool import Pool

from psofa_gevent.callback import PsCallback
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.hub.forking import keep, leave_behind, track
from psofa_gevent.hub.logs import PeerLog
from psofa_gevent.hub.ready import ready_sessions
from psofa_gevent.hub.thread import HubThread
from psofa_gevent.net.sockopts import Endpoint
from psofa_gevent.owner.callbacks import Callbacks
from psofa_gevent.owner.close_queue import CloseQueue
from psofa_gevent.owner.heartbeat import Heartbeats
from psofa_gevent.owner.idle import IdleTimer
from psofa_gevent.owner.registry import Registry
from psofa_gevent.session import inside
from psofa_gevent.session.life import SessionGreenlet
from psofa_gevent.session.session import PsSession
from psofa_gevent.settings import PsHeartbeat, SessionSettings
from psofa_gevent.tls.socket import TlsSocket

if TYPE_CHECKING:
    from gevent.hub import Hub

    from psofa_gevent.typing import Owner

__all__ = ["SessionManager"]

T = TypeVar("T")


class SessionCounter(Protocol):
    """Counts the sessions of one manager. Called in the hub's thread; must not switch."""

    def opened(self, session: PsSession[Any]) -> None:
        """Count a session that the manager has taken over."""

    def ended(self, session: PsSession[Any]) -> None:
        """Stop counting a session that the manager has forgotten."""


class SessionManager:
    """The sessions of one owner, and the greenlets that serve them all."""

    def __init__(
        self,
        owner: Owner,
        callback: PsCallback[Any],
        settings: SessionSettings,
        peer_log: PeerLog,
        max_sessions: int | None = None,
    ) -> None:
        self.owner = owner
        self.settings = settings
        self.context = copy_context()
        """A copy of the starter's context. ``on_stop`` runs in it; the context of an accepted
        session begins as a copy of it."""
        self.thread = HubThread()
        self.ready = ready_sessions()
        self.callbacks = Callbacks(callback, settings.callback_timeout)
        self.peer_log = peer_log
        self.preamble: Callable[[PsSession[Any]], None] | None = None
        self.counter: SessionCounter | None = None
        """Gets a call for each session; None: sessions are not counted."""
        self.pool = Pool(max_sessions)
        self.slot_is_free: Callable[[], object] | None = None
        """Called when the pool has a free slot again: a session's greenlet has ended."""
        self.changed = Event()
        """Set when the last session has ended, the close queue is empty, a starter has left, or the
        shutdown was shortened. The shutdown then checks its condition again."""
        self.stopped = Event()
        """Set when the shutdown is over: no callback will be called any more."""
        self.starters: set[object] = {getcurrent()}
        """The greenlets in `start` and ``connect``. A shutdown waits for them; they do not wait for
        the shutdown."""
        self.shutdown: object = None
        """The manager's `Shutdown`, once it was asked for (`psofa_gevent.owner.shutdown`)."""
        self._shutdowns: list[Any] = []
        self.has_started = False
        """Whether ``on_start`` has returned, so that ``on_stop`` is due."""
        self.sessions = Registry()
        """The sessions that have not ended, in order of arrival."""
        self._when_over: dict[PsSession[Any], Callable[[float], object]] = {}
        """The functions to call when a session is over (`when_over`)."""
        self.closing = CloseQueue(self.callbacks, self.context, self.thread, self.changed.set)
        self._idle = IdleTimer(settings.divide)
        beat = settings.heartbeat
        self._heartbeats = None if beat is None else Heartbeats(PsHeartbeat(*beat))
        self.process = os.getpid()
        """The process in which the manager runs: it does not run in child processes."""
        track(self)

    def open(
        self,
        sock: _socket.socket | TlsSocket,
        remote_endpoint: object,
        connection_id: uuid.UUID | None = None,
        local_endpoint: Endpoint | None = None,
        context: Context | None = None,
    ) -> PsSession[Any]:
        """Take over a connected socket: its session starts soon, in a greenlet of the pool.

        If this fails for any reason, the caller must close the socket. It may be closed already:
        the session is dropped, which closes the socket, unless its constructor failed.

        Args:
            sock: the socket, with its options set.
            remote_endpoint: the peer's address.
            connection_id: the session's id; by default a random one.
            local_endpoint: the socket's own address if it is known; otherwise the system is asked.
            context: copied to make the session's context; by default the caller's context.

        Raises:
            OSError: the socket is not connected any more.
        """
        own = copy_context() if context is None else context.copy()
        session = PsSession(self, sock, remote_endpoint, connection_id, local_endpoint, own)
        try:
            greenlet: Any = inside.greenlet_of(session)
            greenlet.rawlink(self._greenlet_ended)
            self.sessions.add(session)
            self._idle.add(session)
            if self._heartbeats is not None:
                self._heartbeats.add(session)
            if self.counter is not None:
                self.counter.opened(session)
            # Never waits: a server accepts only while the pool has a free slot.
            self.pool.start(greenlet)
        except BaseException as exc:
            self._drop(session, PsCloseReason.FAILED, exc)
            raise
        return session

    def get_session(self, connection_id: uuid.UUID) -> PsSession[Any] | None:
        """The open session with that id; if there are several, the last. From any thread."""
        for session in self.sessions.find(connection_id):
            if inside.is_usable(session):
                return session
        return None

    def set_shutdown(self, shutdown: T) -> T:
        """Set the shutdown, unless there is one; return the one that is set. Atomic."""
        self._shutdowns.append(shutdown)
        first: T = self._shutdowns[0]
        self.shutdown = first
        return first

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Register the calling greenlet as a starter during the block."""
        current = getcurrent()
        self.starters.add(current)
        try:
            yield
        finally:
            self.starters.discard(current)
            self.changed.set()

    def session_ended(self, session: PsSession[Any]) -> None:
        """Queue the ``on_close`` of a session that has ended and released its socket.

        In the session's greenlet, as its last step. Does not switch.
        """
        if self.forget(session):
            # A session that was closed before it opened has no on_close, unless it failed.
            if inside.has_on_close(session):
                self.closing.put(session)
            else:
                inside.forget_context(session)
            self._tell_that_over(session)
            inside.log(session, logging.DEBUG, "%r: closed", session)
        else:  # it was abandoned, but its callback has ended now
            inside.forget_context(session)

    def when_over(self, session: PsSession[Any], function: Callable[[float], object]) -> None:
        """Call `function`, which must not block, when the session's ``on_close`` has returned.

        Its argument is the monotonic time at which the session ended, before ``on_close``. It is
        called in the close greenlet, even if no ``on_close`` was due, as for a session that never
        began. It is not called for a session that a shutdown abandons.
        """
        self._when_over[session] = function

    def _tell_that_over(self, session: PsSession[Any]) -> None:
        if self._when_over and (function := self._when_over.pop(session, None)) is not None:
            self.closing.put_call(partial(function, monotonic()))

    def forget(self, session: PsSession[Any]) -> bool:
        """Remove the session from the manager; false if it was removed before."""
        if not self.sessions.discard(session):
            return False
        self._idle.discard(session)
        if self._heartbeats is not None:
            self._heartbeats.discard(session)
        if self.counter is not None:
            self.counter.ended(session)
        if not self.sessions:
            self.changed.set()
        return True

    def is_quiet(self) -> bool:
        """Whether no session is left and no callback is due."""
        return not self.sessions and not self.closing.pending

    def drop_unstarted(self) -> None:
        """End the sessions whose greenlets have not run yet. No callback is called for them."""
        for session in [session for session in self.sessions if not inside.has_begun(session)]:
            self._drop(session, PsCloseReason.SHUTDOWN)

    def request_closes(self, reason: PsCloseReason) -> None:
        """Ask all sessions to close."""
        for session in self.sessions.copy():
            inside.request_close(session, reason)

    def kill_sessions(self, *, again: bool) -> None:
        """Throw `GreenletExit` into the greenlets of all sessions (`inside.kill`)."""
        for session in self.sessions.copy():
            inside.kill(session, again=again)

    def abandon_sessions(self) -> int:
        """Remove the sessions that do not end, and close their sockets; return their number."""
        stuck = self.sessions.copy()
        for session in stuck:
            self.forget(session)
            inside.abandon(session)
            text = "%r: callback did not end: abandoned, on_close will not be called"
            inside.log(session, logging.ERROR, text, session)
        return len(stuck)

    def end_with_hub(self) -> None:
        """Close the sockets of all sessions: the hub was destroyed. From any thread."""
        for session in self.sessions.copy():
            inside.end_with_hub(session)

    def _let_go(self, hub: Hub | None) -> None:
        """Leave everything to the parent, in a child process (`psofa_gevent.hub.forking`)."""
        keep(self, self.sessions.copy(), dict(self._when_over))
        for greenlet in self.pool.greenlets:  # also those of abandoned sessions
            leave_behind(greenlet)
        for session in self.sessions.copy():
            inside.let_go(session, has_hub=hub is self.thread.hub)
        self.sessions.clear()
        self._when_over.clear()
        self.closing.let_go()
        self._idle.let_go()
        if self._heartbeats is not None:
            self._heartbeats.let_go()

    def release(self) -> None:
        """End the timers and the close greenlet, and wait for their end. Switches."""
        self._idle.stop()
        if self._heartbeats is not None:
            self._heartbeats.stop()
        self.closing.stop()

    def _greenlet_ended(self, greenlet: SessionGreenlet) -> None:
        ended: Any = greenlet
        if ended in self.pool:
            self.pool.discard(ended)  # the pool would remove it itself, but later
        if self.slot_is_free is not None:
            self.slot_is_free()
        # A greenlet that is killed before it starts never runs: only this link reports its end.
        session, greenlet.session = greenlet.session, None
        if session is not None:
            self._drop(session, PsCloseReason.FAILED, GreenletExit())

    def _drop(
        self, session: PsSession[Any], reason: PsCloseReason, cause: BaseException | None = None
    ) -> None:
        """End a session that has not begun. May be called again.

        Its session tasks may have begun; it counts as a session until they have ended.
        """
        inside.drop(session, reason, cause, partial(self._dropped, session))

    def _dropped(self, session: PsSession[Any]) -> None:
        inside.stop_reaper(session)
        self.forget(session)
        self._tell_that_over(session)
