"""The last words to connections that are refused: they reach the peer, and block nobody.

A plain close would reset the connection if the peer has sent something, and could destroy what is
on its way to it (RFC 2525, section 2.17). So writing is shut down, and what comes is read and
dropped until the peer closes, within limits on time, on the number of connections and on bytes.
Beyond the limits a connection gets the words, and is closed at once.

All of it runs in the hub, in callbacks of watchers, without a greenlet: nothing waits or raises.
"""

from __future__ import annotations

import _socket
import contextlib
from typing import Any

from psofa_gevent.hub.forking import keep, release
from psofa_gevent.hub.io_events import READ
from psofa_gevent.hub.thread import HubThread
from psofa_gevent.net.sockopts import end

__all__ = ["LONGEST_FAREWELL", "Farewells"]

LONGEST_FAREWELL = 4_096
"""Bytes: any send buffer that is empty takes them."""
MOST_AT_A_TIME = 32
"""Half of the descriptors that the default of ``max_sessions`` leaves to others."""
LONGEST_FAREWELL_TIME = 1.0
"""Seconds."""
MOST_BYTES = 65_536
DROPPED_AT_A_TIME = 4_096


class Farewells:
    """The connections that are on their way out."""

    def __init__(self) -> None:
        self._leaving: set[_Leaving] = set()

    def add(self, sock: _socket.socket, words: bytes, thread: HubThread) -> None:
        """Say the words, and close `sock` soon, which is this object's now."""
        try:
            sock.setblocking(False)
            sock.send(words)
            sock.shutdown(_socket.SHUT_WR)
        except OSError:
            end(sock)
            return
        if len(self._leaving) >= MOST_AT_A_TIME:
            end(sock)
            return
        self._leaving.add(_Leaving(sock, thread.loop, self._leaving))

    def close(self) -> None:
        """Close those that are left, at once."""
        for leaving in list(self._leaving):
            with contextlib.suppress(ValueError):  # of a watcher whose loop is gone
                leaving.close()

    def let_go(self, *, has_hub: bool) -> None:
        """Leave them to the parent process. The hub is touched only where this one has it."""
        for leaving in self._leaving:
            leaving.let_go(has_hub=has_hub)
        keep(*self._leaving)
        self._leaving.clear()


class _Leaving:
    """One of them."""

    __slots__ = ("_among", "_left", "_sock", "_timer", "_watcher")

    def __init__(self, sock: _socket.socket, loop: Any, among: set[_Leaving]) -> None:
        self._sock = sock
        self._among = among
        self._left = MOST_BYTES
        self._watcher = loop.io(sock.fileno(), READ)
        self._timer = loop.timer(LONGEST_FAREWELL_TIME)
        try:
            self._watcher.start(self._read_and_drop)
            self._timer.start(self.close)
        except BaseException:
            self.close()
            raise

    def _read_and_drop(self) -> None:
        try:
            data = self._sock.recv(DROPPED_AT_A_TIME)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._left -= len(data)
        if not data or self._left <= 0:
            self.close()

    def let_go(self, *, has_hub: bool) -> None:
        """Leave it to the parent process."""
        if has_hub:
            release(self._watcher)
            release(self._timer)
        self._sock.close()

    def close(self) -> None:
        """Close it now. The watcher first: the descriptor is used again at once."""
        self._among.discard(self)
        try:
            for watcher in (self._watcher, self._timer):
                watcher.stop()
                watcher.close()
        finally:
            end(self._sock)
