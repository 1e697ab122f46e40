"""Thread primitives that are those of OS threads in a patched process, too.

In a patched process gevent has made ``threading``'s ones about greenlets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gevent import monkey

from psofa_gevent.hub.forking import keep

__all__ = ["AtThreadEnd", "get_ident", "new_local", "new_lock"]

get_ident: Callable[[], int] = monkey.get_original("_thread", "get_ident")
"""The number of the calling OS thread."""
new_lock: Callable[[], Any] = monkey.get_original("_thread", "RLock")
"""A lock between OS threads, for a few lines that do not switch."""
new_local: Callable[[], Any] = monkey.get_original("threading", "local")
"""An object whose attributes each OS thread has for itself."""


class AtThreadEnd:
    """Calls a function in the thread that ends: to be kept in an attribute of a `new_local`.

    It is called, too, when something else takes the place of this object there. Not in a child
    process: before ``os.fork`` returns there, and before any of its hooks, Python drops what the
    other threads have, in the middle of whatever those were about. They may hold locks for ever.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._ident = get_ident()

    def __del__(self) -> None:
        if get_ident() != self._ident:
            keep(self._function)  # with what it belongs to, which is the parent's
        elif not sys.is_finalizing():
            self._function()
