"""The run queue: the sessions whose sockets are readable, resumed one after the other.

A greenlet whose awaited coroutine has ended goes through this queue, too (`psofa_gevent.aio.run`).

The watcher of a waiting session puts the session into the queue of its hub. When the hub has
dispatched all events of a round, it switches to the first session in the queue. Each session that
waits again switches straight to the next one, and the last session back to the hub. So a message
costs one greenlet switch and not two.

A session that has much to do without waiting gives up its turn (`ReadySessions.resume_later`): it
goes on behind the ready sessions of the next round, after the hub has looked at all sockets and
timers.

An entry may be stale: its session was woken for another reason meanwhile, is in a callback, or has
ended. So the code that takes an entry out checks whether its session waits. All of it belongs to
the hub's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import time
from typing import Any, Protocol

from gevent import get_hub
from greenlet import greenlet

from psofa_gevent.hub.calls import close_watcher, hub_calls
from psofa_gevent.hub.forking import keep, release, track
from psofa_gevent.hub.native import AtThreadEnd, new_local

__all__ = ["ReadySessions", "ready_sessions", "switch"]

switch = greenlet.switch
"""Switches from one session to the next, and to the hub, without the work of ``Hub.switch``."""


class Ready(Protocol):
    """An entry of the run queue: a session, or another greenlet that waits."""

    @property
    def greenlet(self) -> Any:
        """The greenlet to switch to."""

    @property
    def waiting_since(self) -> float:
        """Not 0 while it waits for its turn, and may be switched to."""

    def stop_watching(self) -> None:
        """Called when its turn has come, and it does not wait."""


class ReadySessions:
    """The ready sessions of one hub.

    The hub looks at them in each round as long as a session is registered; on libuv, from the first
    registration on.
    """

    def __init__(self) -> None:
        self.hub = get_hub()
        self._loop: Any = self.hub.loop
        self._calls = hub_calls()
        self._waiting_calls = self._calls.waiting
        self.sessions: list[Ready] = []
        """The run queue, the next one last: libev reports the events of a round in reverse."""
        self._is_reversed = self.stays_armed = "libev" in type(self._loop).__module__
        """Whether a watcher may stay started after its socket was read. Not on libuv, which stops
        it at a reset without notice, while the bytes before the reset are still unread."""
        self.now = 0.0
        """When the ready sessions of this round began to go on (`time.time`): one look at the clock
        for all of them, as one for each message would cost noticeable time."""
        self._rounds = 0
        """The number of rounds of the hub on libuv, which does not count them."""
        self._registered = 0
        self._check: Any = None
        self._soon: Any = None
        self._gave_up_turn: list[Ready] = []
        self._keep_turning: Any = None
        """Runs while `_gave_up_turn` has sessions, so that a round does not wait for an event."""
        track(self)

    @property
    def rounds(self) -> int:
        """The number of rounds in which the hub has looked at all sockets and timers."""
        return int(self._loop.iteration) if self._is_reversed else self._rounds

    def register(self) -> None:
        """One more session may become ready."""
        if self._check is None:
            # Of the lowest priority: after all watchers of sockets in a round.
            check = self._loop.check(ref=False, priority=self._loop.MINPRI)
            try:
                check.start(self._runs_a_round())
            except BaseException:
                check.close()
                raise
            self._check = check
        self._registered += 1

    def unregister(self) -> None:
        """One session less."""
        self._registered -= 1
        # libuv keeps the check watchers that it has yet to call in a round in a list on its stack.
        # A greenlet has its own stack in that place: stopping a watcher from it destroys both.
        if self._registered == 0 and self._is_reversed:
            self.close_check()

    def close_check(self) -> None:
        """Stop looking at the hub's rounds. In its thread, when that ends or has another hub."""
        if self._check is not None:
            close_watcher(self._check)
            self._check = None
            self._gave_up_turn.clear()
            if self._keep_turning is not None:
                self._keep_turning.stop()
                self._keep_turning.close()
                self._keep_turning = None

    def _let_go(self, hub: object) -> None:
        """Empty the run queue in a child process, whose sessions have a queue of their own."""
        keep(list(self.sessions), list(self._gave_up_turn), self)
        self.sessions.clear()
        self._gave_up_turn.clear()
        for watcher in (self._check, self._keep_turning):
            if watcher is not None and self.hub is hub:
                release(watcher)
        self._check = self._keep_turning = None
        if getattr(_of_thread, "ready", None) is self:
            _of_thread.ready = None

    def add(self, several: Sequence[Ready]) -> None:
        """Append ready sessions to the run queue, in this order.

        Outside of the hub's round the caller must call `switch_on` or `run_soon` afterwards.
        """
        self.sessions[:0] = reversed(several)

    def run_soon(self) -> None:
        """Let the ready sessions go on, in this round of the hub."""
        loop: Any = self.hub.loop
        # A destroyed hub has no loop.
        if loop is not None and (self._soon is None or not self._soon.pending):
            self._soon = loop.run_callback(self._run)

    def resume_later(self, session: Ready) -> None:
        """Let `session`, which is registered and about to wait, go on at the end of the next round.

        So the hub asks for events first. With ``run_callback`` it would resume the session before
        that, dozens of times.
        """
        if self._keep_turning is None:
            self._keep_turning = self._loop.idle()
        if not self._gave_up_turn:
            self._check.callback = self._run_round_and_resume
            self._keep_turning.start(_do_nothing)
        self._gave_up_turn.append(session)

    def switch_on(self) -> None:
        """Switch to the next ready session, or to the hub. The caller must be one that waits."""
        sessions: list[Any] = self.sessions  # Any, as a session that waits has a greenlet
        while sessions:
            other = sessions.pop()
            if other.waiting_since:
                greenlet = other.greenlet
                del other  # a wait must not hold another session
                switch(greenlet)
                return
            other.stop_watching()
        switch(self.hub)

    def _runs_a_round(self) -> Callable[[], None]:
        return self._run if self._is_reversed else self._reverse_and_run

    def _reverse_and_run(self) -> None:
        self._rounds += 1
        self.sessions.reverse()
        self._run()

    def _run_round_and_resume(self) -> None:
        self._check.callback = self._runs_a_round()
        self._keep_turning.stop()
        if not self._is_reversed:
            self._rounds += 1
            self.sessions.reverse()
        resumed, self._gave_up_turn = self._gave_up_turn, []
        self.add(resumed)
        self._run()

    def _run(self) -> None:
        # In the hub. Each switch comes back when no session is left, or when a callback waits for
        # something else: then the other sessions are still in the queue.
        if self._waiting_calls:
            self._calls.run()
        sessions = self.sessions
        if sessions:
            self.now = time()
        while sessions:
            session = sessions.pop()
            if session.waiting_since and session.greenlet is not None:
                switch(session.greenlet)
            else:
                session.stop_watching()


def _do_nothing() -> None:
    pass


def ready_sessions() -> ReadySessions:
    """Return the run queue of this thread's hub."""
    hub = get_hub()
    ready: ReadySessions | None = getattr(_of_thread, "ready", None)
    if ready is None or _of_thread.hub is not hub:
        ready = _of_thread.ready = ReadySessions()
        _of_thread.hub = hub
        _of_thread.at_end = AtThreadEnd(ready.close_check)
    return ready


_of_thread = new_local()
