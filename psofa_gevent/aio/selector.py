"""The selector of the asyncio loop: waits for descriptors through watchers of gevent's hub.

Each registered descriptor has one watcher, for as long as it is registered. An event stops the
watcher, and the next `HubSelector.select` starts it again, so unread bytes don't keep the hub busy
while a coroutine holds the loop. libev makes no system call for the stop or the start.

`select` runs in the loop's greenlet and switches to the hub; the watchers call back in the hub.
"""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from psofa_gevent.hub.calls import close_watcher
from psofa_gevent.hub.times import SHORTEST_TIMER

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike
    from gevent.hub import Hub

__all__ = ["HubSelector"]


class HubSelector(selectors.BaseSelector):
    """Waits for descriptors, and lets the hub run meanwhile.

    Args:
        hub: The hub whose watchers tell of the events.
        park: Switches to the hub; returns, in the selecting greenlet, some time after `wake`.
        wake: Ends the parking soon, if there is one. Called in the hub and in the loop's thread.
    """

    def __init__(self, hub: Hub, park: Callable[[], None], wake: Callable[[], None]) -> None:
        self._hub: Any = hub  # Any: a destroyed hub has no loop, which its types don't say
        self._park = park
        self._wake = wake
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._map = _KeyMap(self._keys)
        self._watchers: dict[int, Any] = {}
        self._stopped: set[int] = set()
        self._fired: dict[int, int] = {}
        self._ref = True
        self._timer: Any = None
        """The timer of the `select` in progress."""
        self._is_closed = False
        self._round = _round(hub.loop)
        self._round_due = False

    def register(
        self, fileobj: FileDescriptorLike, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        """As in `selectors`."""
        if not events or events & ~(selectors.EVENT_READ | selectors.EVENT_WRITE):
            raise ValueError(f"invalid events: {events!r}")
        fd = _fileno(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (descriptor {fd}) is registered already")
        # The numbers for reading and writing are the same in selectors, libev and libuv.
        self._watchers[fd] = self._hub.loop.io(fd, events, ref=self._ref)
        self._stopped.add(fd)
        self._wake()  # so that a select in progress watches it as well
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """As in `selectors`."""
        key = self._map[fileobj]
        del self._keys[key.fd]
        self._close(self._watchers.pop(key.fd))
        self._stopped.discard(key.fd)
        self._fired.pop(key.fd, None)
        return key

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        """As in `selectors`."""
        return self._map

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As in `selectors`; the hub runs meanwhile. Switches.

        With a timeout of 0 the hub makes one full round, in which it polls, so that coroutines that
        never wait starve no other greenlet. Of such calls in a row only every second one does so,
        and switches, as a round of the hub costs more than one of the loop.
        """
        timer = None
        if self._is_closed:  # in a child process, in the middle of a round of the loop
            self._park()
        elif timeout is not None:
            if timeout > 0:
                timer = self._timer = self._hub.loop.timer(max(timeout, SHORTEST_TIMER))
            elif not self._round_due:
                self._round_due = True
                return self._ready()
            else:
                timer = self._round
            timer.start(self._wake)
        self._round_due = False
        try:
            if self._stopped:
                self._start_watchers()
            self._park()
        finally:
            if timer is self._round:
                self._round.stop()
            elif timer is not None:
                self._timer = None
                self._close(timer)
        return self._ready()

    def _start_watchers(self) -> None:
        for fd in self._stopped:
            self._watchers[fd].start(self._event, fd, pass_events=True)
        self._stopped.clear()

    def _event(self, events: int, fd: int) -> None:
        # In the hub.
        self._watchers[fd].stop()
        self._stopped.add(fd)
        self._fired[fd] = events
        self._wake()

    def _ready(self) -> list[tuple[selectors.SelectorKey, int]]:
        if not self._fired:
            return []
        keys = self._keys
        ready = [(keys[fd], events & keys[fd].events) for fd, events in self._fired.items()]
        self._fired.clear()
        return ready

    def _stop(self, watcher: Any) -> None:
        if self._hub.loop is not None:
            watcher.stop()
        else:
            # The hub was destroyed: the watcher can't be stopped, but its callback can be dropped.
            watcher.callback = None

    def _close(self, watcher: Any) -> None:
        self._stop(watcher)
        if self._hub.loop is not None:
            watcher.close()

    @contextlib.contextmanager
    def registering_without_ref(self) -> Iterator[None]:
        """Descriptors registered in this block don't keep the hub alive, except on libuv."""
        self._ref = False
        try:
            yield
        finally:
            self._ref = True

    def close(self) -> None:
        """Stop watching. Closes no descriptor. May be called again, as in the child of a child."""
        if self._is_closed:
            return
        self._is_closed = True
        for watcher in self._watchers.values():
            self._close(watcher)
        self._round.close()
        if self._timer is not None:
            self._close(self._timer)
        self._watchers.clear()
        self._keys.clear()
        self._stopped.clear()
        self._fired.clear()


class _Round:
    """Calls back when the hub has made one full round, by a timer of 0 s. For libev."""

    def __init__(self, loop: Any) -> None:
        self._timer = loop.timer(0)

    def start(self, callback: Callable[[], None]) -> None:
        self._timer.start(callback)

    def stop(self) -> None:
        if self._timer.loop.ptr:
            self._timer.stop()
        else:
            # The loop was destroyed: the timer can't be stopped, but its callback can be dropped.
            self._timer.callback = None

    def close(self) -> None:
        close_watcher(self._timer)


class _UvRound:
    """The same for libuv, where gevent makes a check watcher of a timer of 0 s.

    A greenlet must not stop a check watcher before it has fired (`psofa_gevent.hub.ready` has the
    reason). An ``async_`` watcher fires after the poll that follows its ``send``, and is never
    stopped.
    """

    def __init__(self, loop: Any) -> None:
        self._callback: Callable[[], None] | None = None
        self._watcher = loop.async_(ref=False)
        self._watcher.start(self._fired)

    def start(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._watcher.ref = True
        self._watcher.send()

    def stop(self) -> None:
        self._callback = None
        self._watcher.ref = False

    def _fired(self) -> None:
        if self._callback is not None:
            self._callback()

    def close(self) -> None:
        close_watcher(self._watcher)


def _round(loop: Any) -> _Round | _UvRound:
    return _UvRound(loop) if "libuv" in type(loop).__module__ else _Round(loop)


class _KeyMap(Mapping["FileDescriptorLike", selectors.SelectorKey]):
    """Finds a key by its descriptor, or by the object that has the descriptor."""

    def __init__(self, keys: dict[int, selectors.SelectorKey]) -> None:
        self._keys = keys

    def __getitem__(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._keys[_fileno(fileobj)]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[FileDescriptorLike]:
        return iter(self._keys)


def _fileno(fileobj: FileDescriptorLike) -> int:
    return fileobj if isinstance(fileobj, int) else fileobj.fileno()
