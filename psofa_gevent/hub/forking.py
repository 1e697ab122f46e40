"""Forks: a child process lets go of all that its parent's servers and clients have.

Only the process that accepted or made a connection serves it. A child has copies of everything:
descriptors, watchers, greenlets, coroutines. If it waited in gevent's way, its hub would accept the
parent's connections and take messages out of the parent's sessions. So at the fork, in the child,
before ``os.fork`` returns there (`os.register_at_fork`; for ``os.fork``, ``gevent.os.fork`` and
``multiprocessing``):

- Watchers and timers are stopped, and duplicates of descriptors closed. Nothing is shut down, so no
  peer notices, and nobody's file is removed.
- No callback is called, and none that waits goes on: greenlets of the library never run again in
  the child. They are kept for ever, as what is collected has `GreenletExit` thrown into it, which
  runs a callback's ``finally``. So are coroutines.
- Owners look stopped, and sessions closed. `PsServer.start`, every ``connect`` and async callbacks
  work, as in any process.
- The hub goes on, with what else it has, as gevent promises. It is set up for the child here (as by
  `gevent.reinit`), whoever forked: with an event queue (epoll) and resolver threads of its own.

The greenlet in which the fork was called goes on. If that is a session's, in a callback, the
callback goes on in the child to its end, on a session that is closed, and nothing comes after it. A
coroutine goes on up to its next ``await``. (Since Python 3.14 asyncio, whose current loop and task
a fork resets, reports a `RuntimeError` at the end of that step, also without this library.)

What other greenlets of the program waited in does not return in the child: a ``wait_for``, or the
child would go on to what the parent does when it has served; a send, a request, a ``connect``, but
for those that have a time limit of gevent's, which runs out.

Other threads are not there in a child. Of their hubs nothing is touched but the descriptors: they
may have been in the middle of anything.

How it is told: each part that has such things has a method ``_let_go``, and says so to `track`, or
makes its watchers with `watch`. All of it runs in the only thread of the child, and must not
switch.
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
    """Something that a child has a copy of, and lets go of."""

    def _let_go(self, hub: Hub | None) -> None:
        """Let go, in a child, at the fork. Does not switch. It may have been done before.

        Args:
            hub: that of the thread that the child has; ``None``: it has none. Nothing of another
                hub may be touched.
        """


_functions: list[Callable[[], object]] = []
_tracked: WeakSet[Any] = WeakSet()
_kept: list[object] = []
left_behind: set[object] = set()
"""The greenlets that were the parent's, and never run again. Empty in who was not forked."""
_woken: set[object] = set()
"""Those that something has tried to wake."""


# The original: in a patched process threading.local is about greenlets.
_of_thread: Any = monkey.get_original("threading", "local")()
"""Its ``watchers``, a set, are those of one OS thread, and go with it."""


def track(thing: Forked) -> None:
    """Have its ``_let_go`` called in each child, as long as it is there."""
    _tracked.add(thing)


def in_child(function: F) -> F:
    """Call a module's function in each child, before any ``_let_go``."""
    _functions.append(function)
    return function


def watch(watcher: Any) -> Any:
    """Stop that watcher, or timer, in a child; to be ended by `unwatch`, in the same thread."""
    try:
        _of_thread.watchers.add(watcher)
    except AttributeError:
        _of_thread.watchers = {watcher}
    return watcher


def unwatch(watcher: Any) -> None:
    """Stop and close a watcher, if there is one.

    Without effect in a child for one of the parent's, of which a frame from before the fork ends.
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
        # A signal's handler has forked there: it may be in the middle of telling of this very one.
        current.loop.run_callback(_release, watcher)
    else:
        _release(watcher)


def _release(watcher: Any) -> None:
    watcher.stop()
    watcher.close()


def keep(*things: object) -> None:
    """Never collect these, not at the end of the process either."""
    _kept.extend(things)


def leave_behind(greenlet: Any) -> None:
    """Let a greenlet of the parent never run again, unless it, or one below it, runs just now."""
    running: Any = getcurrent()
    while running:  # the main greenlet has no parent
        if running is greenlet:
            return
        running = running.parent
    left_behind.add(greenlet)


def not_woken(greenlet: Any) -> None:
    """Something wakes a greenlet that was left behind: what does so again and again is stopped.

    That is the watcher of a socket of the program's own, on which a callback waited. It would have
    been stopped where the greenlet goes on. Until then the hub would spin, from the end of the
    socket's peer on.
    """
    if greenlet not in _woken:
        _woken.add(greenlet)  # only timers do so once; to look for a watcher takes some time
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
        # First: on libuv what is stopped now would be taken out of the parent's epoll.
        hub.loop.reinit()
    steps: list[Callable[[], object]] = [partial(_let_go_of_watchers, hub), *_functions]
    steps += [partial(thing._let_go, hub) for thing in list(_tracked)]  # noqa: SLF001 - `Forked`
    steps.append(_never_collect)
    if hub is not None:
        # Its resolver's threads are not there: it would wait for them for ever.
        steps.append(partial(gevent.reinit, hub))
    errors: list[BaseException] = []
    for step in steps:
        try:
            step()
        except BaseException as exc:  # also by a signal: it must not keep the others from it
            errors.append(exc)
    if errors:
        # Python tells of it on stderr. The log may be in the middle of a record just now.
        raise BaseExceptionGroup("psofa_gevent failed to let go after a fork", errors)


def _let_go_of_watchers(hub: Hub | None) -> None:
    watchers: set[Any] = getattr(_of_thread, "watchers", set())
    for watcher in watchers:
        # Not that of a hub that was destroyed. On libuv those of descriptors do not tell.
        if hub is not None and getattr(watcher, "loop", hub.loop) is hub.loop:
            release(watcher)
    keep(*watchers)
    watchers.clear()


def _never_collect() -> None:
    keep(*left_behind)
    if HAS_CTYPES:  # else they are collected at the end of the process
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))


os.register_at_fork(after_in_child=_let_go)
