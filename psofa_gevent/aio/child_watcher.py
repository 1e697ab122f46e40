"""The child watcher of a hub's asyncio loop: tells the loop that a child process has ended.

asyncio's own loops get child watchers for this: up to Python 3.13 from the event loop policy, and
some policies have none, such as the one that ``uvloop.install()`` sets. In a patched process, where
the child is started by gevent, gevent itself reads the exit status; other code that waits for the
status as well may wait forever (on libuv).
"""

from __future__ import annotations

import os
import threading
from asyncio.log import logger as asyncio_logger
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psofa_gevent.aio.base import BaseHubLoop

__all__ = ["watch_child"]

UNKNOWN = 255
"""asyncio's exit code for a child whose status other code has read."""


def watch_child(loop: BaseHubLoop, process: Any, ended: Callable[[int], None]) -> None:
    """Have `loop` call `ended` with the exit code when `process`, a ``Popen``, has ended.

    To be called in the loop's thread, where `ended` is called as well. The hub stays alive until
    then.
    """
    if hasattr(process, "rawlink"):  # gevent's
        process.rawlink(lambda process: loop.call_soon(ended, process.returncode))
        return
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, or an old kernel
        _watch_in_thread(loop, process.pid, ended)
        return

    def reap() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        ended(_wait(process.pid))

    loop.add_reader(descriptor, reap)


def _watch_in_thread(loop: BaseHubLoop, pid: int, ended: Callable[[int], None]) -> None:
    def wait() -> None:
        code = _wait(pid)
        try:
            loop.call_soon_threadsafe(tell, code)
        except RuntimeError:
            pass  # the loop was closed

    def tell(code: int) -> None:
        loop.waiting -= 1
        ended(code)

    loop.waiting += 1
    threading.Thread(target=wait, name=f"waits for process {pid}", daemon=True).start()


def _wait(pid: int) -> int:
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        asyncio_logger.warning(
            "the exit status of child process %d was read elsewhere: 255 instead", pid
        )
        return UNKNOWN
    return os.waitstatus_to_exitcode(status)
