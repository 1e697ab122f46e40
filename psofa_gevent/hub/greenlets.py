"""The greenlets of the library, and whether a caller may wait.

`LibraryGreenlet` marks them. Users' callbacks run in some of them, and a shutdown cannot finish
until all of them can run. So a call that waits for the shutdown must not wait in one of them, nor
in the hub: `may_wait_for_callbacks` checks this. (A signal handler runs in whichever greenlet runs
at that moment.)
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
    """A greenlet of the library."""

    # Without a dictionary it is smaller, and its methods are found faster.
    __slots__ = ()

    # gevent records for each greenlet where it was made, ten frames deep. Here that is always the
    # same place.
    spawning_stack_limit = 0

    def __init__(self, *run: Callable[[], None]) -> None:
        super().__init__(*run)
        track(self)

    def _let_go(self, _hub: object) -> None:
        """Never run again, in a child process (`psofa_gevent.hub.forking`)."""
        leave_behind(self)

    # gevent calls one of these two methods, whatever the greenlet waited for.

    def switch(self, *args: Any, **kwargs: Any) -> Any:
        """Run, or go on; without effect on a greenlet that was left behind by a fork."""
        if left_behind and self in left_behind:
            not_woken(self)
            return None
        return _switch(self, *args, **kwargs)

    def throw(self, *args: Any) -> Any:
        """Raise an exception where it waits; without effect if it was left behind by a fork."""
        if left_behind and self in left_behind:
            return None
        return super().throw(*args)


class SessionTask(LibraryGreenlet):
    """A session task: not a callback, so a shutdown does not let it finish."""

    __slots__ = ()


class StepGreenlet(greenlet):
    """A greenlet that runs steps of coroutines: a wait through gevent holds up all of them."""

    __slots__ = ()


def in_coroutine() -> bool:
    """Whether the caller runs inside a step (or callback) of the asyncio loop of this thread's hub.

    Also true in a greenlet that such a step runs and waits for by itself, as SQLAlchemy does.
    """
    current: greenlet | None = getcurrent()
    while current is not None:
        if isinstance(current, StepGreenlet):
            return True
        if isinstance(current, LogGreenlet):  # its handlers may wait, whichever greenlet logs
            return False
        current = current.parent
    return False


def sends_to_the_end() -> bool:
    """Whether the caller is a callback: SHUTDOWN lets the sends of callbacks go on."""
    current = getcurrent()
    is_callback = isinstance(current, LibraryGreenlet) and not isinstance(current, SessionTask)
    return is_callback or in_coroutine()


def in_callback() -> bool:
    """Whether the caller runs in a greenlet of the library, as callbacks do, or in a coroutine."""
    return isinstance(getcurrent(), LibraryGreenlet) or in_coroutine()


def may_wait() -> bool:
    """Whether the caller may switch to the hub: it is neither the hub nor in a coroutine."""
    return getcurrent() is not get_hub_if_exists() and not in_coroutine()


def may_wait_for_callbacks() -> bool:
    """Whether the caller may wait until callbacks have ended.

    That is not so in a callback, in the hub and in a coroutine, nor in a log handler, as the end of
    a shutdown waits for the handlers.
    """
    current = getcurrent()
    is_hub = current is get_hub_if_exists()
    return not (is_hub or isinstance(current, LogGreenlet) or in_callback())


class ServiceGreenlet:
    """One greenlet with one endless job, started when first needed.

    Other code may kill it (``gevent.killall`` of all greenlets): then it is started again at once
    while there is work, otherwise by the next `ensure`. Without work only its owner holds it, so an
    owner that is dropped is freed together with the greenlet.
    """

    def __init__(
        self,
        job: Callable[[], None],
        has_work: Callable[[], bool],
        context: Context | None = None,
    ) -> None:
        """Take the job; `ensure` starts it.

        Args:
            job: a function that never returns. After a kill it is called anew.
            has_work: returns whether the job has to go on.
            context: the context variables of the job; by default a new context, which is empty.
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
        """Forget the greenlet, which was the parent process's, and never start one again."""
        self._stopped = True
        self.greenlet = None

    def replace(self) -> None:
        """Give the greenlet up, though it still runs, and start another one in its place."""
        self.greenlet = None
        self.ensure()

    def is_current(self) -> bool:
        """Whether the caller is the greenlet, and not one that was given up."""
        return getcurrent() is self.greenlet

    def stop(self) -> None:
        """End the greenlet for good. It must be waiting; must not be called from within it."""
        self._stopped = True
        greenlet, self.greenlet = self.greenlet, None
        if greenlet is not None:
            greenlet.unlink(self._ended)
            greenlet.kill()
