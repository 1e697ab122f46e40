"""Heartbeats: messages that a session sends when it has sent nothing for a while.

They keep NAT routers and firewalls from dropping a connection from their tables, and show the
peer's idle check that this end is alive. One greenlet scans all sessions of an owner, ten times per
heartbeat period, at intervals of 5 ms to 1 s: so a heartbeat may be late by one interval. A scan
compares two numbers per session. While it sends the heartbeats that are due, it lets other sessions
have their turns. A fixed message is posted (`PsSession.post`). A function runs in a session task
(`PsSession.spawn`), so a slow function does not delay heartbeats of other sessions. It is not
called again before it has returned.

No heartbeat is sent before ``on_open``, or while a send waits for the peer: a peer that takes
nothing would not take the heartbeat either.
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
"""Scans per heartbeat period."""
SHORTEST_PERIOD = 0.005
"""Least seconds between two scans."""
LONGEST_PERIOD = 1.0
"""Most seconds between two scans."""


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
        """Send heartbeats for `session` from now on."""
        self._quiet[session] = _Quiet(monotonic())
        if len(self._quiet) == 1:
            self._not_empty.set()
            self._service.ensure()

    def discard(self, session: PsSession[Any]) -> None:
        """Send no more heartbeats for `session`."""
        self._quiet.pop(session, None)
        if not self._quiet:
            self._not_empty.clear()

    def stop(self) -> None:
        """End the scanning greenlet, and wait for it: not in that greenlet."""
        self._service.stop()

    def let_go(self) -> None:
        """Send no more heartbeats, in a child process: the sessions belong to the parent."""
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
                # Thousands of sessions that began together take 0.1 s. (A sleep of zero would end
                # before the hub has looked at any socket.)
                gevent.sleep(SHORTEST_TIMER)
                turn_since = monotonic()

    def _beat(self, session: PsSession[Any], quiet: _Quiet) -> None:
        heartbeat = self._heartbeat
        if callable(heartbeat.message):
            if quiet.asked is None or quiet.asked.dead:
                with contextlib.suppress(PsClosedError):  # another thread may close it just now
                    quiet.asked = session.spawn(_ask_and_post, session, heartbeat)
            return
        try:
            session.post(heartbeat.message, raw=heartbeat.raw)
        except Exception as exc:  # the session now has a framing that can't carry the message
            inside.fail(session, exc)


class _Quiet:
    """The heartbeat state of one session."""

    __slots__ = ("asked", "sent", "since")

    def __init__(self, now: float) -> None:
        self.sent = 0
        """Bytes that the session had sent at the last scan."""
        self.since = now
        """When a scan last saw that the session had sent bytes, or had a heartbeat due."""
        self.asked: Greenlet[..., Any] | None = None
        """The session task that runs the heartbeat's function, or the last one that did."""


def _ask_and_post(session: PsSession[Any], heartbeat: PsHeartbeat) -> None:
    """Post the message that the heartbeat's function, sync or async, returns; None: no message."""
    message = heartbeat.message(session)
    if asyncio.iscoroutine(message):
        message = run_task(message, context=inside.context_of(session))
    if message is not None:
        session.post(message, raw=heartbeat.raw)
