"""A shutdown: the way from the first call of ``shutdown`` (``disconnect``, …) to the last callback.

Its phases, in a greenlet of its own, so that it may be asked for in any greenlet, in a signal
handler and in any OS thread:

1. Drain: sessions go on and end by themselves, for ``drain`` seconds.
2. Close: every session is asked to close. Running callbacks finish, every ``on_close`` is
   delivered. This may take ``timeout`` seconds.
3. Kill: what still runs is killed, again and again, and each pending ``on_close`` gets its share of
   as long again, at least a second.
4. Abandon: what does not end even then is counted, and logged as an error.

Then ``on_stop``, and the release of timer and close greenlet. A second call waits for the first and
may shorten either time. Each phase ends as soon as nothing is left to wait for.
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
"""Seconds that killed callbacks and their ``on_close`` have at least."""
TIME_BETWEEN_KILLS = 0.05
"""Seconds between two kills of a callback that swallows them."""
LEAST_FIRST_BOUND = 0.01
"""Seconds that sessions have even with a timeout of 0: those that wait for bytes end by then."""


class _Asked(NamedTuple):
    """One call that asked for the shutdown: when, and what it allows."""

    at: float
    timeout: float
    drain: float


class Shutdown:
    """The shutdown of one manager. Made, and its methods called, in the hub's thread.

    Only `wait` switches, and the greenlet that `begin` starts. The manager keeps it, and it
    does not keep the manager: what has stopped goes when its owner is dropped.
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
            manager: what is to be shut down.
            reason: SHUTDOWN, or SELF_CLOSE for clients.
            close_listeners_or_attempts: closes what makes connections. Called in the greenlet of
                the shutdown, when no other one is in ``start`` or ``connect`` any more.
            finished: called at the end, before those who wait go on.
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
        """Start the greenlet that shuts `manager` down, after a `shorten`. May be called again.

        By a signal handler that hits this very call, too. `Greenlet.start` would not do: on libuv
        a part of it is Python code, and a start in its middle switches to the greenlet twice.
        """
        if not self._greenlets:
            self._greenlets.append(self._new_greenlet(manager))
        manager.thread.loop.run_callback(self._start)

    def _start(self) -> None:
        greenlet = self._greenlets[0]
        if not greenlet.started and not greenlet.dead:
            greenlet.switch()

    def add_thread(self, event: CallerEvent) -> None:
        """Set `event` when all is over, for an OS thread that waits."""
        if self._stopped.is_set():
            event.set()
        else:
            self._waiting_threads.append(event)

    def wait(self, manager: SessionManager) -> None:
        """Wait until all is over, where the caller may wait for that; else return at once."""
        if may_wait_for_callbacks() and getcurrent() not in manager.starters:
            self._stopped.wait()

    def _new_greenlet(self, manager: SessionManager) -> LibraryGreenlet:
        greenlet = LibraryGreenlet(partial(self._run, manager))
        greenlet.rawlink(partial(self._ended, manager))
        return greenlet

    def _ended(self, manager: SessionManager, greenlet: LibraryGreenlet) -> None:
        # Killed by a stranger: each phase looks at what is there, so it may be entered again.
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
        except BaseException as exc:  # nothing of ours raises here: those who wait go on
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
        """Kill what runs until it has ended or the second bound is over."""
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
            manager.request_closes(self._reason)  # none is left, unless something failed
            manager.release()
            self._finished()
            self._has_finished = True  # what follows is no concern of the next start's
        flush()
        # The threads first: one that is woken by `stopped` may join them natively at once.
        for event in self._waiting_threads:
            event.set()
        self._stopped.set()

    def _wait(self, condition: Callable[[], bool], until: Callable[[], float]) -> bool:
        """Wait until `condition` holds, or the time `until`, which may change, has come."""
        while True:
            self._changed.clear()  # before the look, so that no news are lost
            if condition():
                return True
            left = until() - monotonic()
            if left <= 0:
                return False
            self._changed.wait(None if left == NEVER else max(left, SHORTEST_TIMER))
