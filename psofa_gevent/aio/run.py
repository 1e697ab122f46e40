"""The run: one coroutine that a greenlet runs on the asyncio loop of its hub, and waits for.

A `Run` begins in the loop's greenlet, which takes the first step of its task at once, as an eager
task where Python has them. Most coroutines end in that step; the others go on in the loop's rounds.
When the task ends, the waiting greenlet is put into the run queue at that moment. Many runs that
wait to begin do so one after the other.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from asyncio import Handle, Task
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gevent import GreenletExit

if TYPE_CHECKING:
    from greenlet import greenlet

    from psofa_gevent.aio.base import BaseHubLoop
    from psofa_gevent.aio.greenlet import LoopGreenlet

__all__ = ["Run"]

T = TypeVar("T")

_new_task: Any = Task.__new__

ENDINGS = (GreenletExit, KeyboardInterrupt, SystemExit)
"""The exceptions that a waiting greenlet raises, whatever is thrown into it after them."""


class Run(Generic[T]):
    """A coroutine, its task, and the greenlet that waits. All methods: in the hub's thread."""

    __slots__ = (
        "_context",
        "_coro",
        "_failure",
        "_loop_greenlet",
        "_name",
        "greenlet",
        "has_ended",
        "is_cancelled",
        "task",
        "waiting_since",
    )

    def __init__(
        self,
        loop_greenlet: LoopGreenlet,
        coro: Coroutine[Any, Any, T],
        current: greenlet,
        context: Context | None,
        name: str | None,
    ) -> None:
        self._loop_greenlet = loop_greenlet
        self._coro = coro
        self._context = copy_context() if context is None else context
        self._name = name
        self._failure: BaseException | None = None
        self.task: Task[T] | None = None
        """The task; None: the coroutine has not begun."""
        self.is_cancelled = False
        """Whether to cancel the task when it has begun."""
        self.has_ended = False
        # The protocol `Ready` of `psofa_gevent.hub.ready`:
        self.greenlet = current
        self.waiting_since = 0.0

    def __repr__(self) -> str:
        # A task forgets its coroutine when that ends in an eager first step.
        coro = self._coro
        code = getattr(coro, "cr_code", None)
        where = "" if code is None else f", defined at {code.co_filename}:{code.co_firstlineno}"
        name = None if self.task is None else self.task.get_name()
        return f"<Task name={name!r} coro=<{getattr(coro, '__qualname__', coro)}(){where}>>"

    def wait(self, *, in_turn: bool = False) -> T:
        """Begin soon, and wait for the end. Switches. To be called in the waiting greenlet.

        Args:
            in_turn: whether to begin before the hub runs (`LoopGreenlet.begin_in_turn`).

        Returns:
            The result of the coroutine.

        Raises:
            BaseException: the coroutine's exception, or one that was thrown into the greenlet.
        """
        loop_greenlet = self._loop_greenlet
        thrown: BaseException | None = None
        try:
            if in_turn:
                loop_greenlet.begin_in_turn(self)
            else:
                loop_greenlet.begin(self)
            while not self.has_ended:
                self.waiting_since = 1.0
                try:
                    if in_turn:
                        loop_greenlet.run_queue.switch_on()
                    else:
                        loop_greenlet.hub.switch()
                except BaseException as exc:
                    if not isinstance(thrown, ENDINGS):
                        thrown = exc
                    loop_greenlet.cancel(self)
                finally:
                    self.waiting_since = 0.0
            if self._failure is not None:
                raise self._failure
            task = self.task
            assert task is not None
            if thrown is not None and (task.cancelled() or task.exception() is None):
                raise thrown
            return task.result()
        finally:
            # An exception and the frame that holds it, or its task, would keep each other alive.
            self._failure = None
            del thrown, self
            task = None

    def begin(self) -> bool:
        """Take the first step. In the loop's greenlet, outside of the loop's own steps.

        Returns:
            Whether the coroutine has ended. If not, `end_task` wakes its greenlet later.

        Raises:
            KeyboardInterrupt: a signal came outside of the coroutine. (Or what its handler raises.)
        """
        task = self.task = _new_task(Task)
        try:
            _begin(task, self._coro, self._loop_greenlet.aio_loop, self._name, self._context)
        except BaseException as exc:
            if not self._is_the_coroutines(exc):
                self._goes_on(task)
                raise
            self.has_ended = True
        else:
            if task.done():
                self.has_ended = True
            else:
                self._goes_on(task)
        finally:
            has_ended = self.has_ended
            # The coroutine's frame, or an exception with that frame, may keep this frame alive.
            del self, task
        return has_ended

    def _goes_on(self, task: Task[T]) -> None:
        self.waits()
        self._loop_greenlet.runs[task] = self
        task.add_done_callback(self)
        if self.is_cancelled:
            task.cancel()

    def waits(self) -> None:
        """Tell the greenlet that it waits, as its coroutine does. Does not switch."""
        # gevent calls switch_out only when the greenlet switches to the hub itself.
        switch_out = getattr(self.greenlet, "switch_out", None)
        if switch_out is not None:
            switch_out()

    def _is_the_coroutines(self, exc: BaseException) -> bool:
        """Whether only the waiting greenlet must raise `exc`."""
        if not _is_begun(self._coro):
            # No task could be made of the coroutine, or a signal came before its first step.
            self._failure = exc
            return True
        task = self.task
        return task is not None and task.done() and task.exception() is exc

    def __call__(self, _task: Task[T]) -> None:
        """The task's done callback."""
        self.end_task()

    def end_task(self) -> None:
        """Put the waiting greenlet into the run queue. Called as the task ends.

        `HubLoop.call_soon` calls it, without a further round of the loop.
        """
        task = self.task
        assert task is not None
        del self._loop_greenlet.runs[task]
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._loop_greenlet.claim(exc)
        self.has_ended = True
        run_queue = self._loop_greenlet.run_queue
        run_queue.add([self])
        run_queue.run_soon()

    def drop(self) -> None:
        """Close the coroutine, which will never begin: the loop has ended."""
        self._coro.close()

    def stop_watching(self) -> None:
        """Do nothing: the greenlet was thrown out of its wait, and is not ready any more."""


