"""The time limit of one running callback: ``callback_timeout``.

The greenlet that runs the callback enters a `TimeLimit`, which does not switch. When the time is
over, a timer in the hub throws `TimeoutError` into that greenlet, wherever it waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Self

from gevent import get_hub, getcurrent

from psofa_gevent.hub.forking import unwatch, watch
from psofa_gevent.hub.times import SHORTEST_TIMER

__all__ = ["TimeLimit"]

LONGEST_RETHROW = 1.0
"""Most seconds until a callback that swallowed its `TimeoutError` gets another one."""


class TimeLimit:
    """Throws `TimeoutError` into the greenlet that entered it, repeatedly, when the time is over.

    A callback that swallows the error gets the next one after the same time, or after
    `LONGEST_RETHROW` if that is less. A callback that never switches cannot be ended.
    """

    def __init__(
        self, name: str, timeout: float, expired: Callable[[TimeoutError], TimeoutError]
    ) -> None:
        """`expired` is called once, in the hub, with the first error; it returns what to throw."""
        self._message = f"{name} ran longer than callback_timeout={timeout:g} s"
        self._timeout = max(timeout, SHORTEST_TIMER)
        self._expired: Callable[[TimeoutError], TimeoutError] | None = expired

    def __enter__(self) -> Self:
        self._greenlet = getcurrent()
        self._start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock during the block, and start it again from zero after the block."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def restart(self) -> None:
        """Start the clock again from zero."""
        self._stop()
        self._start()

    def _start(self) -> None:
        again = min(self._timeout, LONGEST_RETHROW)
        self._timer = watch(get_hub().loop.timer(self._timeout, again))
        self._timer.start(self._throw)

    def _stop(self) -> None:
        unwatch(self._timer)

    def _throw(self) -> None:
        # In the hub, so the callback is switched out: the error reaches it in its wait.
        error = TimeoutError(self._message)
        expired, self._expired = self._expired, None
        if expired is not None:
            error = expired(error)
        self._greenlet.throw(error)
