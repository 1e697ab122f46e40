"""The greenlet in which the asyncio loop of a hub runs.

At any time it runs, is parked (in the selector, between two rounds of the loop), or is held (a step
of a task waits through gevent). The parking ends only by a wake of the loop (`LoopGreenlet.wake`,
`LoopGreenlet.unpark`), for a coroutine that is to begin (`LoopGreenlet.begin`,
`LoopGreenlet.begin_in_turn`), or in `LoopGreenlet.end`. Only the event that the step waits for, or
an exception thrown into the step, ends the holding: a stale wake must never switch into a step that
waits for something else.

In `LoopGreenlet.park`, all coroutines that wait to begin take their first steps together, without a
round of the loop, which many coroutines do not need (`psofa_gevent.aio.run`).

While the greenlet is switched out, it hides the loop from its thread: the running loop, the current
task and the hooks for async generators are those from before it was switched to. Parking restores
them itself. A step that waits goes through gevent's ``Hub.switch``, which calls
`LoopGreenlet.switch_out`; it is resumed and interrupted by the methods of this class.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import AbstractEventLoop, CancelledError, Task
from asyncio.log import logger as asyncio_logger
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from gevent import GreenletExit, getcurrent
from greenlet import greenlet

from psofa_gevent.hub.calls import close_watcher
from psofa_gevent.hub.forking import keep, leave_behind, left_behind, not_woken, release
from psofa_gevent.hub.greenlets import StepGreenlet
from psofa_gevent.hub.ready import Ready, ready_sessions

if TYPE_CHECKING:
    from gevent.hub import Hub

    from psofa_gevent.aio.base import BaseHubLoop

__all__ = ["LoopGreenlet"]

CLAIM_SECONDS = 0.1
"""Seconds for which a `KeyboardInterrupt` of a task may be passed on from task to task.

It concerns tasks that no greenlet waits for. Tasks that await such a task raise the exception
again, a `TaskGroup` once its other tasks have ended. If it reaches a waiting greenlet within this
time, that greenlet gets it, otherwise the main greenlet.
"""

# Bypasses ``Hub.switch`` and the overrides below, whose work `LoopGreenlet.park` does itself.
_switch = greenlet.switch


class Beginning(Ready, Protocol):
    """A coroutine that begins in the loop's greenlet: a `psofa_gevent.aio.run.Run`."""

    is_cancelled: bool

    @property
    def task(self) -> Task[Any] | None:
        """The task; None: the coroutine has not begun."""

    def begin(self) -> bool:
        """Take the first step. Returns whether the coroutine has ended in it."""

    def waits(self) -> None:
        """Tell the greenlet of this run that it waits. Does not switch."""

    def drop(self) -> None:
        """Close the coroutine, which will never begin."""


