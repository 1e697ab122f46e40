"""Staying connected: a client that connects again, after longer and longer waits, until it is told.

`PsReconnect` says when, and when no more. A `Link` does it for one connection, in a greenlet of its
own: it connects, waits until the session has ended and its ``on_close`` has returned, waits some
time, and connects again. Each session is a new one, and the next ``on_open`` never comes before the
last ``on_close`` has returned. All of it belongs to the hub's thread.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from gevent import getcurrent
from gevent.event import Event

from psofa_gevent.checks import check_instance, check_int, check_number, check_seconds
from psofa_gevent.errors import PsError, cut_traceback
from psofa_gevent.hub.greenlets import ServiceGreenlet, may_wait
from psofa_gevent.hub.logs import log
from psofa_gevent.hub.times import SHORTEST_TIMER

if TYPE_CHECKING:
    from psofa_gevent.owner.manager import SessionManager
    from psofa_gevent.session.session import PsSession

__all__ = ["Link", "PsReconnect", "check_reconnect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PsReconnect:
    """When a client connects again: exponential backoff with jitter, and when it gives up.

    What counts as a failure is an attempt that failed at all endpoints, and a session that received
    nothing and did not last for `steady_after`. Any other session was a success, which ends the row
    of failures: there are servers that answer and close.

    Attributes:
        first_delay: seconds before the first attempt after a session, or after the first failure.
        factor: how much longer each wait is than the one before.
        longest_delay: seconds; no wait is longer.
        jitter: which part of each wait is left to chance, from 0 to 1, so that a thousand clients
            whose server restarts do not all come at once.
        attempts: failures in a row after which it gives up; ``None``: any number.
        give_up_after: seconds without a success, after which it gives up; ``None``: never.
        attempt_timeout: seconds for each attempt at each endpoint; ``None``: as long as the system
            takes.
        steady_after: seconds after which a session is a success even if it received nothing.
        should_retry: asked after each failure and after each session, with the number of failures
            in a row and the last error (``None`` after a session): ``False`` gives up. Not asked
            when `attempts` or `give_up_after` ends it already, so not after the last failure. It
            runs in a greenlet of the client, and may wait.
    """

    first_delay: float = 0.5
    factor: float = 2.0
    longest_delay: float = 30.0
    jitter: float = 0.5
    attempts: int | None = None
    give_up_after: float | None = None
    attempt_timeout: float | None = 10.0
    steady_after: float = 10.0
    should_retry: Callable[[int, PsError | None], bool | None] | None = None

    def __post_init__(self) -> None:
        check_seconds("first_delay", self.first_delay, optional=False, more_than_zero=True)
        check_number("factor", self.factor, 1, 1_000)
        check_seconds("longest_delay", self.longest_delay, optional=False)
        check_number("jitter", self.jitter, 0, 1)
        if self.attempts is not None:
            check_int("attempts", self.attempts, 1, 2**53)
        check_seconds("give_up_after", self.give_up_after, more_than_zero=True)
        check_seconds("attempt_timeout", self.attempt_timeout, more_than_zero=True)
        check_seconds("steady_after", self.steady_after, optional=False)
        if self.should_retry is not None and not callable(self.should_retry):
            raise TypeError(f"should_retry must be a function or None, not {self.should_retry!r}")
        if inspect.iscoroutinefunction(self.should_retry):
            raise TypeError(f"should_retry must be a plain function, not {self.should_retry!r}")

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row; each call has its own `jitter`."""
        try:
            longest = self.first_delay * float(self.factor) ** max(failures - 1, 0)
        except OverflowError:
            longest = self.longest_delay
        return min(longest, self.longest_delay) * (1 - self.jitter * random.random())


def check_reconnect(value: object) -> PsReconnect | None:
    """The policy that a client was given: True is the default one; ``None`` is none.

    Raises:
        TypeError: it is something else.
    """
    if value is None or value is False:
        return None
    return PsReconnect() if value is True else check_instance("reconnect", value, PsReconnect)


