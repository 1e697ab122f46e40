"""Work that belongs to a session: greenlets and coroutines beside its callbacks, and their end.

They end with their session: when its callbacks are through they are killed, and ``on_close`` comes
when all of them have ended. The session's own greenlet waits for that (`TaskReaper`), and passes on
what is thrown into it meanwhile. A session whose greenlet never began counts until its work has
ended. Where a shutdown kills a callback that does not end, it kills the work beside that, too.

All of it belongs to the hub's thread.
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
"""Seconds after which work that has not ended is killed again: it may have swallowed the first."""
LOUD_AFTER = 5
"""Kills after which that is worth a record in the log."""


def spawn_task(session: Connection[Any], function: Callable[[], object]) -> Greenlet[..., Any]:
    """Run `function` in a greenlet that belongs to `session`, soon. Does not switch."""
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
    """Ask all of it to end. Does not switch."""
    for greenlet in list(session._tasks or ()):
        greenlet.kill(block=False)


class TaskReaper:
    """Kills the work of a session whose callbacks are through, again and again until all has ended.

    It may have swallowed the first kill.
    """

    def __init__(self, session: Connection[Any], all_ended: Callable[[], object]) -> None:
        """Begin. In the hub's thread; does not switch.

        Args:
            session: the one whose work it is. There is some.
            all_ended: called in the hub when none is left.
        """
        self._session = session
        self.all_ended = all_ended
        self._kills = 0
        # A stuck one must not keep a program alive.
        self._timer = watch(session._loop.timer(KILL_PERIOD, KILL_PERIOD, ref=False))
        self._timer.start(self._kill)
        self._kill()

    def stop(self) -> None:
        """Kill no more."""
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
        """Wait until all has ended. In the session's own greenlet; raises nothing."""
        session = self._session
        while session._tasks:
            try:
                session._wait_until_woken(None)
            except BaseException as exc:
                # Killed, in the end of a shutdown: so are they.
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
