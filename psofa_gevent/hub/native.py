"""Thread primitives that work on OS threads even in a patched process.

In a patched process those of ``threading`` work on greenlets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gevent import monkey

from psofa_gevent.hub.forking import keep

__all__ = ["AtThreadEnd", "get_ident", "new_local", "new_lock"]

get_ident: Callable[[], int] = monkey.get_original("_thread", "get_ident")
"""Returns the number of the calling OS thread."""
new_lock: Callable[[], Any] = monkey.get_original("_thread", "RLock")
"""Makes a lock between OS threads, for a few lines that do not switch."""
new_local: Callable[[], Any] = monkey.get_original("threading", "local")
"""Makes an object whose attributes each OS thread has for itself."""


class AtThreadEnd:
    """Calls a function in the thread that ends: keep it in an attribute of a `new_local`.

    The function is also called when another object replaces this one there. It is not called in a
    child process. There, before ``os.fork`` returns and before any of its hooks, Python drops the
    objects of the other threads, which may have been in the middle of anything, and may hold locks
    for ever.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._ident = get_ident()

    def __del__(self) -> None:
        if get_ident() != self._ident:
            keep(self._function)  # and the object it is a method of, which is the parent's
        elif not sys.is_finalizing():
            self._function()
