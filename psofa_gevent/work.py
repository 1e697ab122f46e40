"""Work that belongs to a session: greenlets and coroutines beside its callbacks, and their end.

They end with their session: when its callbacks are through they are killed, and ``on_close`` comes
when all of them have ended. The session's own greenlet waits for that (`end_work`), and passes on
what is thrown into it meanwhile. All of it belongs to the hub's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from gevent import GreenletExit

from psofa_gevent.aio import run_task
from psofa_gevent.hub_thread import log_safely
from psofa_gevent.worker import LibraryGreenlet

if TYPE_CHECKING:
    from gevent import Greenlet

    from psofa_gevent.session import PsSession

__all__ = ["end_work", "kill_work", "spawn_work"]

KILL_PERIOD = 1.0
"""Seconds after which work that has not ended is killed again: it may have swallowed the first."""
SHORTEST_TIMER = 0.001
"""Seconds: libuv knows no shorter timer, and warns of one."""
LOUD_AFTER = 5
"""Kills after which that is worth a record in the log."""


def spawn_work(session: PsSession[Any], function: Callable[[], object]) -> Greenlet[..., Any]:
    """Run `function` in a greenlet that belongs to `session`, soon. Does not switch."""
    greenlet = LibraryGreenlet(partial(_run, session, function))
    work: set[LibraryGreenlet] | None = session._work
    if work is None:
        work = session._work = set()
    work.add(greenlet)
    greenlet.rawlink(partial(_ended, session))
    greenlet.start()
    return greenlet


def kill_work(session: PsSession[Any]) -> None:
    """Ask all of it to end. Does not switch."""
    for greenlet in list(session._work or ()):
        greenlet.kill(block=False)


def end_work(session: PsSession[Any]) -> None:
    """Wait until all of it, once killed, has ended. In the session's own greenlet; never raises."""
    kills = 1
    deadline = monotonic() + KILL_PERIOD
    while session._work:
        try:
            # Others may wake it for reasons that are past.
            session._wait_until_woken(max(deadline - monotonic(), SHORTEST_TIMER))
        except BaseException as exc:
            # Killed, in the end of a shutdown: so are they.
            if isinstance(exc, (KeyboardInterrupt, SystemExit)):
                session._host.thread.raise_in_main(exc)
            deadline = monotonic()
        if session._work and monotonic() >= deadline:
            kill_work(session)
            kills += 1
            deadline = monotonic() + KILL_PERIOD
            if kills == LOUD_AFTER:
                left = len(session._work)
                log_safely(logging.WARNING, "%r: %d greenlets of its own do not end", session, left)


def _run(session: PsSession[Any], function: Callable[[], object]) -> Any:
    try:
        result = function()
        return run_task(result) if asyncio.iscoroutine(result) else result
    except GreenletExit:
        raise
    except BaseException as exc:
        session._fail(exc)
        return None


def _ended(session: PsSession[Any], greenlet: LibraryGreenlet) -> None:
    work = session._work
    if work is not None:
        work.discard(greenlet)
        if not work and not session._open:
            session._wake()
