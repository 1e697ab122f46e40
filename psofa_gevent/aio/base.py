"""The base class of the asyncio loop of a hub, as the parts of the loop know it.

With it the parts need not import the loop itself, `psofa_gevent.aio.loop`, which imports all of
them.
"""

from __future__ import annotations

import asyncio
from asyncio import Handle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gevent.hub import Hub

    from psofa_gevent.hub.thread import HubThread

__all__ = ["BaseHubLoop"]


class BaseHubLoop(asyncio.SelectorEventLoop):
    """The loop as its greenlet, its runs and its child watchers know it. In the hub's thread.

    Attributes:
        hub: the hub that the loop belongs to.
        thread: the thread of that hub.
        waiting: the number of calls in executors, and of threads that wait for child processes.
            While it is not 0, the hub stays alive.
        nothing_to_call: a cancelled handle, for a call that did not have to be scheduled.
    """

    hub: Hub
    thread: HubThread
    waiting: int
    nothing_to_call: Handle

    def has_work(self) -> bool:
        """Whether a callback is due in the next round."""
        return bool(self._ready)  # type: ignore[attr-defined]  # all loops of asyncio have this name