def _is_begun(coro: object) -> bool:
    if not asyncio.iscoroutine(coro):
        return False
    try:
        return inspect.getcoroutinestate(coro) != inspect.CORO_CREATED
    except AttributeError:  # a compiled coroutine, which does not tell its state
        return True


if sys.version_info >= (3, 12):

    def _begin(
        task: Task[T],
        coro: Coroutine[Any, Any, T],
        loop: BaseHubLoop,
        name: str | None,
        context: Context,
    ) -> None:
        """Initialise `task` and take its first step."""
        try:
            Task.__init__(task, coro, loop=loop, name=name, context=context, eager_start=True)
        finally:
            del task  # as in `Run.begin`

else:

    def _begin(
        task: Task[T],
        coro: Coroutine[Any, Any, T],
        loop: BaseHubLoop,
        name: str | None,
        context: Context,
    ) -> None:
        """Initialise `task` and take its first step."""
        steps: list[Callable[..., object]] = []
        own = context

        def call_soon(
            callback: Callable[..., object], *args: Any, context: Context | None = None
        ) -> Handle:
            if context is own:
                steps.append(callback)
                return loop.nothing_to_call
            # A call by a finalizer that the garbage collector runs just now.
            return type(loop).call_soon(loop, callback, *args, context=context)

        # The task gives its first step to the loop, where this function takes it at once.
        loop.call_soon = call_soon  # type: ignore[method-assign, assignment]  # for a moment
        try:
            Task.__init__(task, coro, loop=loop, name=name, context=own)
        finally:
            del loop.call_soon, task  # as in `Run.begin`
        own.run(steps.pop())
