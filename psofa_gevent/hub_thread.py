"""One hub and its OS thread, as seen from that thread and from others.

gevent's objects belong to the thread whose hub runs them. Everything that a caller in another OS
thread asks for is handed to the hub here, and the caller waits, if it must, on a native lock: a
lock of gevent's would need the caller's own hub to run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ParamSpec

import gevent
from gevent import get_hub, monkey

__all__ = ["HubThread", "NativeEvent", "get_ident", "log_from_hub"]

logger = logging.getLogger("psofa_gevent")

P = ParamSpec("P")

LOOK_PERIOD = 0.05
"""Seconds between two looks of a waiting OS thread whether there is still something to wait for."""

# The originals: in a patched process the names in `_thread` are about greenlets.
get_ident: Callable[[], int] = monkey.get_original("_thread", "get_ident")
_allocate_lock: Callable[[], Any] = monkey.get_original("_thread", "allocate_lock")


class NativeEvent:
    """Lets one OS thread wait until another one calls `set`; neither needs a hub for it."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = _allocate_lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether `set` was called and nobody has waited since."""
        return not self._lock.locked()

    def set(self) -> None:
        """Release the waiting thread, now or when it comes. May be called more than once."""
        if self._lock.locked():
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Block the calling OS thread, its hub included, for at most `timeout` seconds."""
        acquired: bool = self._lock.acquire(True, -1 if timeout is None else timeout)
        return acquired


class HubThread:
    """The thread in which this object was made, and its hub."""

    __slots__ = ("hub", "ident", "loop")

    def __init__(self) -> None:
        self.hub = get_hub()
        self.loop = self.hub.loop
        self.ident = get_ident()

    def is_current(self) -> bool:
        """Whether the caller runs in this thread."""
        return get_ident() == self.ident

    def call_soon(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have the hub call `function`, which must not block. From any thread; returns at once."""
        self.loop.run_callback_threadsafe(_discard_result, function, args, kwargs)

    def run(
        self,
        is_over: Callable[[], bool],
        function: Callable[P, object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> bool:
        """Run `function` in a greenlet of this thread; from *other* OS threads only.

        The caller is released in the moment in which `function` returns or raises, with no switch
        in between: the hub's thread may then join the caller natively.

        Args:
            is_over: asked now and then, in the calling thread: whether what `function` is about has
                come to its end. The hub may never run again then.
            function: what to run; what it raises is raised here.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            False when it was over before `function` ran.
        """
        done = NativeEvent()
        errors: list[BaseException] = []

        def body() -> None:
            try:
                function(*args, **kwargs)
            except BaseException as exc:
                errors.append(exc)
            finally:
                done.set()

        def killed_unstarted(_greenlet: object) -> None:
            if not done.is_set():
                errors.append(gevent.GreenletExit())
                done.set()

        def start() -> None:
            gevent.spawn(body).rawlink(killed_unstarted)

        self.call_soon(start)
        while not done.wait(LOOK_PERIOD):
            if is_over() and not done.is_set():
                return False
        if errors:
            try:
                raise errors[0]
            finally:
                errors.clear()  # an exception and this frame would keep each other alive
        return True

    def raise_in_main(self, exc: BaseException) -> None:
        """Have the hub raise `exc` in the main greenlet, wherever it waits, as gevent does."""
        self.loop.run_callback(self.hub.handle_system_error, type(exc), exc, exc.__traceback__)


def log_from_hub(level: int, message: str, *args: object, **kwargs: Any) -> None:
    """Log in a greenlet of its own: a handler may block, which the hub must not."""
    gevent.spawn(logger.log, level, message, *args, **kwargs)


def _discard_result(
    function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    function(*args, **kwargs)
