"""One hub and its OS thread, as seen from that thread and from others.

gevent's objects belong to the thread whose hub runs them. So this part hands the requests of
callers in other OS threads to the hub. A caller that must wait does so in the way of its own thread
(`CallerEvent`): in a thread with a hub it switches to that hub, so that the thread's other
greenlets go on; a thread without a hub waits on a native lock, which needs no hub.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, ParamSpec, TypeVar

import gevent
from gevent import Greenlet, get_hub, getcurrent, monkey
from gevent._hub_local import get_hub_if_exists  # there is no public way to ask without making one

from psofa_gevent.hub.calls import HubCalls, hub_calls
from psofa_gevent.hub.forking import unwatch, watch
from psofa_gevent.hub.native import get_ident, new_lock

__all__ = [
    "CallerEvent",
    "HubThread",
    "NativeEvent",
    "Pulse",
    "get_ident",
    "new_lock",
    "resolve",
]

P = ParamSpec("P")
T = TypeVar("T")

LOOK_PERIOD = 0.05
"""Seconds between two looks of a waiting OS thread whether there is still something to wait for."""

# The original: a native lock even in a patched process, which another thread may release.
_allocate_lock: Callable[[], Any] = monkey.get_original("_thread", "allocate_lock")


class NativeEvent:
    """Lets one OS thread wait until another one calls `set`; neither needs a hub."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = _allocate_lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._is_set

    def set(self) -> None:
        """Release the thread that waits now or later. May be called more than once."""
        self._is_set = True
        if self._lock.locked():
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Block the calling OS thread, its hub included, for at most `timeout` seconds."""
        if not self._is_set:
            self._lock.acquire(True, -1 if timeout is None else timeout)
        return self._is_set


class CallerEvent:
    """Lets the caller that made it wait until another OS thread calls `set`.

    A greenlet of a thread with a hub waits through gevent; any other caller blocks its thread.
    """

    __slots__ = ("_calls", "_greenlet", "_hub", "_native")

    def __init__(self) -> None:
        hub = get_hub_if_exists()
        self._hub: Any = None if getcurrent() is hub else hub
        self._calls: HubCalls | None = None if self._hub is None else hub_calls()
        self._native = NativeEvent()
        self._greenlet: Any = None

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._native.is_set()

    def set(self) -> None:
        """Release the caller that waits now or later. From any thread; may be called again."""
        self._native.set()
        if self._calls is not None:
            self._calls.add(self._wake, (), {})

    def wait(self, timeout: float) -> bool:
        """Wait for `set`, for at most `timeout` seconds; return whether it was called."""
        if self._hub is None or self._native.is_set():
            return self._native.wait(timeout)
        timer = watch(self._hub.loop.timer(timeout))
        timer.start(self._wake)
        self._greenlet = getcurrent()
        try:
            self._hub.switch()
        finally:
            self._greenlet = None
            unwatch(timer)
        return self._native.is_set()

    def _wake(self) -> None:
        # A late wake-up must not disturb the greenlet, which may wait for something else by then.
        if self._greenlet is not None:
            self._greenlet.switch()


class Pulse:
    """Tells one other OS thread whether a hub still runs."""

    def __init__(self, thread: HubThread) -> None:
        self._thread = thread
        self._felt_at = monotonic()
        self._is_asked = False

    def felt_since(self, moment: float) -> bool:
        """Whether the hub has run since `moment` (monotonic clock). Call it again and again."""
        if not self._is_asked:
            self._is_asked = True
            self._thread.call_soon(self._feel)
        return self._felt_at >= moment

    def _feel(self) -> None:
        self._felt_at = monotonic()
        self._is_asked = False


class HubThread:
    """The thread in which this object was made, and its hub."""

    __slots__ = ("_calls", "hub", "ident", "lock", "loop")

    def __init__(self) -> None:
        self.lock = new_lock()
        """Guards data that the sessions of one owner share with other threads."""
        self.hub = get_hub()
        self.loop = self.hub.loop
        self.ident = get_ident()
        self._calls = hub_calls()

    def is_current(self) -> bool:
        """Whether the caller runs in this thread."""
        return get_ident() == self.ident

    def is_over(self) -> bool:
        """Whether the hub will never run again: it was destroyed, or its thread has ended."""
        return self._calls.is_over()

    def call_soon(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have the hub call `function`, which must not block. From any thread; returns at once.

        Has no effect if the hub was destroyed or its thread has ended. `psofa_gevent.hub.calls` has
        the rules.
        """
        self._calls.add(function, args, kwargs)

    def run(
        self,
        is_over: Callable[[], bool],
        function: Callable[P, object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> bool:
        """Run `function` in a greenlet of this thread, and wait; from *other* OS threads only.

        The caller is released as soon as `function` returns or raises, with no switch in between:
        the hub's thread may then join the caller natively.

        Args:
            is_over: called now and then, in the calling thread: returns whether the object that
                `function` works on has ended, so that the hub may never run again.
            function: the function to run; its exceptions are raised here.
            *args: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            False if the object or the hub had ended before `function` began.
        """
        done = CallerEvent()
        errors: list[BaseException] = []
        greenlets: list[Greenlet[..., None]] = []
        has_left = False

        def body() -> None:
            try:
                function(*args, **kwargs)
            except BaseException as exc:
                if not has_left:
                    errors.append(exc)
            finally:
                done.set()

        def start() -> None:
            if not has_left:
                greenlets.append(_run_now(body))

        self.call_soon(start)
        thrown: list[BaseException] = []
        try:
            while not done.is_set() and not ((is_over() or self.is_over()) and not greenlets):
                try:
                    done.wait(LOOK_PERIOD)
                except BaseException as exc:  # the caller is killed: kill the greenlet, too
                    thrown.append(exc)
                    self.call_soon(gevent.killall, greenlets, block=False)
            if thrown or errors:
                raise (thrown or errors)[0]
            return done.is_set()
        finally:
            has_left = True
            # Otherwise an exception and this frame would keep each other alive.
            thrown.clear()
            errors.clear()

    async def run_async(
        self,
        is_over: Callable[[], bool],
        function: Callable[P, object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> bool:
        """`run` for a coroutine in an asyncio loop of another OS thread. The loop goes on.

        Cancelling the coroutine kills the greenlet, and waits until it has ended.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        errors: list[BaseException] = []
        greenlets: list[Greenlet[..., BaseException | None]] = []
        has_left = False

        def report(greenlet: Greenlet[..., BaseException | None]) -> None:
            if greenlet.value is not None:
                errors.append(greenlet.value)
            with contextlib.suppress(RuntimeError):  # the loop was closed, so no task waits
                loop.call_soon_threadsafe(resolve, ended, None)

        def start() -> None:
            if not has_left:
                greenlets.append(_run_now(_outcome, partial(function, *args, **kwargs)))
                greenlets[0].rawlink(report)

        self.call_soon(start)
        cancelled = False
        try:
            while not ended.done():
                try:
                    await asyncio.wait({ended}, timeout=LOOK_PERIOD)
                except asyncio.CancelledError:
                    cancelled = True
                    self.call_soon(gevent.killall, greenlets, block=False)
                if (is_over() or self.is_over()) and not greenlets:
                    break
            if cancelled:
                raise asyncio.CancelledError
            if errors:
                raise errors[0]
            return ended.done()
        finally:
            has_left = True
            # Otherwise an exception and this frame would keep each other alive.
            errors.clear()
            greenlets.clear()

    def raise_in_main(self, exc: BaseException) -> None:
        """Have the hub raise `exc` in the main greenlet, wherever that waits, as gevent does."""
        self.loop.run_callback(self.hub.handle_system_error, type(exc), exc, exc.__traceback__)


def _run_now(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Greenlet[..., T]:
    """Run `function` in a new greenlet up to its first wait. Called in the hub.

    Not by `gevent.spawn`, which begins a little later: the next request must not overtake this one.
    """
    greenlet: Greenlet[..., T] = Greenlet(function, *args, **kwargs)
    greenlet.switch()
    return greenlet


def _outcome(function: Callable[[], object]) -> BaseException | None:
    try:
        function()
    except BaseException as exc:
        return exc
    return None


def resolve(future: asyncio.Future[T], value: T) -> None:
    """Give `future` a result, unless it is done or cancelled. In the thread of its loop."""
    if not future.done():
        future.set_result(value)
