"""What ``serve_forever`` tells a service manager: that it is ready, that it stops, that it lives.

systemd's protocol, by way of `psofa_gevent.systemd`. Of several servers of a process that are in
``serve_forever``, each says that it is ready, and the last one that stops says so.

All of it runs in the hub's thread, and in the hub itself, and never waits: what the manager does
not take at the moment is told a little later by a timer. Also the watchdog is a timer of the hub,
so a hub that is blocked falls silent, and the manager finds it. The socket is opened once: a server
that is out of descriptors lives, and must be able to say so.
"""

from __future__ import annotations

import _socket
import contextlib
import logging
from typing import Any

from psofa_gevent import systemd
from psofa_gevent.hub.forking import in_child, track, unwatch, watch
from psofa_gevent.hub.logs import log
from psofa_gevent.hub.times import SHORTEST_TIMER

__all__ = ["ServiceNotifier"]

RETRY_PERIOD = 0.05
"""Seconds after which what was not taken is told again."""
WATCHDOG = "WATCHDOG=1"


class ServiceNotifier:
    """What one server tells while it is in ``serve_forever``."""

    def __init__(self, loop: Any) -> None:
        """Tell nothing yet.

        Args:
            loop: the event loop of the server's hub.
        """
        self._retry = watch(loop.timer(RETRY_PERIOD))
        self._watchdog: Any = None
        self._loop = loop
        self._untold: list[str] = []
        self._socket: _socket.socket | None = None
        """None until it is ready."""
        track(self)

    def ready(self, where: str) -> None:
        """Tell that the server can be reached, and from now on that it lives.

        Without effect where nobody wants to know.
        """
        if not systemd.has_manager():
            return
        try:
            self._socket = systemd.new_socket()
        except OSError as exc:
            log(logging.WARNING, "The service manager is not notified: %s", exc)
            return
        _serving.append(self)
        status = where.replace("\n", " ")  # a path may have one
        self._tell(f"READY=1\nSTATUS=Listening on {status}")
        try:
            timeout = systemd.watchdog_timeout()
        except ValueError as exc:
            log(logging.WARNING, "No watchdog: %s", exc)
            return
        if timeout is not None:
            period = max(timeout / 2, SHORTEST_TIMER)
            self._watchdog = watch(self._loop.timer(period, period))
            self._watchdog.start(self._tell, WATCHDOG)
            self._tell(WATCHDOG)

    def stopping(self) -> None:
        """Tell that the shutdown begins. May be called again, and before `ready`."""
        if self._leave() and not _serving:
            self._tell("STOPPING=1\nSTATUS=Shutting down")

    def close(self) -> None:
        """Tell nothing more: stop the timers, and close the socket."""
        self._leave()
        unwatch(self._retry)
        unwatch(self._watchdog)
        if self._socket is not None:
            self._socket.close()

    def _let_go(self, _hub: object) -> None:
        """Tell nothing more, in a child process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _leave(self) -> bool:
        """Whether it was among those that serve."""
        try:
            _serving.remove(self)
        except ValueError:
            return False
        return True

    def _tell(self, state: str) -> None:
        if state not in self._untold:
            self._untold.append(state)
        self._tell_all()

    def _tell_all(self) -> None:
        # A signal handler that shuts the server down may do the same in the middle of this.
        while self._untold and self._socket is not None:
            state = self._untold[0]
            try:
                systemd.send(state, self._socket)
            except BlockingIOError:
                self._retry.stop()
                self._retry.start(self._tell_all)
                return
            with contextlib.suppress(ValueError):
                self._untold.remove(state)


_serving: list[ServiceNotifier] = []
in_child(_serving.clear)
