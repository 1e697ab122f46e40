"""The manager: what a server and the clients have in common, from the connected socket on.

One `SessionManager` lives from one start to the next stop: it holds the registry of sessions, their
pool, the idle timer and the close queue; `psofa_gevent.stopping` is the way to stop all of it.
How a socket comes to be is not its affair: it is handed over in `open`.

All of it belongs to the hub's thread; what other threads may call goes through `HubThread` before.
There are two exceptions: owners copy and count `SessionManager.sessions` in any thread, and
`SessionManager.end_with_hub` runs in any thread, when the hub was destroyed. Nothing here switches
greenlets but `release`, which `Stop` calls in a greenlet of its own.
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
from typing import TYPE_CHECKING, Any

from gevent import GreenletExit, getcurrent
from gevent.event import Event
from gevent.pool import Pool

from psofa_gevent.callback import PsCallback
from psofa_gevent.closing import CloseQueue
from psofa_gevent.dispatch import Dispatch
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.forking import keep, leave_behind, track
from psofa_gevent.heartbeat import Heartbeats
from psofa_gevent.hub_thread import HubThread
from psofa_gevent.idle import IdleTimer
from psofa_gevent.ready import ready_sessions
from psofa_gevent.registry import Registry
from psofa_gevent.session import PsSession, SessionGreenlet
from psofa_gevent.settings import PsHeartbeat, SessionSettings
from psofa_gevent.tcp import Endpoint
from psofa_gevent.tls import TlsSocket
from psofa_gevent.work import Killer, kill_work

if TYPE_CHECKING:
    from gevent.hub import Hub

    from psofa_gevent.admission import Admission
    from psofa_gevent.session import Owner
    from psofa_gevent.stopping import Stop

__all__ = ["SessionManager"]


class SessionManager:
    """The sessions of one owner, and the greenlets that serve them all."""

    def __init__(
        self,
        owner: Owner,
        callback: PsCallback[Any],
        settings: SessionSettings,
        max_sessions: int | None = None,
    ) -> None:
        self.owner = owner
        self.settings = settings
        self.context = copy_context()
        """Of ``on_stop``; that of an accepted session begins as a copy of it. As it was for who
        started."""
        self.thread = HubThread()
        self.ready = ready_sessions()
        self.dispatch = Dispatch(callback, settings.callback_timeout)
        self.peer_log = owner._peer_log
        self.prologue: Callable[[PsSession[Any]], None] | None = None
        self.admission: Admission | None = None
        """Who is let in; None: everyone, and nobody is counted."""
        self.pool = Pool(max_sessions)
        self.changed = Event()
        """Set when a session ended, or the close queue ran empty: look again."""
        self.stopped = Event()
        """Set when the stop is over: no callback runs any more."""
        self.entering: set[object] = {getcurrent()}
        """The greenlets in `start` and ``connect``: a stop waits for them, and they not for it."""
        self.stop: Stop | None = None
        """What stops this manager, once that has begun."""
        self._stops: list[Stop] = []
        self.has_started = False
        """``on_start`` has returned, so ``on_stop`` is due."""
        self.sessions = Registry()
        """All that have not ended, in the order in which they came."""
        self._when_over: dict[PsSession[Any], Callable[[float], object]] = {}
        """What is to be called when all is over for a session."""
        self.closing = CloseQueue(self.dispatch, self.context, self.thread, self.changed.set)
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
            greenlet: Any = session._greenlet
            greenlet.rawlink(self._greenlet_ended)
            self.sessions.add(session)
            self._idle.add(session)
            if self._heartbeats is not None:
                self._heartbeats.add(session)
            if self.admission is not None:
                self.admission.opened(session)
            # Never waits: a server accepts only while the pool has room.
            self.pool.start(greenlet)
        except BaseException as exc:
            self._drop(session, PsCloseReason.FAILED, exc)
            raise
        return session

    def get_session(self, connection_id: uuid.UUID) -> PsSession[Any] | None:
        """The open session with that id; the last one of several. From any thread."""
        for session in self.sessions.find(connection_id):
            if session._open and not session._is_opening:
                return session
        return None

    def set_stop(self, stop: Stop) -> Stop:
        """Keep `stop`, unless there is one: return the one that stays. In one atomic step."""
        self._stops.append(stop)
        self.stop = self._stops[0]
        return self._stops[0]

    @contextlib.contextmanager
    def entrance(self) -> Iterator[None]:
        """The time in which the caller starts, or makes a connection."""
        current = getcurrent()
        self.entering.add(current)
        try:
            yield
        finally:
            self.entering.discard(current)
            self.changed.set()

    def session_ended(self, session: PsSession[Any]) -> None:
        """The session's greenlet is at its end, and its socket is released."""
        if self.forget(session):
            # No callback hears of one that was closed before it opened, unless that failed.
            if not session._is_opening or session._reason is PsCloseReason.FAILED:
                self.closing.put(session)
            else:
                session._context = None
            self._tell_that_over(session)
            session._log(logging.DEBUG, "%r: closed", session)
        else:  # it was abandoned, and is through after all
            session._context = None

    def when_over(self, session: PsSession[Any], function: Callable[[float], object]) -> None:
        """Call `function`, which must not block, when the session's ``on_close`` has returned.

        With the moment of the monotonic clock in which the session had ended, before ``on_close``.
        It is called in the close greenlet, also if no ``on_close`` was due, as for a session that
        never began. It is not called for a session that a stop leaves behind.
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
        if self.admission is not None:
            self.admission.ended(session)
        if not self.sessions:
            self.changed.set()
        return True

    def is_quiet(self) -> bool:
        """No session is left, and no callback is due."""
        return not self.sessions and not self.closing.pending

    def drop_unstarted(self) -> None:
        """End the sessions whose greenlets have not run yet: no callback hears of them."""
        for session in [session for session in self.sessions if not session._started]:
            self._drop(session, PsCloseReason.SHUTDOWN)

    def request_closes(self, reason: PsCloseReason) -> None:
        """Ask all sessions to close."""
        for session in self.sessions.copy():
            session._request_close(reason)

    def kill_sessions(self, *, again: bool) -> None:
        """Throw `GreenletExit` into whatever the sessions still do.

        `again`: callbacks that run have swallowed one, so what works beside them gets one as well;
        at first it is left for the session to kill, once its callback has ended.
        """
        for session in self.sessions.copy():
            if session._greenlet is not None:
                session._greenlet.kill(block=False)
            if session._greenlet is None or (again and session._killer is None):
                kill_work(session)

    def abandon_sessions(self) -> int:
        """Release the sockets of those that never end, and count them no more: how many."""
        stuck = self.sessions.copy()
        for session in stuck:
            self.forget(session)
            session._release()
            if session._killer is not None:
                session._killer.stop()
            text = "%r: its callback does not end: left behind, without on_close"
            session._log(logging.ERROR, text, session)
        return len(stuck)

    def end_with_hub(self) -> None:
        """Close the sockets of all sessions: the hub was destroyed. From any thread."""
        for session in self.sessions.copy():
            session._end_with_hub()

    def _let_go(self, hub: Hub | None) -> None:
        """In a child process: leave all of it to the parent (`psofa_gevent.forking`)."""
        keep(self, self.sessions.copy(), dict(self._when_over))
        for greenlet in self.pool.greenlets:  # also those of sessions that were left behind
            leave_behind(greenlet)
        for session in self.sessions.copy():
            session._let_go(has_hub=hub is self.thread.hub)
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
        session._drop(reason, cause)
        if session._work and session._killer is None:
            session._killer = Killer(session, partial(self._dropped, session))
        elif not session._work:
            self._dropped(session)

    def _dropped(self, session: PsSession[Any]) -> None:
        if session._killer is not None:
            session._killer.stop()
            session._killer = None
        self.forget(session)
        self._tell_that_over(session)
