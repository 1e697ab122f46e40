"""The greenlets of the library, and the question whether a caller may wait.

`LibraryGreenlet` marks them: users' callbacks run in some, and a shutdown cannot finish until all
of them can run. A call that waits for the shutdown must not wait in one of them, nor in the hub:
`may_wait_for_callbacks` tells. (A signal handler runs in whichever greenlet runs just then.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any

from gevent import Greenlet, getcurrent
from gevent._hub_local import get_hub_if_exists  # a thread without one must not get one here
from greenlet import greenlet

from psofa_gevent.hub.forking import leave_behind, left_behind, not_woken, track
from psofa_gevent.hub.logs import LogGreenlet

__all__ = [
    "LibraryGreenlet",
    "ServiceGreenlet",
    "SessionTask",
    "StepGreenlet",
    "in_callback",
    "in_coroutine",
    "may_wait",
    "may_wait_for_callbacks",
    "sends_to_the_end",
]


_switch = greenlet.switch

if TYPE_CHECKING:
    _Greenlet = Greenlet[[], None]
else:
    _Greenlet = Greenlet  # the oldest gevent's is not generic


class LibraryGreenlet(_Greenlet):
    """A greenlet of the library's own."""

    # Without a dictionary it is smaller, and its methods are found faster.
    __slots__ = ()

    # gevent notes for each greenlet where it was made, ten frames deep: here always the same place.
    spawning_stack_limit = 0

    def __init__(self, *run: Callable[[], None]) -> None:
        super().__init__(*run)
        track(self)

    def _let_go(self, _hub: object) -> None:
        """Never run again, in a child process (`psofa_gevent.hub.forking`)."""
        leave_behind(self)

    # gevent calls these two, whatever the greenlet waited for.

    def switch(self, *args: Any, **kwargs: Any) -> Any:
        """Run, or go on; not in a child process."""
        if left_behind and self in left_behind:
            not_woken(self)
            return None
        return _switch(self, *args, **kwargs)

    def throw(self, *args: Any) -> Any:
        """Raise something where it waits; not in a child process."""
        if left_behind and self in left_behind:
            return None
        return super().throw(*args)


class SessionTask(LibraryGreenlet):
    """One that a session has beside its own: no callback that a shutdown would let finish."""

    __slots__ = ()


class StepGreenlet(greenlet):
    """One that runs steps of coroutines: a wait in gevent's way holds all of them."""

    __slots__ = ()


def in_coroutine() -> bool:
    """Whether the caller runs inside a step (or callback) of the loop of this thread's hub.

    In a greenlet that such a step runs and waits for by itself, as SQLAlchemy does, too.
    """
    current: greenlet | None = getcurrent()
    while current is not None:
        if isinstance(current, StepGreenlet):
            return True
        if isinstance(current, LogGreenlet):  # whose handler may wait, whoever logs
            return False
        current = current.parent
    return False


def sends_to_the_end() -> bool:
    """Whether the caller is a callback, whose sends SHUTDOWN lets go on."""
    current = getcurrent()
    is_callback = isinstance(current, LibraryGreenlet) and not isinstance(current, SessionTask)
    return is_callback or in_coroutine()


def in_callback() -> bool:
    """Whether the caller is a callback (or was called by one, in the same greenlet)."""
    return isinstance(getcurrent(), LibraryGreenlet) or in_coroutine()


def may_wait() -> bool:
    """Whether the caller may switch to the hub: it is neither the hub nor a coroutine."""
    return getcurrent() is not get_hub_if_exists() and not in_coroutine()


def may_wait_for_callbacks() -> bool:
    """Whether the caller may wait until callbacks have ended: it is none, and may wait at all.

    No log handler, as the end of a shutdown waits for those.
    """
    current = getcurrent()
    is_hub = current is get_hub_if_exists()
    return not (is_hub or isinstance(current, LogGreenlet) or in_callback())


class ServiceGreenlet:
    """One greenlet with one endless job, started when first needed.

    A stranger may kill it (``gevent.killall`` of all there is): it is started again at once while
    there is work, else with the next `ensure`. Without work it is not held by anything but its
    owner, so an owner that is dropped goes, greenlet and all.
    """

    def __init__(
        self,
        job: Callable[[], None],
        has_work: Callable[[], bool],
        context: Context | None = None,
    ) -> None:
        """Say what to do, in its first line and again where it was killed.

        Args:
            job: it never returns.
            has_work: whether it has to go on.
            context: that of the job; by default one of its own, which is empty.
        """
        self._job = job
        self._has_work = has_work
        self._context = context
        self._stopped = False
        self.greenlet: LibraryGreenlet | None = None

    def ensure(self) -> None:
        """Start the greenlet unless it runs. Does not switch."""
        if self.greenlet is None and not self._stopped:
            greenlet = LibraryGreenlet(self._job)
            greenlet.gr_context = self._context
            greenlet.rawlink(self._ended)
            self.greenlet = greenlet
            greenlet.start()

    def _ended(self, greenlet: object) -> None:
        if self.greenlet is greenlet:
            self.greenlet = None
            if self._has_work():
                self.ensure()

    def let_go(self) -> None:
        """Have no greenlet, and never start one again: it was the parent process's."""
        self._stopped = True
        self.greenlet = None

    def replace(self) -> None:
        """Leave the greenlet behind, still running, and start another in its place."""
        self.greenlet = None
        self.ensure()

    def is_current(self) -> bool:
        """Whether the caller is the greenlet: not one that was given up."""
        return getcurrent() is self.greenlet

    def stop(self) -> None:
        """End the greenlet for good. It must be waiting; must not be called from within it."""
        self._stopped = True
        greenlet, self.greenlet = self.greenlet, None
        if greenlet is not None:
            greenlet.unlink(self._ended)
            greenlet.kill()
