"""How a greenlet waits, and how an asyncio task waits, behind one interface.

An algorithm that may wait in either is one coroutine, which awaits a `Parking`. `GreenletParking`
switches to the hub and never suspends the coroutine, `TaskParking` awaits a future. `wake` belongs
to the hub's thread, and does not switch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any, Protocol

from gevent import get_hub, getcurrent

from psofa_gevent.hub.thread import resolve

__all__ = ["GreenletParking", "Parking", "TaskParking", "run_in_greenlet"]


class Parking(Protocol):
    """A place where one greenlet or task waits until code in the hub's thread wakes it.

    A wake-up is lost if nothing waits, and one may come without a cause. So the waiter must look at
    its condition after each wait, and wait again if necessary.
    """

    def __await__(self) -> Generator[Any, None, None]: ...

    def wake(self) -> bool:
        """Let the waiter go on soon; false if it never can. Does not switch."""


class GreenletParking:
    """Waits by switching to the hub."""

    __slots__ = ("_hub", "_is_woken", "greenlet")

    def __init__(self) -> None:
        self._hub = get_hub()
        self.greenlet: Any = None
        """The greenlet that waits; None: none waits."""
        self._is_woken = False
        """Whether a switch is already due: a second one would end the next wait."""

    def __await__(self) -> Generator[Any, None, None]:
        self.greenlet = getcurrent()
        try:
            self._hub.switch()
        finally:
            self.greenlet = None
        yield from ()

    def wake(self) -> bool:
        """Switch back to the greenlet soon."""
        if self.greenlet is not None and not self._is_woken:
            self._is_woken = True
            self._hub.loop.run_callback(self._switch)
        return True

    def _switch(self) -> None:
        self._is_woken = False
        # Since the wake-up the greenlet may have gone on.
        if self.greenlet is not None:
            self.greenlet.switch()


class TaskParking:
    """Waits by awaiting a future of the running asyncio loop, in the hub's thread."""

    __slots__ = ("_future", "_loop", "task")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.task: asyncio.Task[Any] | None = None
        """The task that waits; None: none waits."""
        self._future: asyncio.Future[None] | None = None

    def __await__(self) -> Generator[Any, None, None]:
        self._future = self._loop.create_future()
        self.task = asyncio.current_task()
        try:
            yield from self._future
        finally:
            self._future = None
            # The task keeps an error whose traceback leads back to this object: the two would keep
            # each other alive.
            self.task = None

    def wake(self) -> bool:
        """Resolve the future soon; false if its loop was closed."""
        if self._future is not None:
            try:
                # The loop may be another loop than the hub's: then only this call wakes it.
                self._loop.call_soon_threadsafe(resolve, self._future, None)
            except RuntimeError:
                return False
        return True


def run_in_greenlet(coroutine: Coroutine[Any, None, None]) -> None:
    """Run a coroutine in the calling greenlet. It must wait in a `GreenletParking` only."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    finally:
        coroutine.close()
    raise RuntimeError("the coroutine suspended outside its parking")
