"""The manager: what a server and the clients have in common, from the connected socket on.

One `SessionManager` lives from one start to the end of the next shutdown
(`psofa_gevent.owner.shutdown`): it holds the registry of sessions, their pool, the idle timer and
the close queue. How a socket comes to be is not its affair: it is handed over in `open`.

All of it belongs to the hub's thread; what other threads may call goes through `HubThread` before.
There are two exceptions: owners copy and count `SessionManager.sessions` in any thread, and
`SessionManager.end_with_hub` runs in any thread, when the hub was destroyed. Nothing here switches
greenlets but `release`, which `Shutdown` calls in a greenlet of its own.
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
    """What counts the sessions of one manager. In the hub's thread; must not switch."""

    def opened(self, session: PsSession[Any]) -> None:
        """The manager has the session."""

    def ended(self, session: PsSession[Any]) -> None:
        """The manager has the session no more."""


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
        """Of ``on_stop``; that of an accepted session begins as a copy of it. As it was for who
        started."""
        self.thread = HubThread()
        self.ready = ready_sessions()
        self.callbacks = Callbacks(callback, settings.callback_timeout)
        self.peer_log = peer_log
        self.preamble: Callable[[PsSession[Any]], None] | None = None
        self.counter: SessionCounter | None = None
        """What is told of each session; None: nobody wants to know."""
        self.pool = Pool(max_sessions)
        self.slot_is_free: Callable[[], object] | None = None
        """Called when the pool has room for one more again: a session's greenlet has ended."""
        self.changed = Event()
        """Set when a session ended, or the close queue ran empty: look again."""
        self.stopped = Event()
        """Set when the shutdown is over: no callback runs any more."""
        self.starters: set[object] = {getcurrent()}
        """The greenlets in `start` and ``connect``: a shutdown waits for them, not they for it."""
        self.shutdown: object = None
        """What shuts this manager down, once that has begun (`psofa_gevent.owner.shutdown`)."""
        self._shutdowns: list[Any] = []
        self.has_started = False
        """``on_start`` has returned, so ``on_stop`` is due."""
        self.sessions = Registry()
        """All that have not ended, in the order in which they came."""
        self._when_over: dict[PsSession[Any], Callable[[float], object]] = {}
        """What is to be called when all is over for a session."""
        self.closing = CloseQueue(self.callbacks, self.context, self.thread, self.changed.set)
        self._idle = IdleTimer(settings.divide)
        beat = settings.heartbeat
        self._heartbeats = None if beat is None else Heartbeats(PsHeartbeat(*beat))
        self.process = os.getpid()
        """In which it runs: not in its children."""
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

        If that fails, for whatever reason, nothing of it is left, and the caller closes the socket.

        Args:
            sock: the socket, its options set.
            remote_endpoint: the peer's address.
            connection_id: the session's id; by default a random one.
            local_endpoint: the socket's own address where it is known; else the system is asked.
            context: what the session's begins as a copy of; by default the caller's.

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
            # Never waits: a server accepts only while the pool has room.
            self.pool.start(greenlet)
        except BaseException as exc:
            self._drop(session, PsCloseReason.FAILED, exc)
            raise
        return session

    def get_session(self, connection_id: uuid.UUID) -> PsSession[Any] | None:
        """The open session with that id; the last one of several. From any thread."""
        for session in self.sessions.find(connection_id):
            if inside.is_usable(session):
                return session
        return None

    def set_shutdown(self, shutdown: T) -> T:
        """Keep `shutdown`, unless there is one: return the one that stays. In one atomic step."""
        self._shutdowns.append(shutdown)
        first: T = self._shutdowns[0]
        self.shutdown = first
        return first

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """The time in which the caller starts, or makes a connection."""
        current = getcurrent()
        self.starters.add(current)
        try:
            yield
        finally:
            self.starters.discard(current)
            self.changed.set()

    def session_ended(self, session: PsSession[Any]) -> None:
        """The session's greenlet is at its end, and its socket is released."""
        if self.forget(session):
            # No callback hears of one that was closed before it opened, unless that failed.
            if inside.has_on_close(session):
                self.closing.put(session)
            else:
                inside.forget_context(session)
            self._tell_that_over(session)
            inside.log(session, logging.DEBUG, "%r: closed", session)
        else:  # it was abandoned, and is through after all
            inside.forget_context(session)

    def when_over(self, session: PsSession[Any], function: Callable[[float], object]) -> None:
        """Call `function`, which must not block, when the session's ``on_close`` has returned.

        With the moment of the monotonic clock in which the session had ended, before ``on_close``.
        It is called in the close greenlet, also if no ``on_close`` was due, as for a session that
        never began. It is not called for a session that a shutdown abandons.
        """
        self._when_over[session] = function

    def _tell_that_over(self, session: PsSession[Any]) -> None:
        if self._when_over and (function := self._when_over.pop(session, None)) is not None:
            self.closing.put_call(partial(function, monotonic()))

    def forget(self, session: PsSession[Any]) -> bool:
        """Count the session no more; false if it did not count any longer."""
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
        """No session is left, and no callback is due."""
        return not self.sessions and not self.closing.pending

    def drop_unstarted(self) -> None:
        """End the sessions whose greenlets have not run yet: no callback hears of them."""
        for session in [session for session in self.sessions if not inside.has_begun(session)]:
            self._drop(session, PsCloseReason.SHUTDOWN)

    def request_closes(self, reason: PsCloseReason) -> None:
        """Ask all sessions to close."""
        for session in self.sessions.copy():
            inside.request_close(session, reason)

    def kill_sessions(self, *, again: bool) -> None:
        """Throw `GreenletExit` into whatever the sessions still do (`inside.kill`)."""
        for session in self.sessions.copy():
            inside.kill(session, again=again)

    def abandon_sessions(self) -> int:
        """Release the sockets of those that never end, and count them no more: how many."""
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
        """In a child process: leave all of it to the parent (`psofa_gevent.hub.forking`)."""
        keep(self, self.sessions.copy(), dict(self._when_over))
        for greenlet in self.pool.greenlets:  # also those of sessions that were left behind
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
        """End the timers and the close greenlet, and wait for that."""
        self._idle.stop()
        if self._heartbeats is not None:
            self._heartbeats.stop()
        self.closing.stop()

    def _greenlet_ended(self, greenlet: SessionGreenlet) -> None:
        ended: Any = greenlet
        if ended in self.pool:
            self.pool.discard(ended)  # it would go by itself, but after this
        if self.slot_is_free is not None:
            self.slot_is_free()
        # A greenlet that is killed before it starts never runs: this is all that is seen of it.
        session, greenlet.session = greenlet.session, None
        if session is not None:
            self._drop(session, PsCloseReason.FAILED, GreenletExit())

    def _drop(
        self, session: PsSession[Any], reason: PsCloseReason, cause: BaseException | None = None
    ) -> None:
        """End a session that has not begun. Its work may have, and it counts until that has ended.

        Again without effect.
        """
        inside.drop(session, reason, cause, partial(self._dropped, session))

    def _dropped(self, session: PsSession[Any]) -> None:
        inside.stop_reaper(session)
        self.forget(session)
        self._tell_that_over(session)
