"""A shutdown: all steps from the first ``shutdown`` (``disconnect``, …) to the last callback.

It runs in a separate greenlet, so any greenlet, signal handler or OS thread may ask for it. Its
phases:

1. Drain: for ``drain`` seconds, sessions go on and may end by themselves.
2. Close: every session is asked to close. Running callbacks finish, and every ``on_close`` is
   called. This may take ``timeout`` seconds.
3. Kill: callbacks and session tasks that still run are killed repeatedly. This may again take
   ``timeout`` seconds, at least one second, of which each pending ``on_close`` gets a share.
4. Abandon: callbacks that have not ended by then are counted, and logged as errors.

Then ``on_stop`` is called, with what is left of the time of phase 2. After that it runs for a third
of the time of phase 3 at most, is killed repeatedly, and is abandoned 0.3 s later. At the end the
timers and the close greenlet are released.

A second call of ``shutdown`` waits for the first, and may shorten either time. Each phase ends as
soon as nothing is left to wait for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import NamedTuple

from gevent import GreenletExit, getcurrent

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.hub.greenlets import LibraryGreenlet, may_wait_for_callbacks
from psofa_gevent.hub.logs import flush, log
from psofa_gevent.hub.thread import CallerEvent
from psofa_gevent.hub.times import NEVER, SHORTEST_TIMER
from psofa_gevent.owner.manager import SessionManager

__all__ = ["Shutdown"]

LEAST_SECOND_BOUND = 1.0
"""Minimum grace, in seconds, for killed callbacks and the ``on_close`` calls after them."""
TIME_BETWEEN_KILLS = 0.05
"""Seconds between two kills of a callback that swallows them."""
LEAST_FIRST_BOUND = 0.01
"""Seconds that sessions have even with a timeout of 0: enough for those that wait for bytes."""


class _Asked(NamedTuple):
    """One call that asked for the shutdown: its monotonic time, and the seconds that it allows."""

    at: float
    timeout: float
    drain: float


class Shutdown:
    """The shutdown of one manager. It is made, and its methods are called, in the hub's thread.

    Only `wait` switches, and the greenlet that `begin` starts. The manager holds its shutdown, but
    the shutdown does not hold the manager: so a stopped manager is freed with its owner.
    """

    def __init__(
        self,
        manager: SessionManager,
        reason: PsCloseReason,
        close_listeners_or_attempts: Callable[[], None],
        finished: Callable[[], None],
    ) -> None:
        """Prepare the shutdown.

        Args:
            manager: the manager to shut down.
            reason: the close reason of its sessions: SHUTDOWN, or SELF_CLOSE for clients.
            close_listeners_or_attempts: closes the listeners, or ends the attempts to connect.
                Called in the shutdown's greenlet, when no starter is left.
            finished: called at the end, before waiting callers go on.
        """
        self._changed = manager.changed
        self._stopped = manager.stopped
        self._reason = reason
        self._close_listeners_or_attempts = close_listeners_or_attempts
        self._finished = finished
        self._asked_for: list[_Asked] = []
        self._closing_since: float | None = None
        self._has_put_on_stop = False
        self._has_finished = False
        self._waiting_threads: list[CallerEvent] = []
        self._greenlets: list[LibraryGreenlet] = []

    def shorten(self, timeout: float | None, drain: float) -> None:
        """Allow `drain` and then `timeout` seconds from now, unless less is allowed already."""
        limit = NEVER if timeout is None else timeout
        self._asked_for.append(_Asked(monotonic(), limit, drain))
        self._changed.set()

    def begin(self, manager: SessionManager) -> None:
        """Start the greenlet that shuts `manager` down. Call `shorten` before. Does not switch.

        May be called again, even by a signal handler in the middle of a call. `Greenlet.start` is
        not safe for that: on libuv a part of it is Python code, and a second start in the middle of
        it would switch to the greenlet twice.
        """
        if not self._greenlets:
            self._greenlets.append(self._new_greenlet(manager))
        manager.thread.loop.run_callback(self._start)

    def _start(self) -> None:
        greenlet = self._greenlets[0]
        if not greenlet.started and not greenlet.dead:
            greenlet.switch()

    def add_thread(self, event: CallerEvent) -> None:
        """Have `event` set when the shutdown is over, for an OS thread that waits."""
        if self._stopped.is_set():
            event.set()
        else:
            self._waiting_threads.append(event)

    def wait(self, manager: SessionManager) -> None:
        """Wait until the shutdown is over, if the caller may; otherwise return at once."""
        if may_wait_for_callbacks() and getcurrent() not in manager.starters:
            self._stopped.wait()

    def _new_greenlet(self, manager: SessionManager) -> LibraryGreenlet:
        greenlet = LibraryGreenlet(partial(self._run, manager))
        greenlet.rawlink(partial(self._ended, manager))
        return greenlet

    def _ended(self, manager: SessionManager, greenlet: LibraryGreenlet) -> None:
        # Killed by foreign code: begin again, as each phase only handles what is still left.
        outcome: object = greenlet.value
        if isinstance(outcome, GreenletExit) and not self._stopped.is_set():
            self._greenlets[0] = self._new_greenlet(manager)
            manager.thread.loop.run_callback(self._start)

    @property
    def _timeout(self) -> float:
        return min(asked.timeout for asked in self._asked_for)

    def _start_deadline(self) -> float:
        return min(asked.at + asked.timeout for asked in self._asked_for)

    def _drain_deadline(self) -> float:
        return min(asked.at + asked.drain for asked in self._asked_for)

    def _deadline(self) -> float:
        since = self._closing_since
        assert since is not None
        first = min(max(since, asked.at) + asked.timeout for asked in self._asked_for)
        return max(first, since + LEAST_FIRST_BOUND)

    def _second_deadline(self, since: float) -> float:
        return min(
            max(since, asked.at) + max(asked.timeout, LEAST_SECOND_BOUND)
            for asked in self._asked_for
        )

    def _run(self, manager: SessionManager) -> None:
        try:
            if not self._has_finished:
                self._shut_down(manager)
        except GreenletExit:
            raise  # `_ended` starts another greenlet
        except BaseException as exc:  # no code of the library raises: let waiting callers go on
            log(logging.ERROR, "%r: failed to stop", manager.owner, exc_info=exc)
        self._end(manager)

    def _shut_down(self, manager: SessionManager) -> None:
        self._wait(lambda: not manager.starters, self._start_deadline)
        self._close_listeners_or_attempts()
        if self._closing_since is None:
            self._wait(lambda: not manager.sessions, self._drain_deadline)
            self._begin_closing(manager)
        if not self._wait(manager.is_quiet, self._deadline):
            self._force(manager)
        self._call_on_stop(manager)

    def _begin_closing(self, manager: SessionManager) -> None:
        self._closing_since = monotonic()
        if self._reason is PsCloseReason.SHUTDOWN:
            manager.drop_unstarted()
        manager.request_closes(self._reason)

    def _force(self, manager: SessionManager) -> None:
        """Kill what still runs, until all has ended; at the second deadline abandon the rest."""
        log(
            logging.WARNING,
            "%r: after %g s %d sessions and %d on_close calls have not ended: killing them",
            manager.owner,
            self._timeout,
            len(manager.sessions),
            manager.closing.pending,
        )
        since = monotonic()
        next_kill = since
        while not manager.is_quiet() and monotonic() < self._second_deadline(since):
            if monotonic() >= next_kill:
                manager.kill_sessions(again=next_kill > since)
                next_kill = monotonic() + TIME_BETWEEN_KILLS
            self._hurry(manager, since)
        abandoned = manager.abandon_sessions() + manager.closing.abandon()
        if abandoned:
            text = "%r: %d callbacks did not end: abandoned"
            log(logging.ERROR, text, manager.owner, abandoned)

    def _call_on_stop(self, manager: SessionManager) -> None:
        if not self._has_put_on_stop and manager.has_started:
            self._has_put_on_stop = True
            manager.closing.put_on_stop(manager.owner)
        if not self._wait(manager.is_quiet, self._deadline):
            since = monotonic()
            while not manager.is_quiet():
                self._hurry(manager, since)

    def _hurry(self, manager: SessionManager, since: float) -> None:
        pace = manager.closing.hurry(self._second_deadline(since))
        pace = min(max(pace, SHORTEST_TIMER), TIME_BETWEEN_KILLS)
        until = monotonic() + pace
        self._wait(manager.is_quiet, lambda: until)

    def _end(self, manager: SessionManager) -> None:
        if not self._has_finished:
            manager.request_closes(self._reason)  # no session is left, unless something failed
            manager.release()
            self._finished()
            self._has_finished = True  # the next start need not wait for the rest
        flush()
        # The threads first: a greenlet that `stopped` wakes may join them natively at once.
        for event in self._waiting_threads:
            event.set()
        self._stopped.set()

    def _wait(self, condition: Callable[[], bool], until: Callable[[], float]) -> bool:
        """Wait until `condition` holds; false at the monotonic time `until()`, which may change."""
        while True:
            self._changed.clear()  # before the check, so that no change is missed
            if condition():
                return True
            left = until() - monotonic()
            if left <= 0:
                return False
            self._changed.wait(None if left == NEVER else max(left, SHORTEST_TIMER))
