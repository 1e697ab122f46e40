"""What the parts of the asyncio loop of a hub know of it: so they need not know each other.

The loop itself is `psofa_gevent.aio.loop`, which imports all of them.
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
    """The loop as its greenlet, its runs and its child watchers see it. In the hub's thread.

    Attributes:
        hub: the one that it belongs to.
        thread: that hub's.
        waiting: calls in executors, and children: while there are any, the hub stays alive.
        nothing_to_call: for what was not scheduled after all.
    """

    hub: Hub
    thread: HubThread
    waiting: int
    nothing_to_call: Handle

    def has_work(self) -> bool:
        """Whether a callback is due in the next round."""
        return bool(self._ready)  # type: ignore[attr-defined]  # a name of all asyncio's loops
