"""The asyncio loop of a gevent hub: one for each hub, made when it is first asked for.

It runs in a greenlet of its own (`psofa_gevent.aio.greenlet`) and waits through the hub
(`psofa_gevent.aio.selector`). A call from another greenlet of the hub's thread wakes the loop by a
callback of the hub, at once and without the pipe that other loops write to. The loop is closed when
its hub is replaced or its thread ends. After ``os.fork`` the child makes a new loop.

An idle loop does not keep the hub alive: ``gevent.wait()`` returns, and a deadlock of greenlets
raises `LoopExit`. The hub stays alive for an open asyncio connection or server, a timer
(``call_later``, ``asyncio.sleep``), a call in an executor, and a greenlet that waits for a task, as
the event that the task awaits may come from another thread. So a task that waits forever is a hang,
as in asyncio.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from asyncio import Handle
from asyncio.unix_events import _UnixSubprocessTransport  # type: ignore[attr-defined]  # private
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, Unpack

from gevent import get_hub, getcurrent

from psofa_gevent.aio.base import BaseHubLoop
from psofa_gevent.aio.child_watcher import watch_child
from psofa_gevent.aio.greenlet import LoopGreenlet
from psofa_gevent.aio.run import Run
from psofa_gevent.aio.selector import HubSelector
from psofa_gevent.hub.forking import in_child, keep, track
from psofa_gevent.hub.native import AtThreadEnd, new_local
from psofa_gevent.hub.thread import HubThread

if TYPE_CHECKING:
    from gevent.hub import Hub

__all__ = ["HubLoop", "hub_loop"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Each task calls this several times; super() would take 3 % of a task that does nothing.
_call_soon = asyncio.SelectorEventLoop.call_soon


def hub_loop() -> HubLoop:
    """The asyncio loop of this thread's hub, made when it is first asked for."""
    loop: HubLoop | None = getattr(_of_thread, "loop", None)
    if loop is None or loop.hub is not get_hub() or loop.greenlet.dead:
        loop = _of_thread.loop = HubLoop()
        _of_thread.at_end = AtThreadEnd(loop.shut_down)
    return loop


