"""What other OS threads ask of a hub: a list of calls, and one watcher that wakes the hub for it.

Nothing else of a hub's loop is touched in a thread that is not the hub's. gevent's own
``run_callback_threadsafe`` does more there than libev and libuv allow:

- On libev it counts a reference of the loop up, under the GIL, while the loop counts others down
  without it: that of each timer that fires, for one. After some 300,000 calls beside gevent's
  timers the count is wrong, and the hub ends under a running server, or never.
- On libuv it starts a check watcher. Two threads that do so at once tie a knot into the loop's list
  of them, and the process crashes or hangs.

To send to an ``async_`` watcher is what both loops let other threads do (``ev_async_send``,
``uv_async_send``). This one does not keep the hub alive (``ref=False``): nothing is to be counted.

When calls are run, and when not:

- In the hub, in the order in which they were added, and at once: sending wakes it. Before all else
  that it has found to do by then, on libuv in their order among its callbacks. A hub with sessions
  looks for them at the end of each round, too (`psofa_gevent.hub.ready`): what its own thread
  begins after a call of another thread has returned is not run before that.
- Those that are there when the hub comes to them, in one go. What is added meanwhile waits for the
  hub's next round: neither calls that add calls nor threads that never stop starve anything. What a
  call raises is handled like what a callback of gevent's hub raises, and the next one is run.
- Also where nothing else keeps the hub alive, if they are there before it begins to wait: what they
  lead to decides whether that is a `LoopExit`. The hub does not wait for calls that may come later:
  whoever waits for one keeps the hub alive by a timer or a watcher. (On libev, a call that is added
  while the very last thing that kept the hub alive is just ending counts as one that comes later.)
- Never, when the hub was destroyed or its thread has ended. Nor in a child process, if they were
  added before the fork.
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
        """Those that have not been run: while there are any, `run` has something to do."""
        self._begin()
        track(self)

    def _begin(self) -> None:
        self._is_due = False
        """Whether `run` is among the callbacks of the loop."""
        self._lock = new_lock()
        """Held for sending, and for closing: libuv does not check what it is given."""
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
        """Whether nothing will be run any more: the hub was destroyed, or its thread has ended."""
        # A destroyed loop points nowhere; one that outlives its hub serves the next one.
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
            # The hub has just been destroyed, or must start the watcher first (see `run`), which
            # it does within 0.3 s: so often gevent wakes libuv, to look for signals.
            if self._uv_callbacks is None and not self.is_over():
                raise

    def run(self) -> None:
        """Run what is there. In the hub; a call may switch to a greenlet, and go on afterwards."""
        self._is_due = False  # before the look: what comes later is due again
        if self.is_over():
            return
        if self._watcher.callback is None:
            # gevent on libuv stops a watcher out of whose callback something is raised: a signal's
            # handler may do so at any line, in gevent's own code around it, too.
            self._watcher.start(self.run)
        waiting = self.waiting
        try:
            # No signal can come in between the taking of a call and the call: it would be lost.
            for function, args, kwargs in islice(iter(waiting.popleft, None), len(waiting)):
                try:
                    function(*args, **kwargs)
                except BaseException:
                    # Raises, if the hub was destroyed by it.
                    self.hub.handle_error(function, *sys.exc_info())
        except IndexError:
            pass  # dropped meanwhile: a fork, or the end
        finally:
            if waiting and not self.is_over():
                self._wake_hub()

    def close(self) -> None:
        """Release the watcher: in its thread, when that ends or has another hub."""
        with self._lock:
            self._is_closed = True
            self.waiting.clear()
            close_watcher(self._watcher)

    def _let_go(self, hub: object) -> None:
        """Begin anew in the child, where no other thread is, nor what those were about to do.

        The watcher stays as it is, started: on libuv it may be in the middle of a send for ever.
        """
        self.waiting.clear()
        if hub is self.hub and not self.is_over():
            self._begin()
        else:
            self._lock = new_lock()
            self._is_closed = True


def _uv_callbacks(loop: Any) -> deque[Any] | None:
    """What libuv's loop looks at where nothing keeps it alive, other than at watchers."""
    return loop._callbacks if "libuv" in type(loop).__module__ else None  # noqa: SLF001 - see `HubCalls`


def close_watcher(watcher: Any) -> None:
    """Close a watcher in its thread, also one whose loop was destroyed."""
    if watcher.loop.ptr or "libuv" in type(watcher.loop).__module__:
        watcher.close()
    else:
        # libev can't stop what keeps it alive any more: let it keep nothing else.
        watcher.callback = watcher.loop = None


def hub_calls() -> HubCalls:
    """The calls for this thread's hub."""
    calls: HubCalls | None = getattr(_of_thread, "calls", None)
    if calls is None or calls.hub is not get_hub():
        calls = _of_thread.calls = HubCalls()
        _of_thread.at_end = AtThreadEnd(calls.close)
    return calls


_of_thread = new_local()
