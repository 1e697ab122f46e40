"""Notifications of ``serve_forever`` to a service manager: ready, stopping, and the watchdog.

The protocol is systemd's (`psofa_gevent.systemd`). If several servers of a process are in
``serve_forever``, each notifies that it is ready, and only the last one notifies that it stops.

All of it runs in the hub's thread, partly in the hub, and never waits. A notification that the
service manager does not take at once is sent a little later by a timer. The watchdog's
notifications come from a timer of the hub as well: a blocked hub sends none, so the service manager
notices it. The socket is opened only once: a server that is out of descriptors is alive, and must
be able to send that.
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
"""Seconds after which a notification that was not taken is sent again."""
WATCHDOG = "WATCHDOG=1"


class ServiceNotifier:
    """Sends the notifications of one server that is in ``serve_forever``."""

    def __init__(self, loop: Any) -> None:
        """Make a notifier that sends nothing before `ready`.

        Args:
            loop: the event loop of the server's hub.
        """
        self._retry = watch(loop.timer(RETRY_PERIOD))
        self._watchdog: Any = None
        self._loop = loop
        self._untold: list[str] = []
        self._socket: _socket.socket | None = None
        """None until `ready`."""
        track(self)

    def ready(self, where: str) -> None:
        """Notify that the server can be reached, and begin to notify the watchdog.

        Without effect where there is no service manager.

        Args:
            where: the addresses of the server, for the status.
        """
        if not systemd.has_manager():
            return
        try:
            self._socket = systemd.new_socket()
        except OSError as exc:
            log(logging.WARNING, "The service manager is not notified: %s", exc)
            return
        _serving.append(self)
        status = where.replace("\n", " ")  # the path of a Unix socket may have one
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
        """Notify that the shutdown begins. May be called again, and before `ready`."""
        if self._leave() and not _serving:
            self._tell("STOPPING=1\nSTATUS=Shutting down")

    def close(self) -> None:
        """Send nothing more: stop the timers, and close the socket."""
        self._leave()
        unwatch(self._retry)
        unwatch(self._watchdog)
        if self._socket is not None:
            self._socket.close()

    def _let_go(self, _hub: object) -> None:
        """Send nothing more, in a child process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _leave(self) -> bool:
        """Take this server out of `_serving`; whether it was there."""
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
        # A signal handler that shuts the server down may call this function while it runs.
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
"""The notifiers that have said that they are ready, and not yet that they stop."""
in_child(_serving.clear)