class HubLoop(BaseHubLoop):
    """The asyncio loop of one hub. It runs by itself; get it from `hub_loop`."""

    def __init__(self) -> None:
        self.thread = HubThread()
        self.hub = self.thread.hub
        self.waiting = 0
        """Calls in executors, and threads that wait for child processes; they keep the hub alive.
        """
        self.greenlet = LoopGreenlet(self, self.hub)
        self._hub_selector = HubSelector(self.hub, self.greenlet.park, self.greenlet.wake)
        self._pid = os.getpid()
        super().__init__(self._hub_selector)
        self.nothing_to_call = Handle(callable, (), self)
        """A cancelled handle, for a call that did not have to be scheduled."""
        self.nothing_to_call.cancel()
        track(self)

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> Handle:
        """As in asyncio; also from other greenlets of the hub's thread."""
        if self.greenlet.parked:
            self.greenlet.wake()
        ended: object = callback
        if type(ended) is Run:
            # This callback only schedules a switch, which needs no further round of the loop.
            ended.end_task()
            return self.nothing_to_call
        return _call_soon(self, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As in asyncio; also from other greenlets of the hub's thread."""
        self.greenlet.wake()
        return super().call_at(when, callback, *args, context=context)

    def run_in_executor(
        self,
        executor: Executor | None,
        func: Callable[[Unpack[Ts]], T],
        *args: *Ts,
    ) -> asyncio.Future[T]:
        """As in asyncio. The hub stays alive until the call has ended."""
        future = super().run_in_executor(executor, func, *args)
        self.waiting += 1
        future.add_done_callback(self._executed)
        return future

    def _executed(self, _future: object) -> None:
        self.waiting -= 1

    def run_forever(self) -> None:
        """Run the loop, in its own greenlet. Raises `RuntimeError` for any other caller."""
        if getcurrent() is not self.greenlet:
            raise RuntimeError("the loop of a hub runs by itself: use run_coroutine")
        super().run_forever()

    def close(self) -> None:
        """Close the loop. Raises `RuntimeError` unless `shut_down` has ended its greenlet."""
        if not self.greenlet.dead:
            raise RuntimeError("the loop of a hub is closed by itself, with the hub")
        super().close()

    def add_signal_handler(
        self,
        sig: int,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
    ) -> None:
        """As in asyncio. On gevent's libuv loop it keeps the hub alive."""
        if self._csock is None:
            with self._hub_selector.registering_without_ref():
                super()._make_self_pipe()  # type: ignore[misc]  # see _make_self_pipe
        super().add_signal_handler(sig, callback, *args)

    def shut_down(self) -> None:
        """End the loop's greenlet and close the loop, when its thread or its hub ends.

        Has an effect only in the loop's own thread and process. Tasks that have not ended are lost.
        """
        if os.getpid() == self._pid and self.thread.is_current() and not self.is_closed():
            self.greenlet.end()
            self.close()

    def _let_go(self, hub: Hub | None) -> None:
        """In a child process: leave the parent's connections and coroutines alone.

        They are kept forever: when collected, coroutines would run their ``finally`` blocks, and
        transports would close their sockets.
        """
        keep(self, asyncio.all_tasks(self))
        self.greenlet.let_go(has_hub=hub is self.hub)
        if hub is self.hub:
            self._hub_selector.close()
        # The loop may be in a round, in which it calls as many handles as there were at its start.
        ready: Any = self._ready  # type: ignore[attr-defined]  # all loops of asyncio have this name
        scheduled: Any = self._scheduled  # type: ignore[attr-defined]  # the same of timers
        keep(list(ready), list(scheduled))
        for due in range(len(ready)):
            ready[due] = self.nothing_to_call
        scheduled.clear()
        if self._csock is not None:
            self._let_go_of_signals(self._csock.fileno())

    def _let_go_of_signals(self, descriptor: int) -> None:
        """Reset the wakeup descriptor, which would tell the parent's loop of signals to the child.

        Args:
            descriptor: the wakeup descriptor of this loop; any other one stays set.
        """
        before = signal.set_wakeup_fd(-1)
        if before != descriptor:
            signal.set_wakeup_fd(before)

    # The methods below are those that asyncio's base loops leave to their subclasses.

    def _make_self_pipe(self) -> None:
        # Only signal handlers need the pipe; `add_signal_handler` makes it for the first one.
        self._ssock: socket.socket | None = None
        self._csock: socket.socket | None = None

    def _close_self_pipe(self) -> None:
        if self._csock is not None:
            super()._close_self_pipe()  # type: ignore[misc]  # see _make_self_pipe

    async def _make_subprocess_transport(
        self,
        protocol: Any,
        args: Any,
        shell: bool,
        stdin: Any,
        stdout: Any,
        stderr: Any,
        bufsize: int,
        extra: Any = None,
        **kwargs: Any,
    ) -> Any:
        # As in asyncio, but `watch_child` watches the child.
        waiter = self.create_future()
        transport: Any = _UnixSubprocessTransport(
            self,
            protocol,
            args,
            shell,
            stdin,
            stdout,
            stderr,
            bufsize,
            waiter=waiter,
            extra=extra,
            **kwargs,
        )
        watch_child(self, transport._proc, transport._process_exited)
        try:
            await waiter
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            transport.close()
            await asyncio.shield(transport._wait())
            raise
        return transport

    def _write_to_self(self) -> None:
        # In any thread.
        self.thread.call_soon(self.greenlet.unpark)

    def _check_thread(self) -> None:
        # asyncio compares thread idents, which are those of greenlets in a patched process.
        if not self.thread.is_current():
            raise RuntimeError("the loop of another thread's hub: use call_soon_threadsafe")


_of_thread = new_local()


@in_child
def _forget() -> None:
    _of_thread.loop = None
