"""Greenlets that take the first step of their coroutines themselves.

A coroutine runs in the greenlet of its asyncio loop, so waiting for one takes a switch there, a
round of the loop, and a switch back. Most callbacks return without ever suspending. So a
`GuestGreenlet`, which waits for the coroutine anyway, takes the first step itself, as a guest of
the loop: while that is parked, and no other guest is in. To the coroutine nothing is different:
the loop is running, its task is the current one. What it does not finish in that step goes on in
the loop's greenlet.

A step that waits in gevent's way holds the loop, as it does there (`LoopGreenlet.switch_out`), and
what is thrown into the waiting greenlet meanwhile reaches the coroutine as its cancellation.
"""

from __future__ import annotations

import sys
from asyncio import CancelledError, Handle, Task, _get_running_loop, _set_running_loop
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from gevent import Greenlet, GreenletExit, Timeout
from greenlet import greenlet

from psofa_gevent.aio_greenlet import WAITS_FOR_ITSELF, LoopGreenlet
from psofa_gevent.aio_loop import HubLoop, hub_loop

__all__ = ["GuestGreenlet"]

T = TypeVar("T")

if TYPE_CHECKING:
    _Greenlet = Greenlet[[], None]
else:
    _Greenlet = Greenlet  # the oldest gevent's is not generic

# Past the overrides.
_switch = greenlet.switch
_get_asyncgen_hooks, _set_asyncgen_hooks = sys.get_asyncgen_hooks, sys.set_asyncgen_hooks


class GuestGreenlet(_Greenlet):
    """A greenlet that may take steps of an asyncio loop."""

    __slots__ = ("_host", "_joins")

    def __init__(self, run: Any = None) -> None:
        super().__init__(run)
        self._host: LoopGreenlet | None = None
        """That of this thread's loop, when last seen."""
        self._joins = False
        """Whether it waits for a task whose first step it took."""

    def run_coroutine(self, coro: Coroutine[Any, Any, T], context: Context | None) -> T:
        """What `psofa_gevent.aio.run_callback` promises. The caller is this greenlet."""
        host = self._host
        if (
            host is None
            or not host.parked
            or host.guest is not None
            or _get_running_loop() is not None
        ):
            return self._run_elsewhere(coro, context)
        # What `LoopGreenlet` does in `_enter` and `_leave`: each call more would be felt.
        hooks = _get_asyncgen_hooks()
        try:
            host.guest = self
            host.other_loop = None
            host.other_hooks = hooks
            _set_asyncgen_hooks(*host.hooks)
            _set_running_loop(host.loop)
            task: Task[T] = _begin(coro, loop=host.loop, context=context)
        except BaseException:
            coro.close()  # it may not have begun
            host.thrown = None
            raise
        finally:
            host.guest = None
            if host.disturbed:
                host.settle()
            else:
                try:
                    _set_running_loop(None)
                finally:
                    _set_asyncgen_hooks(*hooks)
        try:
            if host.thrown is None and task.done():
                return task.result()
            return self._join(task, host)
        finally:
            del task  # its exception and a frame that holds it would keep each other alive

    def _run_elsewhere(self, coro: Coroutine[Any, Any, T], context: Context | None) -> T:
        known, host = self._host, hub_loop().greenlet
        if host.guest is self:
            coro.close()
            raise RuntimeError(WAITS_FOR_ITSELF)
        if host is not known:  # this is the first task, or the first after a fork
            self._host = host
            return self.run_coroutine(coro, context)
        return host.loop.join(Task(coro, loop=host.loop, context=context), self)

    def _join(self, task: Task[T], host: LoopGreenlet) -> T:
        thrown, host.thrown = host.thrown, None
        self._joins = True
        try:
            return host.loop.join(task, self, thrown)
        finally:
            self._joins = False
            del task, thrown

    def is_in_step(self) -> bool:
        """Whether this greenlet is in the middle of a step."""
        return self._host is not None and self._host.guest is self

    # What gevent calls

    def switch_out(self) -> None:
        """About to wait."""
        host = self._host
        if host is not None and host.guest is self:
            host.disturbed = True
            host.switch_out()

    def switch(self, *args: Any, **kwargs: Any) -> Any:
        """What was waited for has come."""
        host = self._host
        if host is not None and host.guest is self:
            host.guest_returns()
        return _switch(self, *args, **kwargs)

    def throw(self, *args: Any) -> Any:
        """Interrupt the wait. A `gevent.Timeout` can only be the coroutine's own."""
        host = self._host
        if host is None:
            return super().throw(*args)
        if host.guest is self:
            host.guest_returns()
            thrown = _as_exception(*args)
            if not isinstance(thrown, Timeout):
                host.note_thrown(thrown)
                args = (CancelledError(),)
        elif self._joins and args and isinstance(args[0], Timeout):
            host.report_dropped(args)
            return None
        return super().throw(*args)


if sys.version_info >= (3, 12):
    _begin = partial(Task, eager_start=True)
else:

    def _begin(coro: Coroutine[Any, Any, T], *, loop: HubLoop, context: Context | None) -> Task[T]:
        """Make a task and take its first step."""
        own = copy_context() if context is None else context
        steps: list[Callable[..., object]] = []

        def call_soon(
            callback: Callable[..., object], *args: Any, context: Context | None = None
        ) -> Handle:
            if context is own:
                steps.append(callback)
                return loop.nothing_to_call
            # A finalizer's, which the garbage collector runs just now.
            return HubLoop.call_soon(loop, callback, *args, context=context)

        # The task gives its first step to its loop, where it is taken away at once.
        loop.call_soon = call_soon  # type: ignore[method-assign, assignment]  # for a moment
        try:
            task = Task(coro, loop=loop, context=own)
        finally:
            del loop.call_soon
        try:
            own.run(steps[0])
        except (KeyboardInterrupt, SystemExit):
            task.exception()  # now it is retrieved: the guest raises it
            raise
        return task


def _as_exception(
    exc: type[BaseException] | BaseException = GreenletExit, value: Any = None, _tb: object = None
) -> BaseException:
    """The exception that ``throw`` with these arguments raises."""
    if isinstance(exc, BaseException):
        return exc
    if isinstance(value, exc):
        return value
    return exc() if value is None else exc(value)
