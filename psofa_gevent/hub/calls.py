"""Calls from other OS threads into a hub: a list of calls, and one watcher that wakes the hub.

In a thread that is not the hub's, the library only sends to this watcher, and on libuv appends to
the loop's list of callbacks. It changes nothing else of the hub's loop there. gevent's own
``run_callback_threadsafe`` does more there than libev and libuv allow:

- On libev it increments the loop's reference count, under the GIL, while the loop decrements it
  without the GIL, for each timer that fires, for example. After some 300,000 calls beside gevent's
  timers the count is wrong, and the hub ends under a running server, or never.
- On libuv it starts a check watcher. Two threads that do so at once corrupt the loop's list of
  check watchers, and the process crashes or hangs.

Both loops let other threads send to an ``async_`` watcher (``ev_async_send``, ``uv_async_send``).
This watcher does not keep the hub alive (``ref=False``), so no reference is counted.

When the hub runs calls, and when not:

- It runs them in the order in which they were added, and at once: sending wakes the hub. They come
  before everything else that the hub has found to do by then; on libuv they keep their place among
  its callbacks. A hub with sessions also looks for calls at the end of each round
  (`psofa_gevent.hub.ready`): so if another thread has added a call, work that the hub's thread
  begins afterwards does not run before the call.
- It runs the calls that are there when it comes to them, in one go. Calls that are added meanwhile
  run later: at the end of this round if the hub has sessions, otherwise in the next round. So
  neither calls that add calls nor threads that never stop starve other work. An exception of a call
  is handled like that of a callback of gevent's hub, and the next call is run.
- It runs them even if nothing else keeps the hub alive, provided they are there before the hub
  begins to wait: so a call may start something that prevents a `LoopExit`. The hub does not wait
  for calls that may come later: a waiter for such a call keeps the hub alive by a timer or a
  watcher. (On libev, a call that is added while the very last thing that kept the hub alive is just
  ending counts as a later one.)
- It never runs them when it was destroyed or its thread has ended. A child process never runs calls
  that were added before the fork.

What may switch: only `HubCalls.run`, in the hub. A call may switch to a greenlet that switches
back.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from gevent import get_hub
from gevent._ffi.callback import (  # type: ignore[import-not-found]  # private
    callback as uv_callback,
)

from psofa_gevent.hub.forking import track
from psofa_gevent.hub.native import AtThreadEnd, get_ident, new_local, new_lock

__all__ = ["HubCalls", "close_watcher", "hub_calls"]

Call = tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]


class HubCalls:
    """The calls for one hub. Made in its thread; get it from `hub_calls`."""

    def __init__(self) -> None:
        self.hub: Any = get_hub()
        self._loop: Any = self.hub.loop
        self._ident = get_ident()
        self._is_closed = False
        self._uv_callbacks = _uv_callbacks(self._loop)
        self.waiting: deque[Call] = deque()
        """The calls that have not been run: while there are any, `run` has work."""
        self._begin()
        track(self)

    def _begin(self) -> None:
        self._is_due = False
        """Whether `run` is among the callbacks of the loop."""
        self._lock = new_lock()
        """Held to send to the watcher, and to close it: libuv does not check whether it is open."""
        self._watcher = self._loop.async_(ref=False, priority=self._loop.MAXPRI)
        self._watcher.start(self.run)

    def add(
        self, function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Have the hub call `function`, which must not block. From any thread; returns at once."""
        with self._lock:
            if not self.is_over():
                self.waiting.append((function, args, kwargs))
                self._wake_hub()

    def is_over(self) -> bool:
        """Whether no call will be run any more: the hub was destroyed, or its thread has ended."""
        # A destroyed loop points nowhere; a loop that outlives its hub serves the next hub.
        return self._is_closed or self.hub.loop is None or not self._loop.ptr

    def _wake_hub(self) -> None:
        if not self._is_due:
            if get_ident() == self._ident:
                self._is_due = True
                self._loop.run_callback(self.run)
            elif self._uv_callbacks is not None:
                self._is_due = True
                self._uv_callbacks.append(uv_callback(self.run, ()))
        try:
            self._watcher.send()
        except Exception:
            # The hub has just been destroyed, or must start the watcher first (see `run`). It does
            # so within 0.3 s, as gevent wakes libuv at this interval to look for signals.
            if self._uv_callbacks is None and not self.is_over():
                raise

    def run(self) -> None:
        """Run the waiting calls. In the hub; a call may switch to a greenlet that switches back."""
        self._is_due = False  # before the look: a call that comes later makes it due again
        if self.is_over():
            return
        if self._watcher.callback is None:
            # gevent on libuv stops a watcher if an exception leaves its callback: a signal handler
            # may raise one at any line, even in gevent's own code around the callback.
            self._watcher.start(self.run)
        waiting = self.waiting
        try:
            # Written so that no signal handler can run between taking a call and calling it: the
            # call would be lost.
            for function, args, kwargs in islice(iter(waiting.popleft, None), len(waiting)):
                try:
                    function(*args, **kwargs)
                except BaseException:
                    # Raises if the call has destroyed the hub.
                    self.hub.handle_error(function, *sys.exc_info())
        except IndexError:
            pass  # the calls were dropped meanwhile, by a fork or by `close`
        finally:
            if waiting and not self.is_over():
                self._wake_hub()

    def close(self) -> None:
        """Release the watcher. Called in its thread, when that ends or has another hub."""
        with self._lock:
            self._is_closed = True
            self.waiting.clear()
            close_watcher(self._watcher)

    def _let_go(self, hub: object) -> None:
        """Begin anew in a child process, which has no other threads, and needs none of their calls.

        The old watcher stays started: on libuv it may be in the middle of a send for ever.
        """
        self.waiting.clear()
        if hub is self.hub and not self.is_over():
            self._begin()
        else:
            self._lock = new_lock()
            self._is_closed = True


def _uv_callbacks(loop: Any) -> deque[Any] | None:
    """The callbacks of a libuv loop, which runs them even if no watcher keeps it alive."""
    return loop._callbacks if "libuv" in type(loop).__module__ else None  # noqa: SLF001 - see `HubCalls`


def close_watcher(watcher: Any) -> None:
    """Close a watcher in its thread, even if its loop was destroyed."""
    if watcher.loop.ptr or "libuv" in type(watcher.loop).__module__:
        watcher.close()
    else:
        # libev can't stop the watcher any more: let it keep nothing else alive.
        watcher.callback = watcher.loop = None


def hub_calls() -> HubCalls:
    """Return the calls for this thread's hub."""
    calls: HubCalls | None = getattr(_of_thread, "calls", None)
    if calls is None or calls.hub is not get_hub():
        calls = _of_thread.calls = HubCalls()
        _of_thread.at_end = AtThreadEnd(calls.close)
    return calls


_of_thread = new_local()
