"""Forks: a child process lets go of everything that belongs to its parent's servers and clients.

Only the process that accepted or made a connection serves it. A child has copies of everything:
descriptors, watchers, greenlets, coroutines. If it waited through gevent, its hub would accept the
parent's connections and take messages out of the parent's sessions. So the following happens at the
fork, in the child, before ``os.fork`` returns there (`os.register_at_fork`; for ``os.fork``,
``gevent.os.fork`` and ``multiprocessing``):

- Watchers and timers are stopped, and duplicates of descriptors closed. Nothing is shut down, so no
  peer notices, and no file is removed.
- No callback is called, and no callback that waits goes on: greenlets of the library never run
  again in the child. They are kept for ever, because Python throws `GreenletExit` into a greenlet
  that is collected, which would run a callback's ``finally``. Coroutines are kept for ever, too.
- Owners look stopped, and sessions closed. `PsServer.start`, every ``connect`` and async callbacks
  work, as in any process.
- The hub goes on, with everything else that it has, as gevent promises. This part sets it up for
  the child (as `gevent.reinit` does), whichever function forked: with its own event queue (epoll)
  and its own resolver threads.

The greenlet that called the fork goes on. If it is a session's, in a callback, the callback goes on
to its end in the child, on a closed session, and no other callback follows. A coroutine goes on up
to its next ``await``. (Since Python 3.14 asyncio, whose current loop and task a fork resets,
reports a `RuntimeError` at the end of that step, even without this library.)

Calls in which other greenlets of the program waited do not return in the child. A ``wait_for`` does
not, or the child would go on with the parent's work after serving. A send, a request or a
``connect`` does not, unless it has a time limit of gevent, which runs out.

Other threads do not exist in a child. Only the descriptors of their hubs are touched: these threads
may have been in the middle of anything.

Each part that must let go has a method ``_let_go``, and registers with `track`, or makes its
watchers with `watch`. All of it runs in the only thread of the child, and must not switch.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import gevent
from gevent import getcurrent, monkey
from gevent._hub_local import get_hub_if_exists  # there is no public way to ask without making one
from gevent.hub import Hub, Waiter

try:
    import ctypes
except ImportError:
    HAS_CTYPES = False  # a Python that was built without libffi
else:
    HAS_CTYPES = True

__all__ = [
    "in_child",
    "keep",
    "leave_behind",
    "left_behind",
    "not_woken",
    "release",
    "track",
    "unwatch",
    "watch",
]

F = TypeVar("F", bound=Callable[..., object])


class Forked(Protocol):
    """An object of which a child has a copy, and lets go."""

    def _let_go(self, hub: Hub | None) -> None:
        """Let go, in a child, at the fork. Does not switch. May be called more than once.

        Args:
            hub: the hub of the child's only thread; ``None``: that thread has no hub. Do not touch
                anything of another hub.
        """


_functions: list[Callable[[], object]] = []
_tracked: WeakSet[Any] = WeakSet()
_kept: list[object] = []
left_behind: set[object] = set()
"""The greenlets that were the parent's, and never run again. Empty in the first process."""
_woken: set[object] = set()
"""The greenlets among them that something has tried to wake."""


# The original: in a patched process threading.local works on greenlets.
_of_thread: Any = monkey.get_original("threading", "local")()
"""Its attribute ``watchers`` is the set of one OS thread's watchers, and ends with the thread."""


def track(thing: Forked) -> None:
    """Have the ``_let_go`` of `thing` called in each child. Holds only a weak reference to it."""
    _tracked.add(thing)


def in_child(function: F) -> F:
    """Have a module's function called in each child, before any ``_let_go``. A decorator."""
    _functions.append(function)
    return function


def watch(watcher: Any) -> Any:
    """Have a watcher or timer stopped in each child. End it by `unwatch`, in the same thread."""
    try:
        _of_thread.watchers.add(watcher)
    except AttributeError:
        _of_thread.watchers = {watcher}
    return watcher


def unwatch(watcher: Any) -> None:
    """Stop and close a watcher, if it is not ``None``.

    Has no effect in a child on a watcher of the parent's: a frame from before the fork, which ends
    in the child, may call this.
    """
    watchers: set[Any] = getattr(_of_thread, "watchers", set())
    if watcher is not None and watcher in watchers:
        watchers.discard(watcher)
        watcher.stop()
        watcher.close()


def release(watcher: Any) -> None:
    """Stop and close a watcher of the child's hub, in a ``_let_go``."""
    current: Any = getcurrent()
    if isinstance(current, Hub):
        # A signal handler has forked in the hub, which may be in the middle of this very watcher's
        # callback.
        current.loop.run_callback(_release, watcher)
    else:
        _release(watcher)


def _release(watcher: Any) -> None:
    watcher.stop()
    watcher.close()


def keep(*things: object) -> None:
    """Never collect these objects, not even at the end of the process."""
    _kept.extend(things)


def leave_behind(greenlet: Any) -> None:
    """Never run a greenlet of the parent again, unless it, or a child of it, is running now."""
    running: Any = getcurrent()
    while running:  # the main greenlet has no parent
        if running is greenlet:
            return
        running = running.parent
    left_behind.add(greenlet)


def not_woken(greenlet: Any) -> None:
    """Note that something wakes a greenlet that was left behind; stop what does so repeatedly.

    That is a watcher of one of the program's sockets, on which a callback waited. The greenlet
    would stop it after the wait, but never does. So once the peer of that socket has ended, the hub
    would spin.
    """
    if greenlet not in _woken:
        _woken.add(greenlet)  # a timer wakes only once, and the search for a watcher takes time
        return
    waiters = [found for found in gc.get_referrers(greenlet) if isinstance(found, Waiter)]
    arguments = [found for found in gc.get_referrers(*waiters) if type(found) is tuple]
    for found in gc.get_referrers(*arguments):
        is_watcher = type(found).__module__.startswith(("gevent.libev", "gevent.libuv"))
        if is_watcher and any(found.args is each for each in arguments):
            found.stop()


def _let_go() -> None:
    hub: Any = get_hub_if_exists()
    if hub is not None and hub.loop is None:
        hub = None  # it was destroyed
    if hub is not None:
        # First of all: on libuv, stopping a watcher before this would take it out of the parent's
        # epoll.
        hub.loop.reinit()
    steps: list[Callable[[], object]] = [partial(_let_go_of_watchers, hub), *_functions]
    steps += [partial(thing._let_go, hub) for thing in list(_tracked)]  # noqa: SLF001 - `Forked`
    steps.append(_never_collect)
    if hub is not None:
        # The threads of its resolver do not exist here: it would wait for them for ever.
        steps.append(partial(gevent.reinit, hub))
    errors: list[BaseException] = []
    for step in steps:
        try:
            step()
        except BaseException as exc:  # a signal handler's, too: the other steps must still run
            errors.append(exc)
    if errors:
        # Python reports it on stderr. The log may be in the middle of a record now.
        raise BaseExceptionGroup("psofa_gevent failed to let go after a fork", errors)


def _let_go_of_watchers(hub: Hub | None) -> None:
    watchers: set[Any] = getattr(_of_thread, "watchers", set())
    for watcher in watchers:
        # Not the watcher of a hub that was destroyed. On libuv io watchers have no loop attribute.
        if hub is not None and getattr(watcher, "loop", hub.loop) is hub.loop:
            release(watcher)
    keep(*watchers)
    watchers.clear()


def _never_collect() -> None:
    keep(*left_behind)
    if HAS_CTYPES:  # without it they are collected at the end of the process
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))


os.register_at_fork(after_in_child=_let_go)
