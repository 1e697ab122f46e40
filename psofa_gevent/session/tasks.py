"""Session tasks: greenlets and coroutines that run beside a session's callbacks, and their end.

Tasks end with their session: they are killed when its callbacks have ended, and ``on_close`` is
called when all tasks have ended. The session's own greenlet waits for that (`TaskReaper`). When an
exception is thrown into it meanwhile, it kills the tasks again. A session whose greenlet never
began counts as a session of its manager until its tasks have ended. A shutdown that kills a
callback which does not end also kills the tasks beside it.

Everything belongs to the hub's thread. Only `TaskReaper.wait` switches, and the tasks themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from gevent import GreenletExit

from psofa_gevent.aio.coroutines import run_task
from psofa_gevent.hub.forking import unwatch, watch
from psofa_gevent.hub.greenlets import LibraryGreenlet, SessionTask

if TYPE_CHECKING:
    from gevent import Greenlet

    from psofa_gevent.session.connection import Connection

__all__ = ["TaskReaper", "kill_tasks", "spawn_task"]

KILL_PERIOD = 1.0
"""Seconds after which a task that has not ended is killed again: it may have swallowed a kill."""
LOUD_AFTER = 5
"""Kills after which the tasks that have not ended are logged."""


def spawn_task(session: Connection[Any], function: Callable[[], object]) -> Greenlet[..., Any]:
    """Start a task of `session` that runs `function` soon. Does not switch."""
    greenlet = SessionTask(partial(_run, session, function))
    greenlet.gr_context = session._context
    work: set[LibraryGreenlet] | None = session._tasks
    if work is None:
        work = session._tasks = set()
    work.add(greenlet)
    greenlet.rawlink(partial(_ended, session))
    greenlet.start()
    return greenlet


def kill_tasks(session: Connection[Any]) -> None:
    """Kill all tasks of `session`, without waiting for their end. Does not switch."""
    for greenlet in list(session._tasks or ()):
        greenlet.kill(block=False)


class TaskReaper:
    """Kills the tasks of a session whose callbacks have ended, repeatedly until all have ended.

    A task may swallow a kill.
    """

    def __init__(self, session: Connection[Any], all_ended: Callable[[], object]) -> None:
        """Begin to kill. In the hub's thread; does not switch.

        Args:
            session: the session; it must have tasks.
            all_ended: called in the hub when all tasks have ended.
        """
        self._session = session
        self.all_ended = all_ended
        self._kills = 0
        # A stuck task must not keep a program alive.
        self._timer = watch(session._loop.timer(KILL_PERIOD, KILL_PERIOD, ref=False))
        self._timer.start(self._kill)
        self._kill()

    def stop(self) -> None:
        """Stop killing."""
        unwatch(self._timer)

    def _kill(self) -> None:
        session = self._session
        kill_tasks(session)
        self._kills += 1
        if self._kills == LOUD_AFTER:
            left = len(session._tasks or ())
            text = "%r: %d spawned greenlets have not ended"
            session._log(logging.WARNING, text, session, left)

    def wait(self) -> None:
        """Wait until all tasks have ended. In the session's own greenlet; switches, can't raise."""
        session = self._session
        while session._tasks:
            try:
                session._wait_until_woken(None)
            except BaseException as exc:
                # Killed, at the end of a shutdown: kill the tasks as well.
                if isinstance(exc, (KeyboardInterrupt, SystemExit)):
                    session._manager.thread.raise_in_main(exc)
                kill_tasks(session)
        self.stop()


def _run(session: Connection[Any], function: Callable[[], object]) -> Any:
    try:
        result = function()
        if asyncio.iscoroutine(result):
            result = run_task(result, context=session._context)
        return result
    except GreenletExit as exc:
        return exc.with_traceback(None)  # as gevent does, but it keeps no frame
    except BaseException as exc:
        session._fail(exc)
        return None


def _ended(session: Connection[Any], greenlet: LibraryGreenlet) -> None:
    work = session._tasks
    if work is not None:
        work.discard(greenlet)
        if not work and session._reaper is not None:
            session._reaper.all_ended()
