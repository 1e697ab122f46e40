"""The link: one connection of a client that is made again and again until it is stopped.

It runs in a greenlet of its own: it connects, waits until the session has ended and its
``on_close`` has returned, waits for a delay, and connects again, as its `PsReconnect` says. Each
connection is a new session. The ``on_open`` of a session never comes before the ``on_close`` of the
last one has returned.

All of it belongs to the hub's thread. Of the methods that other greenlets call, only
`Link.wait_connected` switches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import Context, copy_context
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from gevent import getcurrent
from gevent.event import Event

from psofa_gevent.connecting.reconnect import PsReconnect
from psofa_gevent.errors import PsError, cut_traceback
from psofa_gevent.hub.greenlets import ServiceGreenlet, may_wait
from psofa_gevent.hub.logs import log
from psofa_gevent.hub.times import SHORTEST_TIMER
from psofa_gevent.session import inside

if TYPE_CHECKING:
    from psofa_gevent.owner.manager import SessionManager
    from psofa_gevent.session.session import PsSession

__all__ = ["Link"]


class Link:
    """One connection that is made again and again. All methods: in the hub's thread."""

    def __init__(
        self,
        manager: SessionManager,
        policy: PsReconnect,
        error: type[PsError],
        name: str,
        connect: Callable[[float | None], PsSession[Any]],
        ended: Callable[[Link], object],
    ) -> None:
        """Make a link that connects from `start` on.

        Args:
            manager: gets the sessions.
            policy: when to connect again, and when to give up.
            error: the class of the error that `wait_connected` raises.
            name: where it connects to, for texts.
            connect: makes one attempt. Its argument: seconds for each endpoint; ``None``: no limit.
            ended: called when the link will not connect any more.
        """
        self.session: PsSession[Any] | None = None
        """The last session, open or closed; None: the link has not connected yet."""
        self.has_ended = False
        """Whether the link was stopped, or has given up: it will not connect any more."""
        self.manager = manager
        self._policy = policy
        self._error = error
        self._name = name
        self._connect = connect
        self._ended = ended
        self._last_error: PsError | None = None
        self._why_ended = "disconnected meanwhile"
        self._failures = 0
        self._tried_since = monotonic()
        self._opened_at = 0.0
        """When the session opened, until its end has been dealt with; then 0 (monotonic clock)."""
        self._ended_at = 0.0
        """When the session ended, before its ``on_close`` (monotonic clock)."""
        self._context: Context | None = None
        """The context of the session, which itself has dropped it before its end is logged here."""
        self._session_is_over = Event()
        self._session_is_over.set()
        self._changed = Event()
        self._service: ServiceGreenlet | None = ServiceGreenlet(
            self._stay_connected, lambda: not self.has_ended, copy_context()
        )
        """None when the link has ended: the two, and the last session, would keep each other alive.
        """

    def start(self) -> None:
        """Begin to connect. Does not switch."""
        if self._service is not None:
            self._service.ensure()

    def stop(self) -> None:
        """Connect no more; an open session stays open.

        Does not switch. A further call has no effect.
        """
        service = self._service
        if service is not None and not self.has_ended:
            self._end()
            if service.greenlet is not None:
                service.greenlet.kill(block=False)

    def let_go(self) -> None:
        """Connect no more, in a child process: the link is the parent's. Wakes no greenlet."""
        self.has_ended = True
        self._why_ended = f"connected in process {self.manager.process}, which has forked"
        service, self._service = self._service, None
        if service is not None:
            service.let_go()

    def disconnect(self) -> None:
        """Connect no more, and request the close of the session. Does not switch."""
        self.stop()
        if self.session is not None:
            self.session.close()

    def wait_connected(
        self, timeout: float | None, *, is_makers_wait: bool = False
    ) -> PsSession[Any]:
        """The open session, or else the next one. Switches while it waits.

        This is the only place that decides which callers may wait for a session: see
        `_why_not_to_wait`.

        Args:
            timeout: seconds; ``None``: as long as it takes.
            is_makers_wait: whether the caller has just made the link. It may then wait for the
                first session anywhere but in the hub: also in a callback, or in a coroutine.

        Raises:
            PsClientError, PsMultiClientError: no session opened within that time, the link will not
                connect any more, or the caller may not wait.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while self.session is None or not self.session.is_open:
            if self.has_ended:
                raise self.not_connected()
            is_first = is_makers_wait and self.session is None
            if not is_first or getcurrent() is self.manager.thread.hub:
                why_not = self._why_not_to_wait()
                if why_not is not None:
                    raise self.not_connected(why_not)
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                raise self.not_connected(f"not connected within {timeout:g} s")
            self._changed.wait(None if left is None else max(left, SHORTEST_TIMER))
        return self.session

    def _why_not_to_wait(self) -> str | None:
        """Why the caller can't wait: it is in the wrong thread, or the next session waits for it.

        ``None``: it can wait.
        """
        if not self.manager.thread.is_current() or self.manager.thread.is_over():
            return "wait_connected belongs to the client's own thread"
        current = getcurrent()
        if self.session is not None and inside.runs_in(self.session, current):
            return "the session that has closed can't wait for the next one"
        is_mine = self._service is not None and self._service.is_current()
        if is_mine or not may_wait() or self.manager.closing.is_current():
            return (
                "wait_connected can't wait in on_close, in should_retry, in a coroutine or in the "
                "hub"
            )
        return None

    def not_connected(self, why: str | None = None) -> PsError:
        """The error that says `why` there is no session, and the last error or end.

        Args:
            why: ``None``: why the link will not connect any more.
        """
        last = ""
        if self._last_error is not None:
            last = f"; the last error: {self._last_error}"
        elif self.session is not None and not self.session.is_open:
            last = f"; the last session ended: {_how_it_ended(self.session)}"
        return self._error(f"{self._name}: {why or self._why_ended}{last}")

    def _tell(self) -> None:
        """Wake all greenlets in `wait_connected`, which look again."""
        changed, self._changed = self._changed, Event()
        changed.set()

    def _end(self) -> None:
        self.has_ended = True
        self._service = None
        self._ended(self)
        self._tell()

    # In the link's own greenlet. Other code may kill it in any wait: `_stay_connected` then runs
    # again, from its first line.

    def _stay_connected(self) -> None:
        while not self.has_ended:
            self._session_is_over.wait()
            if self._opened_at:
                self._session_ended()
            elif not self._try():
                self._wait_or_give_up()

    def _try(self) -> bool:
        """Make one attempt. False: it failed, and the link has not ended."""
        try:
            session = self._connect(self._policy.attempt_timeout)
        except Exception as exc:
            if not self.has_ended:
                self._failures += 1
                self._attempt_failed(exc)
            return self.has_ended
        self._session_is_over.clear()
        self.manager.when_over(session, self._note_end)
        self._opened_at = monotonic()
        again = " again" if self.session is not None else ""
        if again or self._last_error is not None:  # the log said: not connected
            text = "%s: connected%s: %r"
            inside.log(session, logging.INFO, text, self._name, again, session)
        self._last_error = None
        self.session = session
        self._context = inside.context_of(session)
        if self.has_ended:  # the link was stopped as the peer answered
            session.close()
        self._tell()
        return True

    def _note_end(self, at: float) -> None:
        """Note that the session ended at `at`, and that its ``on_close`` has returned since."""
        self._ended_at = at
        self._session_is_over.set()

    def _attempt_failed(self, exc: Exception) -> None:
        is_first, has_cause = self._last_error is None, isinstance(exc, PsError)
        self._last_error = exc if isinstance(exc, PsError) else self._error(f"failed: {exc!r}")
        what = ("%s: attempt %d failed: %s", self._name, self._failures, exc)
        if not has_cause:
            log(logging.WARNING, *what, exc_info=exc)
        elif is_first:
            self.manager.peer_log.tell(self.manager.owner, "attempt failed", *what)
        else:
            log(logging.DEBUG, *what)
        cut_traceback(self._last_error)  # the error is kept, and its frames would hold this link

    def _session_ended(self) -> None:
        assert self.session is not None
        lasted = self._ended_at - self._opened_at
        self._opened_at = 0.0
        if lasted >= self._policy.steady_after or self.session.bytes_received:
            self._failures = 0
            self._tried_since = monotonic()
        else:
            self._failures += 1
        how = _how_it_ended(self.session)
        what = (self._name, self.session.connection_id, how)
        log(logging.INFO, "%s: session %s ended: %s", *what, context=self._context)
        self._context = None
        self._wait_or_give_up()

    def _wait_or_give_up(self) -> None:
        delay = self._policy.delay(self._failures)
        why = self._why_to_give_up(delay)
        if self.has_ended:  # should_retry has disconnected
            return
        if why is not None:
            self._why_ended = f"gave up{why}"
            log(logging.WARNING, "%s", self.not_connected())
            self._end()
            return
        gevent.sleep(max(delay, SHORTEST_TIMER))

    def _why_to_give_up(self, delay: float) -> str | None:
        policy = self._policy
        if policy.attempts is not None and self._failures >= policy.attempts:
            return f" after {self._failures} attempts"
        if policy.give_up_after is not None:
            tried = monotonic() - self._tried_since
            if tried + delay > policy.give_up_after:
                return f" after {policy.give_up_after:g} s"
        if policy.should_retry is not None:
            try:
                if policy.should_retry(self._failures, self._last_error) is False:
                    return ": should_retry returned False"
            except (Exception, gevent.Timeout) as exc:
                log(logging.ERROR, "%s: should_retry failed", self._name, exc_info=exc)
                return f": should_retry failed: {exc!r}"
        return None


def _how_it_ended(session: PsSession[Any]) -> str:
    cause = session.close_cause
    reason = session.close_reason.name
    return reason if cause is None else f"{reason} ({cause!r})"