class Link:
    """One connection that is made again and again. In the hub's thread."""

    def __init__(
        self,
        manager: SessionManager,
        policy: PsReconnect,
        error: type[PsError],
        name: str,
        connect: Callable[[float | None], PsSession[Any]],
        ended: Callable[[Link], object],
    ) -> None:
        """Make it; `start` begins.

        Args:
            manager: what the sessions belong to.
            policy: when to connect again.
            error: what `wait` raises.
            name: where it connects to, for texts.
            connect: makes one attempt, within so many seconds for each endpoint.
            ended: called when nothing comes any more.
        """
        self.session: PsSession[Any] | None = None
        """The last one; open, or not any more; None: there was none."""
        self.has_ended = False
        """It was stopped, or has given up: nothing comes any more."""
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
        """When the session began whose end was not looked at yet; 0: there is none."""
        self._ended_at = 0.0
        self._context: Context | None = None
        """That of the session, which has let go of it by the time at which its end is told."""
        self._session_is_over = Event()
        self._session_is_over.set()
        self._changed = Event()
        self._worker: ServiceGreenlet | None = ServiceGreenlet(
            self._stay_connected, lambda: not self.has_ended, copy_context()
        )
        """None when it has ended: the two would keep each other alive, and the last session."""

    def start(self) -> None:
        """Begin to connect. Does not switch."""
        if self._worker is not None:
            self._worker.ensure()

    def stop(self) -> None:
        """Connect no more; a session that is open stays. Does not switch; again without effect."""
        worker = self._worker
        if worker is not None and not self.has_ended:
            self._end()
            if worker.greenlet is not None:
                worker.greenlet.kill(block=False)

    def let_go(self) -> None:
        """Connect no more: it is the parent process's. Wakes nobody."""
        self.has_ended = True
        self._why_ended = f"connected in process {self.manager.process}, which has forked"
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.let_go()

    def disconnect(self) -> None:
        """Connect no more, and ask for the close of the session. Does not switch."""
        self.stop()
        if self.session is not None:
            self.session.close()

    def wait_connected(self, timeout: float | None) -> PsSession[Any]:
        """The open session; if there is none, the next one.

        Raises:
            PsClientError, PsMultiClientError: there was none in that time, or none will come any
                more; or the caller may not wait for it.
        """
        if not (self.has_ended or self._is_connected):
            self._check_may_wait()
        return self.wait(timeout)

    def wait(self, timeout: float | None) -> PsSession[Any]:
        """The same for who has made the link: may wait in a coroutine for the first session."""
        deadline = None if timeout is None else monotonic() + timeout
        while self.session is None or not self.session.is_open:
            if self.has_ended:
                raise self.not_connected()
            if self.session is not None or getcurrent() is self.manager.thread.hub:
                self._check_may_wait()
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                raise self.not_connected(f"not connected within {timeout:g} s")
            self._changed.wait(None if left is None else max(left, SHORTEST_TIMER))
        return self.session

    @property
    def _is_connected(self) -> bool:
        return self.session is not None and self.session.is_open

    def _check_may_wait(self) -> None:
        """Raise in the wrong thread, and where the next session would wait for the caller."""
        if not self.manager.thread.is_current() or self.manager.thread.is_over():
            raise self.not_connected("wait_connected belongs to the client's own thread")
        current = getcurrent()
        if self.session is not None and self.session._greenlet is current:
            raise self.not_connected("the session that has closed can't wait for the next one")
        is_me = self._worker is not None and self._worker.is_me()
        if is_me or not may_wait() or self.manager.closing.is_me():
            raise self.not_connected(
                "wait_connected can't wait in on_close, in should_retry, in a coroutine or in the "
                "hub"
            )

    def not_connected(self, why: str | None = None) -> PsError:
        """The error for it; by default: why nothing comes any more."""
        last = ""
        if self._last_error is not None:
            last = f"; the last error: {self._last_error}"
        elif self.session is not None and not self.session.is_open:
            last = f"; the last session ended: {_how_it_ended(self.session)}"
        return self._error(f"{self._name}: {why or self._why_ended}{last}")

    def _tell(self) -> None:
        """Let those who wait look again."""
        changed, self._changed = self._changed, Event()
        changed.set()

    def _end(self) -> None:
        self.has_ended = True
        self._worker = None
        self._ended(self)
        self._tell()

    # In the greenlet of its own. A stranger may kill it in any wait: then it begins here again.

    def _stay_connected(self) -> None:
        while not self.has_ended:
            self._session_is_over.wait()
            if self._opened_at:
                self._session_ended()
            elif not self._try():
                self._wait_or_give_up()

    def _try(self) -> bool:
        """Connect; false when that failed, and it may be tried again."""
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
        if again or self._last_error is not None:  # the log has it that there is none
            text = "%s: connected%s: %r"
            session._log(logging.INFO, text, self._name, again, session)
        self._last_error = None
        self.session = session
        self._context = session._context
        if self.has_ended:  # it was stopped in the moment in which the peer answered
            session.close()
        self._tell()
        return True

    def _note_end(self, at: float) -> None:
        """The session has ended at that moment, and its ``on_close`` has returned since."""
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
        cut_traceback(self._last_error)  # it is kept, and its frames hold this link

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
            self._why_ended = f"gave up {why}"
            log(logging.WARNING, "%s", self.not_connected())
            self._end()
            return
        gevent.sleep(max(delay, SHORTEST_TIMER))

    def _why_to_give_up(self, delay: float) -> str | None:
        policy = self._policy
        if policy.attempts is not None and self._failures >= policy.attempts:
            return f"after {self._failures} attempts"
        if policy.give_up_after is not None:
            tried = monotonic() - self._tried_since
            if tried + delay > policy.give_up_after:
                return f"after {policy.give_up_after:g} s"
        if policy.should_retry is not None:
            try:
                if policy.should_retry(self._failures, self._last_error) is False:
                    return "as should_retry says"
            except (Exception, gevent.Timeout) as exc:
                log(logging.ERROR, "%s: should_retry failed", self._name, exc_info=exc)
                return f"as should_retry failed: {exc!r}"
        return None


def _how_it_ended(session: PsSession[Any]) -> str:
    cause = session.close_cause
    return session._reason.name if cause is None else f"{session._reason.name} ({cause!r})"
