"""Farewells: the last bytes to refused connections. They reach the peer and block nothing.

If the peer has sent something, a plain close would reset the connection, which could destroy bytes
on their way to the peer (RFC 2525, section 2.17). So the server shuts down writing, then reads and
drops data until the peer closes, within limits on time, on the number of connections and on bytes.
A connection beyond the limit on connections is sent the farewell and closed at once.

Runs in the hub, in callbacks of watchers, without a greenlet; except `Farewells.close`, which runs
in the greenlet of the shutdown, or in any thread if the hub was destroyed. Nothing waits. Only
`Farewells.add` may raise, for lack of memory.
"""

from __future__ import annotations

import _socket
import contextlib
from typing import Any

from psofa_gevent.hub.forking import keep, release
from psofa_gevent.hub.io_masks import READ
from psofa_gevent.hub.thread import HubThread
from psofa_gevent.net.sockopts import end

__all__ = ["LONGEST_FAREWELL", "Farewells"]

LONGEST_FAREWELL = 4_096
"""Bytes of a farewell, at most: any empty send buffer takes that many."""
MOST_AT_A_TIME = 32
"""Connections that wait for their peers to close: half of the descriptors that the default of
``max_sessions`` leaves to others."""
LONGEST_FAREWELL_TIME = 1.0
"""Seconds for which such a connection waits, at most."""
MOST_BYTES = 65_536
"""Bytes that are read from such a connection and dropped, at most."""
DROPPED_AT_A_TIME = 4_096
"""Bytes of one such read."""


class Farewells:
    """The refused connections of one server that wait for their peers to close."""

    def __init__(self) -> None:
        self._leaving: set[_Leaving] = set()

    def add(self, sock: _socket.socket, words: bytes, thread: HubThread) -> None:
        """Send `words`, and close `sock` at once or soon. It belongs to this object now."""
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
        """Close the connections that still wait, at once."""
        for leaving in list(self._leaving):
            with contextlib.suppress(ValueError):  # from a watcher whose loop is gone
                leaving.close()

    def let_go(self, *, has_hub: bool) -> None:
        """Leave the connections to the parent process.

        Args:
            has_hub: whether the hub of the watchers is the child's; otherwise it is not touched.
        """
        for leaving in self._leaving:
            leaving.let_go(has_hub=has_hub)
        keep(*self._leaving)
        self._leaving.clear()


class _Leaving:
    """A refused connection that was sent its farewell and waits for its peer to close."""

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
        """Leave the connection to the parent process."""
        if has_hub:
            release(self._watcher)
            release(self._timer)
        self._sock.close()

    def close(self) -> None:
        """Close the connection now.

        The watchers are closed before the socket, whose descriptor may be used again at once.
        """
        self._among.discard(self)
        try:
            for watcher in (self._watcher, self._timer):
                watcher.stop()
                watcher.close()
        finally:
            end(self._sock)