class LoopGreenlet(StepGreenlet):
    """Runs a `psofa_gevent.aio.loop.HubLoop`, and hides it while it is switched out."""

    # Slots are found faster than the entries of a dictionary, several times for each coroutine.
    __slots__ = (
        "_beginning",
        "_begins",
        "_claimed",
        "_ended",
        "_ending",
        "_has_let_go",
        "_held",
        "_held_task",
        "_hooks",
        "_is_queued",
        "_keep_alive",
        "_keeps_alive",
        "_other_hooks",
        "_other_loop",
        "_other_task",
        "_to_cancel",
        "_unclaimed",
        "_wake",
        "_woken",
        "aio_loop",
        "hub",
        "parked",
        "run_queue",
        "runs",
    )

    def __init__(self, loop: BaseHubLoop, hub: Hub) -> None:
        super().__init__(None, hub)
        self.aio_loop = loop
        self.hub = hub
        self.parked = False
        self.run_queue = ready_sessions()
        self.runs: dict[Task[Any], Beginning] = {}
        """The runs that did not end in their first step, until they end."""
        self._beginning: deque[Beginning] = deque()
        """The runs that wait to begin."""
        self._begins: Beginning | None = None
        """The run that takes its first step just now."""
        self._is_queued = False
        """Whether this greenlet is in the run queue, to let coroutines begin."""
        self._ended: list[Beginning] = []
        """Runs that have just ended in their first steps; their greenlets are not yet in the run
        queue. They get there when all runs have begun, or when a step waits."""
        self._woken: bool = False
        """Whether the loop needs a round: there is more to do than to let coroutines begin."""
        self._held = False
        self._held_task: Task[Any] | None = None
        self._to_cancel: set[Task[Any]] = set()
        self._ending = False
        self._has_let_go = False
        # The state of the loop that ran before this one, if any: an asyncio.run in another greenlet
        self._other_loop: AbstractEventLoop | None = None
        self._other_task: Task[Any] | None = None
        self._other_hooks = sys.get_asyncgen_hooks()
        self._hooks: tuple[Any, ...] | None = None
        self._claimed: BaseException | None = None
        self._unclaimed: BaseException | None = None
        self._keep_alive: Any = hub.loop.async_(ref=False)
        self._keep_alive.start(_do_nothing)
        self._keeps_alive = False
        self._wake = hub.loop.run_callback(self.switch)

    def run(self) -> None:
        """Run the loop until `end`, whatever happens in it."""
        self._enter()
        try:
            while not self.aio_loop.is_closed():
                asyncio._set_running_loop(None)
                try:
                    self.aio_loop.run_forever()
                except (KeyboardInterrupt, SystemExit) as exc:
                    self._interrupted(exc)
        except GreenletExit:
            if not self._ending:
                raise
        finally:
            self._leave()

    def end(self) -> None:
        """End this greenlet. To be called in its thread, when nothing can wake it any more."""
        self._ending = True
        self._wake.stop()
        while self._beginning:
            self._beginning.popleft().drop()
        if not self.dead:
            self.parent = getcurrent()  # the hub may be gone
            if self._held:
                self._switch_in()
            greenlet.throw(self, GreenletExit)
        close_watcher(self._keep_alive)

    def let_go(self, *, has_hub: bool) -> None:
        """In a child process, begin no coroutine and never go on: they are the parent's.

        If this greenlet has forked, it goes on to the end of its current step.

        Args:
            has_hub: whether `hub` is the child's; otherwise it is not touched.
        """
        self._has_let_go = True
        self.parked = False
        if has_hub:
            release(self._keep_alive)
        leave_behind(self)
        keep(list(self._beginning), list(self._ended))
        self._beginning.clear()
        self._ended.clear()
        self._to_cancel.clear()

    def park(self) -> None:
        """Switch to the hub until woken. In this greenlet, between two rounds of the loop."""
        self._woken = False
        while True:
            if self._beginning:
                self._begin_all()
                if self._woken or self.aio_loop.has_work():
                    self.run_queue.run_soon()
                    return
            if self._ending:
                raise GreenletExit
            if self._has_let_go:
                self._leave()
                while True:  # no code switches here any more
                    self.run_queue.switch_on()
            needed = self.aio_loop.waiting > 0 or len(self.runs) > 0
            if needed is not self._keeps_alive:
                self._keep_alive.ref = self._keeps_alive = needed
            self._leave()
            self.parked = True
            try:
                self.run_queue.switch_on()
            finally:
                self.parked = False
                self._is_queued = False
                self._enter()
            if self._woken:
                return

    def _begin_all(self) -> None:
        beginning, ended = self._beginning, self._ended
        debug = self.aio_loop.get_debug()
        try:
            while beginning:
                run = self._begins = beginning.popleft()
                began = monotonic() if debug else 0.0
                if run.begin():
                    ended.append(run)
                if debug:
                    self._begins = None
                    self._report_if_slow(run, monotonic() - began)
                del run  # the coroutine's frame may keep this one alive
        except BaseException:
            self.run_queue.run_soon()
            raise
        finally:
            self._begins = None
            self._add_ended()

    def _report_if_slow(self, run: Beginning, seconds: float) -> None:
        """Log a slow first step, as asyncio does for all other steps in its debug mode."""
        if seconds >= self.aio_loop.slow_callback_duration:
            asyncio_logger.warning("Executing %.900r took %.3f seconds", run, seconds)

    def _add_ended(self) -> None:
        self.run_queue.add(self._ended)
        self._ended.clear()
        if len(self.run_queue.sessions) > 1:
            # This greenlet switches to the first one itself. That one may wait next in a way that
            # does not resume the others, so the hub has to.
            self.run_queue.run_soon()

    def begin(self, run: Beginning) -> None:
        """Let a coroutine begin soon. In the hub's thread, in any greenlet."""
        self._beginning.append(run)
        if self.parked and not self._wake.pending:
            self._wake = self.hub.loop.run_callback(self._unpark)

    def begin_in_turn(self, run: Beginning) -> None:
        """Let a coroutine begin after the sessions in the run queue, before the hub runs.

        The caller must wait next, so that the run queue goes on. Callers that wait for nothing but
        coroutines must not use it, as the hub would never run.
        """
        self._beginning.append(run)
        if not self.parked:  # it is held, for an unknown time
            run.waits()
        elif not self._is_queued:
            self._is_queued = True
            self.run_queue.add([self])

    def greenlet_that_waits(self, task: Task[Any]) -> greenlet | None:
        """The greenlet that waits for `task` through gevent, if one does."""
        run = self.runs.get(task)
        if run is None and self._begins is not None and self._begins.task is task:
            run = self._begins
        return None if run is None else run.greenlet

    # The protocol `Ready` of `psofa_gevent.hub.ready`:

    @property
    def greenlet(self) -> LoopGreenlet:
        """The greenlet to switch to."""
        return self

    @property
    def waiting_since(self) -> float:
        """Not 0 while it is parked."""
        return 1.0 if self.parked else 0.0

    def stop_watching(self) -> None:
        """Called when its turn came while it was held. The coroutines begin when it parks."""
        self._is_queued = False

    def wake(self) -> None:
        """Let the loop go on soon, if it is parked. In the hub's thread."""
        self._woken = True
        if self.parked and not self._wake.pending:
            self._wake = self.hub.loop.run_callback(self._unpark)

    def unpark(self) -> None:
        """Let the loop go on now, if it is parked. In the hub."""
        self._woken = True
        self._unpark()

    def _unpark(self) -> None:
        if self.parked:
            _switch(self)

    def cancel(self, run: Beginning) -> None:
        """Cancel a task soon; the task that is held is interrupted where it waits.

        To be called in any greenlet but this one. The task is not cancelled at once: a task that
        has not begun would never begin, and a callback that is due would never be called.
        """
        task = run.task
        if task is None:
            run.is_cancelled = True
        elif task is self._held_task:
            self.hub.loop.run_callback(self._interrupt, task)
        else:
            self._to_cancel.add(task)
            self.aio_loop.call_soon(self._cancel_now, task)

    def _cancel_now(self, task: Task[Any]) -> None:
        if task in self._to_cancel:
            self._to_cancel.discard(task)
            task.cancel()

    def _interrupt(self, task: Task[Any]) -> None:
        if task is self._held_task:
            self.throw(CancelledError())
        elif not task.done():
            task.cancel()

    def claim(self, exc: BaseException) -> None:
        """Note that a waiting greenlet gets `exc`, so that the main greenlet does not get it."""
        if isinstance(exc, (KeyboardInterrupt, SystemExit)):
            self._claimed = exc
            if self._unclaimed is exc:
                self._unclaimed = None

    def _interrupted(self, exc: BaseException) -> None:
        if exc is self._claimed:
            self._claimed = None
        elif exc is not self._unclaimed:
            self._unclaimed = exc
            self.aio_loop.call_later(CLAIM_SECONDS, self._raise_in_main, exc)

    def _raise_in_main(self, exc: BaseException) -> None:
        if exc is self._unclaimed:
            self._unclaimed = None
            self.aio_loop.thread.raise_in_main(exc)

    def switch_out(self) -> None:
        """Called by gevent when a step is about to wait."""
        self._held = True
        if self._begins is not None:
            self._begins.waits()
        for run in self._beginning:  # they wait for as long as this step does
            run.waits()
        self._add_ended()
        self.run_queue.run_soon()
        self._held_task = asyncio.current_task(self.aio_loop)
        if self._held_task is not None:
            asyncio._leave_task(self.aio_loop, self._held_task)
            if self._held_task in self._to_cancel:
                self._to_cancel.discard(self._held_task)
                self.hub.loop.run_callback(self._interrupt, self._held_task)
        self._leave()

    def switch(self, *args: Any, **kwargs: Any) -> Any:
        """Called by gevent when the event that a step waits for has come."""
        if left_behind and self in left_behind:
            not_woken(self)
            return None
        if self._held:
            self._switch_in()
        return super().switch(*args, **kwargs)

    def throw(self, *args: Any) -> Any:
        """Called by gevent to interrupt a step that waits."""
        if left_behind and self in left_behind:
            return None
        if self._held:
            self._switch_in()
        elif self.parked:
            # A gevent.Timeout around an await, or a kill by other code.
            message = f"{args!r} was thrown into an asyncio loop between two steps: dropped"
            self.aio_loop.call_soon(self.aio_loop.call_exception_handler, {"message": message})
            return None
        return super().throw(*args)

    def _switch_in(self) -> None:
        self._held = False
        self._enter()
        if self._held_task is not None:
            asyncio._enter_task(self.aio_loop, self._held_task)
            self._held_task = None

    def _enter(self) -> None:
        other = self._other_loop = asyncio._get_running_loop()
        if other is not None and (task := asyncio.current_task(other)) is not None:
            # Since Python 3.14 a thread has one current task, not one for each loop.
            asyncio._leave_task(other, task)
            self._other_task = task
        self._other_hooks = sys.get_asyncgen_hooks()
        if self._hooks is not None:
            sys.set_asyncgen_hooks(*self._hooks)
        asyncio._set_running_loop(self.aio_loop)

    def _leave(self) -> None:
        if self._hooks is None:
            # As a tuple: the garbage collector does not track the object of get_asyncgen_hooks.
            self._hooks = tuple(sys.get_asyncgen_hooks())
        sys.set_asyncgen_hooks(*self._other_hooks)
        asyncio._set_running_loop(self._other_loop)
        if self._other_task is not None and self._other_loop is not None:
            asyncio._enter_task(self._other_loop, self._other_task)
            self._other_task = None


def _do_nothing() -> None:
    pass
