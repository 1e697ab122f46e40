"""Heartbeats: what a session sends when it has sent nothing for a while.

They keep the tables of NAT routers and firewalls from forgetting a connection, and let the peer's
idle check know that this end is there. One greenlet looks at all sessions of an owner, ten times in
the time of a heartbeat, at intervals of 5 ms to 1 s: a heartbeat may be late by one interval. A
look compares two numbers per session; while it sends what it finds due, others have their turns. A
fixed message is posted (`PsSession.post`); a function runs in a greenlet that belongs to its
session (`PsSession.spawn`), so a slow one delays nobody else's, and is not called again before it
has returned.

None is sent before ``on_open``, nor while a send waits for the peer: one that takes nothing has no
use for more.
"""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event

from psofa_gevent.aio.coroutines import run_task
from psofa_gevent.errors import PsClosedError
from psofa_gevent.hub.greenlets import ServiceGreenlet
from psofa_gevent.hub.times import SHORTEST_TIMER, TURN
from psofa_gevent.session import inside

if TYPE_CHECKING:
    from gevent import Greenlet

    from psofa_gevent.session.session import PsSession
    from psofa_gevent.settings import PsHeartbeat

__all__ = ["Heartbeats"]

LOOKS = 10
"""In the time of a heartbeat."""
SHORTEST_PERIOD = 0.005
LONGEST_PERIOD = 1.0
"""Seconds from one look to the next."""


class Heartbeats:
    """The heartbeats of one owner.

    All methods belong to the hub's thread. Only `stop` switches.
    """

    def __init__(self, heartbeat: PsHeartbeat) -> None:
        self._seconds = heartbeat.milliseconds / 1_000
        self._period = min(max(self._seconds / LOOKS, SHORTEST_PERIOD), LONGEST_PERIOD)
        self._heartbeat = heartbeat
        self._quiet: dict[PsSession[Any], _Quiet] = {}
        self._not_empty = Event()
        self._service = ServiceGreenlet(self._look_for_ever, self._has_work)

    def add(self, session: PsSession[Any]) -> None:
        """Let `session` have heartbeats from now on."""
        self._quiet[session] = _Quiet(monotonic())
        if len(self._quiet) == 1:
            self._not_empty.set()
            self._service.ensure()

    def discard(self, session: PsSession[Any]) -> None:
        """No more of them."""
        self._quiet.pop(session, None)
        if not self._quiet:
            self._not_empty.clear()

    def stop(self) -> None:
        """End the greenlet. Waits for it, so not from within it."""
        self._service.stop()

    def let_go(self) -> None:
        """No more of them: the sessions are the parent process's."""
        self._service.let_go()

    def _has_work(self) -> bool:
        return bool(self._quiet)

    def _look_for_ever(self) -> None:
        while True:
            self._not_empty.wait()
            gevent.sleep(self._period)
            self._look()

    def _look(self) -> None:
        now = monotonic()
        due = []
        for session, quiet in self._quiet.items():
            if not inside.is_quiet(session, quiet.sent):
                quiet.sent, quiet.since = session.bytes_sent, now
            elif now - quiet.since >= self._seconds:
                due.append((session, quiet))
        turn_since = monotonic()
        for session, quiet in due:
            quiet.since = now
            if inside.has_nothing_to_send(session) and session.bytes_sent == quiet.sent:
                self._beat(session, quiet)
            if monotonic() - turn_since >= TURN:
                # Thousands that began together take 0.1 s. (Zero would come before all sockets.)
                gevent.sleep(SHORTEST_TIMER)
                turn_since = monotonic()

    def _beat(self, session: PsSession[Any], quiet: _Quiet) -> None:
        heartbeat = self._heartbeat
        if callable(heartbeat.message):
            if quiet.asked is None or quiet.asked.dead:
                with contextlib.suppress(PsClosedError):  # by another thread, just now
                    quiet.asked = session.spawn(_ask_and_post, session, heartbeat)
            return
        try:
            session.post(heartbeat.message, raw=heartbeat.raw)
        except Exception as exc:  # the session has gone over to a framing that can't carry it
            inside.fail(session, exc)


class _Quiet:
    """What is kept for one session."""

    __slots__ = ("asked", "sent", "since")

    def __init__(self, now: float) -> None:
        self.sent = 0
        """Bytes that it had sent at the last look."""
        self.since = now
        """When it had sent them, or had the last heartbeat."""
        self.asked: Greenlet[..., Any] | None = None
        """What runs the function, or did."""


def _ask_and_post(session: PsSession[Any], heartbeat: PsHeartbeat) -> None:
    """Post what its function, plain or ``async``, makes of the session; ``None``: nothing."""
    message = heartbeat.message(session)
    if asyncio.iscoroutine(message):
        message = run_task(message, context=inside.context_of(session))
    if message is not None:
        session.post(message, raw=heartbeat.raw)
