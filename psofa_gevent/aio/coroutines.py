"""The asyncio bridge: one asyncio event loop per gevent hub, run by the hub itself.

Any number of greenlets may run coroutines at the same time, as tasks of the one loop of their hub,
and coroutines may wait for greenlets. To a coroutine the loop is an ordinary selector event loop.
To the hub it is one greenlet that waits for descriptors, for a timer, or to be woken.

Which greenlet runs what:

- Every step of every task, and every callback of the loop, runs in the loop's own greenlet
  (`LoopGreenlet`). Outside of such a step asyncio sees no running loop, so in a patched process
  ``asyncio.run`` works in another greenlet at the same time.
- A step that waits through gevent (``gevent.sleep``, a sync ``send``, a blocking library in a
  patched process) holds the loop: other coroutines wait until the step goes on, other greenlets
  run. ``asyncio.timeout`` can't interrupt such a wait; a ``gevent.Timeout`` in the coroutine can,
  and a kill of the greenlet that waits for the task. A ``gevent.Timeout`` around an ``await`` has
  no effect: it is dropped, and reported to the loop's exception handler. A step that blocks the
  thread blocks everything.

``asyncio.to_thread`` uses OS threads, or greenlets where ``threading`` is patched: then a function
that blocks in C blocks everything. To run ``f`` in an OS thread even then:
``await await_greenlet(gevent.spawn(get_hub().threadpool.apply, f))``.

Why this loop and not the ``asyncio-gevent`` package (0.2.5): its helpers run a coroutine on the
running loop that they find, or else on a new loop. If two greenlets use them at once, the result is
"attached to a different loop", "no running event loop", or a hang when the loop that the second
greenlet found ends with the coroutine of the first; users of the package report the same. Each call
leaves a loop behind, with two descriptors, and the package depends on an event loop policy, which
Python is giving up. With one loop of its class for all greenlets, kept running and called by
``call_soon_threadsafe``, coroutines run concurrently, but each wake-up goes through a pipe. The
table has the CPU time, in µs, of a coroutine that returns at once: with 100 greenlets that each run
one coroutine after the other, and with a single greenlet (CPython 3.11 and 3.13, gevent 26.9 on
libev):

============================================  ============  ============
                                              100 at once   one alone
============================================  ============  ============
`run_task`                                     3.7, 3.5      9, 10
``asyncio_gevent.EventLoop``, kept running     16, 18         115, 135
``asyncio_gevent.async_to_sync``               fails          450, 530
============================================  ============  ============

The difference has four reasons: the hub's own list of callbacks wakes the loop, without a pipe;
watchers are kept; all coroutines that wait to begin do so together, without a round of the loop
(`psofa_gevent.aio.run`); and a task that finishes wakes the waiting greenlet at once, not in the
loop's next round.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from collections.abc import Awaitable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import Any, TypeVar

import gevent
from gevent import Greenlet, getcurrent
from greenlet import greenlet

from psofa_gevent.aio.loop import HubLoop, hub_loop
from psofa_gevent.aio.run import Run
from psofa_gevent.hub.greenlets import in_coroutine
from psofa_gevent.hub.thread import resolve
from psofa_gevent.hub.times import SHORTEST_TIMER

__all__ = [
    "await_greenlet",
    "greenlet_that_waits",
    "hub_loop",
    "run_coroutine",
    "run_task",
    "spawn_coroutine",
]

T = TypeVar("T")


def run_coroutine(coro: Awaitable[T], timeout: float | None = None) -> T:
    """Run a coroutine on the asyncio loop of this thread's hub, and wait for its result.

    Any number of greenlets may call it at once, in any thread that has a hub. The caller waits
    cooperatively, so other greenlets go on. The coroutine sees a copy of the caller's context
    variables.

    When the caller is killed, or gets a ``gevent.Timeout``, the task is cancelled, and the caller
    still waits until the task has ended, so that nothing is left running. Each further kill cancels
    the task again.

    Args:
        coro: A coroutine, or another awaitable.
        timeout: Seconds after which the task is cancelled; None for no limit.

    Raises:
        TimeoutError: the timeout has passed. Raised when the task has ended, so maybe later.
        asyncio.CancelledError: other code has cancelled the task.
        RuntimeError: the caller is the hub, or a coroutine or callback of this same loop, which
            would wait for itself forever (use ``await`` there).
        BaseException: whatever the coroutine raised.
    """
    if timeout is None:
        return run_task(_as_coroutine(coro))
    limit = gevent.Timeout(max(timeout, SHORTEST_TIMER))
    try:
        with limit:
            try:
                return run_task(_as_coroutine(coro))
            except gevent.Timeout as expired:
                if expired is not limit:
                    raise
            raise TimeoutError(f"the coroutine did not end within {timeout:g} s")
    finally:
        del limit  # with its traceback it would keep this frame and those of the callers alive


def spawn_coroutine(coro: Awaitable[T], name: str | None = None) -> Greenlet[..., T]:
    """Run a coroutine in the background; returns at once.

    The coroutine sees a copy of the caller's context variables, as they are now.

    Args:
        coro: A coroutine, or another awaitable.
        name: The name of the greenlet and of the task.

    Returns:
        An ordinary greenlet, for ``get``, ``join``, ``link``, ``gevent.wait`` and pools; ``kill``
        cancels the task and waits until it has ended. As with any greenlet, the hub prints an
        exception that the coroutine raises.
    """
    coro = _as_coroutine(coro)
    spawned: Greenlet[..., T] = Greenlet(run_task, coro, context=copy_context(), name=name)
    if name is not None:
        spawned.name = name
    # A greenlet that is killed before it has begun never awaits its coroutine.
    spawned.rawlink(lambda _: coro.close())
    spawned.start()
    return spawned


async def await_greenlet(greenlet: Greenlet[..., T]) -> T:
    """Wait in a coroutine for a greenlet, and start the greenlet if it was not started.

    Cancelling the awaiting task kills the greenlet and waits until it has ended, just as killing a
    greenlet in `run_coroutine` cancels its task. To let the greenlet go on, use
    ``await asyncio.shield(await_greenlet(greenlet))``.

    Returns:
        The result of ``greenlet.get()``: for a killed greenlet that is a `GreenletExit`.

    Raises:
        RuntimeError: not awaited on the loop of the greenlet's hub (`run_coroutine`).
        BaseException: whatever the greenlet raised.
    """
    loop = asyncio.get_running_loop()
    if not isinstance(loop, HubLoop) or greenlet.loop is not loop.hub.loop:
        raise RuntimeError(
            f"await_greenlet({greenlet!r}) runs on {loop!r}: only run_coroutine, in the greenlet's "
            "own thread, brings the two together"
        )
    if not greenlet.started and not greenlet.ready():
        greenlet.start()
    cancelled: CancelledError | None = None
    while not greenlet.ready():
        ended = loop.create_future()
        link = partial(_end, ended)
        greenlet.rawlink(link)
        try:
            await ended
        except CancelledError as exc:
            greenlet.unlink(link)
            greenlet.kill(block=False)
            cancelled = exc
    try:
        if cancelled is not None and greenlet.successful():
            raise cancelled
        return greenlet.get(block=False)
    finally:
        del cancelled  # with its traceback it would keep this frame alive


def greenlet_that_waits(task: asyncio.Task[Any]) -> greenlet | None:
    """The greenlet of this thread that waits for `task` through gevent, if one does."""
    loop = task.get_loop()
    return loop.greenlet.greenlet_that_waits(task) if isinstance(loop, HubLoop) else None


def run_task(
    coro: Coroutine[Any, Any, T],
    *,
    context: Context | None = None,
    name: str | None = None,
    in_turn: bool = False,
) -> T:
    """Run `coro` as a task of the hub's loop and wait for it: the core of `run_coroutine`.

    Each exception that is thrown into the waiting greenlet cancels the task again. It is raised
    when the task has ended, unless the task raised an exception itself. If several were thrown, the
    first kill (or `KeyboardInterrupt`, `SystemExit`) is raised, or else the last exception.

    A task that has not begun begins before it is cancelled. A task that is held in the middle of a
    step (it waits through gevent) is interrupted where it waits.

    Args:
        coro: A coroutine. It is closed when it can't be run.
        context: The context to run in; by default a copy of the caller's.
        name: The name of the task.
        in_turn: For callers that wait for something else next, as sessions do for bytes: the
            coroutine begins after the sessions in the run queue, and the hub runs only then.

    Raises:
        RuntimeError: as `run_coroutine`.
        BaseException: whatever the task raised, also `KeyboardInterrupt` and `SystemExit`, which
            the caller must pass on to the main greenlet.
    """
    loop = hub_loop()
    current = getcurrent()
    # This quick check is enough for ordinary greenlets; the main greenlet has no parent.
    if current.parent is not loop.hub or current is loop.greenlet:
        try:
            _check_caller(current, loop)
        except RuntimeError:
            coro.close()
            raise
    return Run(loop.greenlet, coro, current, context, name).wait(in_turn=in_turn)


def _check_caller(current: greenlet, loop: HubLoop) -> None:
    if current is loop.hub:
        raise RuntimeError("the hub can't wait for a coroutine: gevent.spawn a greenlet that does")
    if in_coroutine():
        raise RuntimeError(
            "a coroutine can't wait for another one of its own loop in gevent's way: await it"
        )


def _as_coroutine(awaitable: Awaitable[T]) -> Coroutine[Any, Any, T]:
    return awaitable if asyncio.iscoroutine(awaitable) else _await(awaitable)


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _end(future: asyncio.Future[None], _greenlet: object) -> None:
    resolve(future, None)
