"""The idle timer: one greenlet that finds the sessions that have waited too long for bytes.

The sessions are kept in ``divide`` slices, and one slice is due every 1/``divide`` seconds.
So each session can be looked at once a second and no look is long. Empty slices are skipped: a
single session costs one look a second, and no session none.

A slice is only looked at when a session in it may have reached its deadline. A wait that begins
later has a later deadline, so the result of a look stays valid until the earliest deadline that it
saw, unless the idle time of a session is shortened. With the default of a minute, 15,000 idle
sessions are looked at twice in that time instead of sixty times.

It wakes sessions whose unfinished message is overdue (``frame_timeout``) in the same way.

A look compares two numbers per session. It waits for nothing, no session's callback can hold it
up, and it closes nothing: it wakes the session, which looks once more whether bytes are there.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event

from psofa_gevent.hub.greenlets import ServiceGreenlet
from psofa_gevent.hub.times import NEVER
from psofa_gevent.session import inside

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession

__all__ = ["IdleSlice", "IdleTimer"]


class IdleSlice:
    """Some of the sessions, which are looked at together."""

    __slots__ = ("due", "sessions")

    def __init__(self) -> None:
        self.sessions: set[PsSession[Any]] = set()
        self.due = NEVER
        """The monotonic clock before which none of them reaches its deadline."""

    def look(self) -> None:
        """Wake the sessions that have reached their deadlines."""
        now = monotonic()
        if now < self.due:
            return
        self.due = inside.wake_overdue(self.sessions, now)


class IdleTimer:
    """Finds idle sessions, once a second.

    All methods belong to the hub's thread. Only `stop` switches.
    """

    def __init__(self, divide: int) -> None:
        self._slices = [IdleSlice() for _ in range(divide)]
        self._count = 0
        self._added = 0
        self._not_empty = Event()
        self._service = ServiceGreenlet(self._scan_for_ever, self._has_work)

    def add(self, session: PsSession[Any]) -> None:
        """Look at `session` from now on."""
        own = self._slices[self._added % len(self._slices)]
        own.due = min(own.due, monotonic() + inside.idle_seconds(session))
        inside.set_idle_slice(session, own)
        own.sessions.add(session)
        self._added += 1
        self._count += 1
        if self._count == 1:
            self._not_empty.set()
            self._service.ensure()

    def discard(self, session: PsSession[Any]) -> None:
        """Look at `session` no more."""
        own = inside.set_idle_slice(session, None)
        if own is not None and session in own.sessions:
            own.sessions.discard(session)
            self._count -= 1
            if self._count == 0:
                self._not_empty.clear()

    def stop(self) -> None:
        """End the greenlet. Waits for it, so not from within it."""
        self._service.stop()

    def let_go(self) -> None:
        """Look at nobody any more: the sessions are the parent process's."""
        self._service.let_go()

    def _has_work(self) -> bool:
        return self._count > 0

    def _scan_for_ever(self) -> None:
        period = 1 / len(self._slices)
        current = 0
        while True:
            self._not_empty.wait()
            steps = self._steps_to_sessions(current)
            gevent.sleep(steps * period)
            current = (current + steps) % len(self._slices)
            self._slices[current].look()

    def _steps_to_sessions(self, current: int) -> int:
        """How many slices on from `current` the next one with sessions is: 1 to ``divide``."""
        divide = len(self._slices)
        for steps in range(1, divide):
            if self._slices[(current + steps) % divide].sessions:
                return steps
        return divide
