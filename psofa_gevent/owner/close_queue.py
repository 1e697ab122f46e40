"""The close queue: one greenlet that calls ``on_close`` for the sessions that have ended, in order.

The manager queues a session when it has ended and its socket is released: this part closes no
socket. So the close greenlet never waits for a session, and a slow ``on_close`` delays only other
``on_close`` calls. ``on_stop`` also runs here, after the last ``on_close``.

Everything belongs to the hub's thread. Only the close greenlet itself switches, and, in the
shutdown's greenlet, `CloseQueue.abandon` and `CloseQueue.stop`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import Context
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import gevent
from gevent import GreenletExit, getcurrent
from gevent.event import Event
from gevent.queue import Queue

from psofa_gevent.errors import cut_traceback
from psofa_gevent.hub.greenlets import LibraryGreenlet, ServiceGreenlet
from psofa_gevent.hub.logs import log
from psofa_gevent.hub.thread import HubThread
from psofa_gevent.hub.times import SHORTEST_TIMER, TURN
from psofa_gevent.owner.callbacks import Callbacks
from psofa_gevent.session import inside

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession
    from psofa_gevent.typing import Owner

__all__ = ["CloseQueue"]

DYING_TIME = 0.05
"""Minimum grace, in seconds, for a killed callback: an async one needs a round of its loop."""
LAST_DYING_TIME = 0.5
"""Grace, in seconds, for the calls that are killed together at the end."""
LATE_CALL_TIME = 0.01
"""Grace, in seconds, for calls that are only started after the deadline."""
KILLS_BEFORE_GIVING_UP = 5
"""Kills of a callback that swallows them, before it is abandoned."""


class _Call(NamedTuple):
    """One call that is due."""

    name: str
    """The name of the call in the log."""
    subject: object
    """The session or owner of the call, for the log."""
    function: Callable[[], object]
    session: PsSession[Any] | None = None
    """The session in whose context the call runs. It drops its context after the call. ``None``:
    the call runs in the context of ``on_stop``."""


class CloseQueue:
    """Delivers ``on_close`` and ``on_stop``, one at a time."""

    def __init__(
        self,
        callbacks: Callbacks,
        context: Context,
        thread: HubThread,
        settled: Callable[[], None],
    ) -> None:
        """Make the queue.

        Args:
            callbacks: the owner's callbacks.
            context: the context of ``on_stop``.
            thread: the hub's thread, in which the callbacks run.
            settled: called whenever no call is left. In the close greenlet, but when a call is
                abandoned (`hurry`, `abandon`) in the shutdown's greenlet.
        """
        self._callbacks = callbacks
        self._context = context
        self._thread = thread
        self._settled = settled
        self._queue: Queue[_Call] = Queue()
        self._running: _Call | None = None
        self._since = 0.0
        self._kills = 0
        self._killed_since = 0.0
        self._service = ServiceGreenlet(self._deliver_for_ever, self._has_work)
        self.pending = 0
        """The number of queued calls that have not ended."""
        self._given_up = 0

    def put(self, session: PsSession[Any]) -> None:
        """Have ``on_close`` called for a session that has ended."""
        on_close = partial(self._callbacks.on_close, session, session.close_reason)
        self._put(_Call("on_close", session, on_close, session))

    def put_on_stop(self, owner: Owner) -> None:
        """Have ``on_stop`` called, after all calls queued before."""
        self._put(_Call("on_stop", owner, partial(self._callbacks.on_stop, owner)))

    def put_call(self, function: Callable[[], object]) -> None:
        """Have `function` called, which must not block, after all calls queued before."""
        self._put(_Call("the call", function, function))

    def is_current(self) -> bool:
        """Whether the caller is the close greenlet."""
        return self._service.is_current()

    def hurry(self, deadline: float) -> float:
        """End the running call if it has had its share of the time until `deadline`.

        The end of a shutdown calls this repeatedly, so that every pending call begins. A call runs
        undisturbed for half of its share, and is killed repeatedly in the other half. If it does
        not end, it is abandoned, and another greenlet goes on with the queue. Does not switch.

        Returns:
            Seconds after which to call this again.
        """
        now = monotonic()
        half_share = max(deadline - now, 0.0) / max(2 * self.pending, 1)
        if self._running is not None and now - self._since >= half_share:
            if self._kills == 0:
                self._killed_since = now
            if self._kills >= KILLS_BEFORE_GIVING_UP and now - self._killed_since >= DYING_TIME:
                self._give_up()
            elif self._service.greenlet is not None:
                self._kills += 1
                self._service.greenlet.kill(block=False)
        return half_share / KILLS_BEFORE_GIVING_UP

    def abandon(self) -> int:
        """Begin the calls that have not begun, then kill all and abandon those that do not end.

        For when no time is left. Each call runs in a separate greenlet up to its first wait, and is
        then killed. Call this in a greenlet that may wait; it switches.

        Returns:
            The number of calls that did not end.
        """
        begun: list[LibraryGreenlet] = []
        while not self._queue.empty():
            begun.append(LibraryGreenlet(partial(self._run, self._queue.get_nowait())))
            self._one_less()
        if begun or self._running is not None:
            self._begin_all(begun)
            gevent.sleep(LATE_CALL_TIME)
            self._kill_all(begun)
            gevent.sleep(DYING_TIME)
            gevent.joinall(begun, timeout=LAST_DYING_TIME)
        if self._running is not None:
            self._give_up()
        given_up = self._given_up + sum(not greenlet.dead for greenlet in begun)
        self._given_up = 0
        return given_up

    def _begin_all(self, greenlets: list[LibraryGreenlet]) -> None:
        """Run each greenlet up to its first wait, however long that takes; kills come after it."""

        def begin() -> None:
            try:
                for greenlet in greenlets:
                    greenlet.switch()
            finally:
                all_begun.set()

        all_begun = Event()
        self._thread.loop.run_callback(begin)  # only the hub gets control back from each
        all_begun.wait()

    def _kill_all(self, begun: list[LibraryGreenlet]) -> None:
        greenlets = list(begun)
        if self._running is not None and self._service.greenlet is not None:
            greenlets.append(self._service.greenlet)
        for greenlet in greenlets:
            if not greenlet.dead:
                greenlet.kill(block=False)

    def stop(self) -> None:
        """End the close greenlet and wait for it: not in that greenlet. No call may be pending."""
        self._service.stop()

    def let_go(self) -> None:
        """Make no more calls, in a child process: the parent makes them."""
        self._service.let_go()
        self._running = None
        self.pending = 0

    def _put(self, call: _Call) -> None:
        self.pending += 1
        self._queue.put(call)
        self._service.ensure()

    def _give_up(self) -> None:
        """Abandon the running call, and let another greenlet go on with the queue."""
        call, self._running = self._running, None
        if call is not None:
            log(logging.ERROR, "%r: callback did not end: abandoned", call.subject)
        self._given_up += 1
        self._service.replace()
        self._one_less()

    def _has_work(self) -> bool:
        return self.pending > 0

    def _deliver_for_ever(self) -> None:
        turn_since = monotonic()
        while self._service.is_current():
            self._deliver(self._queue.get())
            if self._since - turn_since >= TURN and not self._queue.empty():
                # Thousands of sessions may have ended at once. (A sleep of zero would end before
                # the hub has looked at any socket.)
                gevent.sleep(SHORTEST_TIMER)
                turn_since = monotonic()

    def _deliver(self, call: _Call) -> None:
        self._running, self._since, self._kills = call, monotonic(), 0
        try:
            self._run(call)
        finally:
            if self._service.is_current():
                self._running = None
                self._one_less()

    def _run(self, call: _Call) -> None:
        session = call.session
        # Set as for a session's own greenlet: only one greenlet at a time could be in Context.run.
        current: Any = getcurrent()
        before = current.gr_context
        current.gr_context = self._context if session is None else inside.context_of(session)
        try:
            call.function()
        except GreenletExit as exc:
            log(logging.WARNING, "%r: %s was ended", call.subject, call.name, exc_info=exc)
        except BaseException as exc:
            if isinstance(exc, (KeyboardInterrupt, SystemExit)):
                self._thread.raise_in_main(exc)
            log(logging.ERROR, "%r: %s failed", call.subject, call.name, exc_info=exc)
        finally:
            current.gr_context = before
            if session is not None:
                inside.forget_context(session)
                if session.close_cause is not None:
                    cut_traceback(session.close_cause)

    def _one_less(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            self._settled()
