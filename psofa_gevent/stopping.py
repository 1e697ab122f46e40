"""Stopping: the way from the first call of ``shutdown`` (``disconnect``, …) to the last callback.

Its phases, in a greenlet of its own, so that it may be asked for in any greenlet, in a signal
handler and in any OS thread:

1. Drain: sessions go on and end by themselves, for ``drain`` seconds.
2. Close: every session is asked to close. Running callbacks finish, every ``on_close`` is
   delivered. This may take ``timeout`` seconds.
3. Kill: what still runs is killed, again and again, and each pending ``on_close`` gets its share of
   as long again, at least a second.
4. What does not end even then is left behind, counted, and logged as an error.

Then ``on_stop``, and the release of timer and close greenlet. A second call waits for the first and
may shorten either time. Each phase ends as soon as nothing is left to wait for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from gevent import getcurrent

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.hub_thread import CallerEvent
from psofa_gevent.manager import SessionManager
from psofa_gevent.worker import LibraryGreenlet, may_wait_for_callbacks

__all__ = ["Stop"]

logger = logging.getLogger("psofa_gevent")

NEVER = float("inf")
LEAST_SECOND_BOUND = 1.0
"""Seconds that killed callbacks and their ``on_close`` have at least."""
SHORTEST_WAIT = 0.001
"""Seconds; libuv knows no shorter timer, and warns of one."""
KILL_PERIOD = 0.05
"""Seconds between two kills of a callback that swallows them."""
FIRST_LOOK = 0.01
"""Seconds that sessions have even with a timeout of 0: those that wait for bytes end by then."""


class Stop:
    """One stop of one manager. Made, and its methods called, in the hub's thread."""

    def __init__(
        self, manager: SessionManager, reason: PsCloseReason, finished: Callable[[], None]
    ) -> None:
        """Begin to stop.

        Args:
            manager: what is stopped. It opens no session from now on.
            reason: SHUTDOWN, or SELF_CLOSE for clients.
            finished: called at the end, before those who wait go on.
        """
        self._manager = manager
        self._reason = reason
        self._finished = finished
        self._drain_until = NEVER
        self._timeout = NEVER
        self._deadline = NEVER
        self._begun_at = monotonic()
        self._closing = False
        self._stop_called = False
        self._waiting_threads: list[CallerEvent] = []

    def begin(self) -> None:
        """Start the greenlet that stops everything. Called once, after `shorten`."""
        greenlet = LibraryGreenlet(self._run)
        greenlet.rawlink(self._ended)
        greenlet.start()

    def shorten(self, timeout: float | None, drain: float) -> None:
        """Allow `drain` and then `timeout` seconds from now, unless less is allowed already."""
        now = monotonic()
        self._drain_until = min(self._drain_until, now + drain)
        self._timeout = min(self._timeout, NEVER if timeout is None else timeout)
        if self._closing and timeout is not None:
            self._deadline = min(self._deadline, now + timeout)
        self._manager.changed.set()

    def add_thread(self, event: CallerEvent) -> None:
        """Set `event` when all is over, for an OS thread that waits."""
        if self._manager.stopped.is_set():
            event.set()
        else:
            self._waiting_threads.append(event)

    def wait(self) -> None:
        """Wait until all is over, where the caller may wait for that; else return at once."""
        if may_wait_for_callbacks() and getcurrent() is not self._manager.starter:
            self._manager.stopped.wait()

    def _ended(self, _greenlet: object) -> None:
        # Killed by a stranger: each phase looks at what is there, so it may be entered again.
        if not self._manager.stopped.is_set():
            self.begin()

    def _run(self) -> None:
        manager = self._manager
        self._wait(lambda: manager.starter is None, lambda: self._begun_at + self._timeout)
        if not self._closing:
            self._wait(lambda: not manager.sessions, lambda: self._drain_until)
            self._begin_closing()
        if not self._wait(self._is_quiet, lambda: self._deadline):
            self._force()
        self._call_on_stop()
        manager.release()
        self._finish()

    def _begin_closing(self) -> None:
        self._closing = True
        self._deadline = monotonic() + max(self._timeout, FIRST_LOOK)
        if self._reason is PsCloseReason.SHUTDOWN:
            self._manager.drop_unstarted()
        self._manager.request_closes(self._reason)

    def _is_quiet(self) -> bool:
        return not self._manager.sessions and not self._manager.closing.pending

    def _force(self) -> None:
        """Kill what runs until it has ended or the second bound is over."""
        manager = self._manager
        logger.warning(
            "%r: after %g s %d sessions and %d on_close calls have not ended: killing them",
            manager.owner,
            self._timeout,
            len(manager.sessions),
            manager.closing.pending,
        )
        bound = monotonic() + max(self._timeout, LEAST_SECOND_BOUND)
        next_kill = 0.0
        while not self._is_quiet() and monotonic() < bound:
            if monotonic() >= next_kill:
                manager.kill_sessions()
                next_kill = monotonic() + KILL_PERIOD
            self._hurry(bound)
        self._abandon()

    def _abandon(self) -> None:
        manager = self._manager
        abandoned = manager.abandon_sessions() + manager.closing.abandon()
        if abandoned:
            logger.error("%r: %d callbacks did not end: left behind", manager.owner, abandoned)

    def _call_on_stop(self) -> None:
        manager = self._manager
        if not self._stop_called and manager.has_started:
            self._stop_called = True
            manager.closing.put_stop(manager.owner)
        if not self._wait(self._is_quiet, lambda: self._deadline):
            bound = monotonic() + max(self._timeout, LEAST_SECOND_BOUND)
            while not self._is_quiet():
                self._hurry(bound)

    def _hurry(self, bound: float) -> None:
        pace = min(max(self._manager.closing.hurry(bound), SHORTEST_WAIT), KILL_PERIOD)
        self._wait(self._is_quiet, _at(monotonic() + pace))

    def _finish(self) -> None:
        if self._manager.stopped.is_set():
            return
        self._finished()
        # The threads first: one that is woken by `stopped` may join them natively at once.
        for event in self._waiting_threads:
            event.set()
        self._manager.stopped.set()

    def _wait(self, condition: Callable[[], bool], until: Callable[[], float]) -> bool:
        """Wait until `condition` holds, or the time `until`, which may change, has come."""
        changed = self._manager.changed
        while not condition():
            left = until() - monotonic()
            if left <= 0:
                return False
            changed.clear()
            changed.wait(None if left == NEVER else max(left, SHORTEST_WAIT))
        return True


def _at(time: float) -> Callable[[], float]:
    return lambda: time
