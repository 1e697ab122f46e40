"""The sessions whose sockets have become readable, and how one goes on after the other.

So do greenlets that wait for a coroutine, when that has ended (`psofa_gevent.aio_run`).

The watcher of a session that waits puts it into the list of its hub. When the hub has dispatched
all events of a round it switches to the first of them; each that waits again switches straight to
the next, and the last one back to the hub. So a message costs one greenlet switch and not two.

An entry may be stale: its session was woken for another reason since, is in a callback, or is gone.
Whoever takes one out looks whether that session waits. All of it belongs to the hub's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gevent import get_hub
from greenlet import greenlet

from psofa_gevent.hub_calls import close_watcher, hub_calls
from psofa_gevent.native import AtThreadEnd, new_local

__all__ = ["ReadySessions", "ready_sessions", "switch"]

switch = greenlet.switch
"""From one session to the next, and to the hub: past what gevent does in ``Hub.switch``."""


class Ready(Protocol):
    """One that may be ready: a session, or another greenlet that waits."""

    @property
    def _greenlet(self) -> Any:
        """What to switch to."""

    @property
    def _waiting_since(self) -> float:
        """Not 0 while it waits for its turn, and may be switched to."""

    def _stop_watching(self) -> None:
        """Called when it has come to its turn, and does not wait."""


class ReadySessions:
    """The readable sessions of one hub. It looks at them as long as any session is `registered`.

    (On libuv from the first one on.)
    """

    def __init__(self) -> None:
        self.hub = get_hub()
        self._loop: Any = self.hub.loop
        self._calls = hub_calls()
        self._waiting_calls = self._calls.waiting
        self.sessions: list[Ready] = []
        """The next one last: libev tells the events of a round in reverse order."""
        self._is_reversed = self.keeps_watching = "libev" in type(self._loop).__module__
        """Whether a watcher may run on when its socket was read. Not on libuv, which stops it by
        itself at a reset, with the bytes before that still unread, and tells nobody."""
        self._registered = 0
        self._check: Any = None
        self._soon: Any = None

    def register(self) -> None:
        """One more session may become ready."""
        self._registered += 1
        if self._check is None:
            # Of the lowest priority: after all watchers of sockets in a round.
            self._check = self._loop.check(ref=False, priority=self._loop.MINPRI)
            self._check.start(self._run if self._is_reversed else self._reverse_and_run)

    def unregister(self) -> None:
        """One session less."""
        self._registered -= 1
        # libuv keeps the check watchers that it has yet to call in a round in a list on its stack.
        # To stop one of them from a greenlet, which has its own stack in that place, destroys both.
        if self._registered == 0 and self._is_reversed:
            self._close_check()

    def _close_check(self) -> None:
        if self._check is not None:
            close_watcher(self._check)
            self._check = None

    def add(self, several: Sequence[Ready]) -> None:
        """Some are ready: after those that are there, in this order.

        Outside of the hub's round the caller must `switch_on`, or `run_soon`.
        """
        self.sessions[:0] = reversed(several)

    def run_soon(self) -> None:
        """Let those that are ready go on, in this round of the hub."""
        loop: Any = self.hub.loop
        # A destroyed hub has none.
        if loop is not None and (self._soon is None or not self._soon.pending):
            self._soon = loop.run_callback(self._run)

    def switch_on(self) -> None:
        """Switch to the next one that is ready, or to the hub. The caller is one that waits."""
        sessions: list[Any] = self.sessions  # whoever waits has a greenlet
        while sessions:
            other = sessions.pop()
            if other._waiting_since:
                greenlet = other._greenlet
                del other  # a wait must not hold another session
                switch(greenlet)
                return
            other._stop_watching()
        switch(self.hub)

    def _reverse_and_run(self) -> None:
        self.sessions.reverse()
        self._run()

    def _run(self) -> None:
        # In the hub. Each switch comes back when nobody is left, or when a callback waits on
        # something else: then the rest is still here.
        if self._waiting_calls:
            self._calls.run()
        sessions = self.sessions
        while sessions:
            session = sessions.pop()
            if session._waiting_since and session._greenlet is not None:
                switch(session._greenlet)
            else:
                session._stop_watching()


def ready_sessions() -> ReadySessions:
    """The list of this thread's hub."""
    hub = get_hub()
    ready: ReadySessions | None = getattr(_of_thread, "ready", None)
    if ready is None or _of_thread.hub is not hub:
        ready = _of_thread.ready = ReadySessions()
        _of_thread.hub = hub
        _of_thread.at_end = AtThreadEnd(ready._close_check)
    return ready


_of_thread = new_local()
