"""The idle timer: one greenlet that finds the sessions that have waited too long for bytes.

The sessions are kept in ``divide`` slices, and one slice is due every 1/``divide`` seconds. So each
session can be checked once a second, and no scan takes long. Empty slices are skipped: a single
session costs one scan a second, and without sessions there are no scans.

A slice is scanned only when a session in it may have reached its deadline. A wait that begins later
has a later deadline, so the result of a scan stays valid until the earliest deadline that it saw,
unless a session's idle time is shortened. With the default idle time of a minute, 15,000 idle
sessions are scanned twice a minute instead of sixty times.

The timer also wakes sessions whose unfinished message is overdue (``frame_timeout``).

A scan compares two numbers per session. It does not switch, no callback can delay it, and it closes
no session: it wakes the session, which checks once more whether bytes are there.
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
    """The sessions that are scanned together."""

    __slots__ = ("due", "sessions")

    def __init__(self) -> None:
        self.sessions: set[PsSession[Any]] = set()
        self.due = NEVER
        """Monotonic time before which no session of the slice reaches its deadline."""

    def look(self) -> None:
        """Wake the sessions that have reached their deadlines. Does not switch."""
        now = monotonic()
        if now < self.due:
            return
        self.due = inside.wake_overdue(self.sessions, now)


class IdleTimer:
    """Finds idle sessions: checks each slice once a second.

    All methods belong to the hub's thread. Only `stop` switches.
    """

    def __init__(self, divide: int) -> None:
        self._slices = [IdleSlice() for _ in range(divide)]
        self._count = 0
        self._added = 0
        self._not_empty = Event()
        self._service = ServiceGreenlet(self._scan_for_ever, self._has_work)

    def add(self, session: PsSession[Any]) -> None:
        """Check `session` from now on."""
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
        """Stop checking `session`."""
        own = inside.set_idle_slice(session, None)
        if own is not None and session in own.sessions:
            own.sessions.discard(session)
            self._count -= 1
            if self._count == 0:
                self._not_empty.clear()

    def stop(self) -> None:
        """End the scanning greenlet, and wait for it: not in that greenlet."""
        self._service.stop()

    def let_go(self) -> None:
        """Check no more sessions, in a child process: they belong to the parent."""
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
        """The number of slices, 1 to ``divide``, from `current` to the next one with sessions."""
        divide = len(self._slices)
        for steps in range(1, divide):
            if self._slices[(current + steps) % divide].sessions:
                return steps
        return divide
