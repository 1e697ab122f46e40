"""The life of a session in its own greenlet: ``on_open``, its messages, its end.

Only that greenlet (`SessionLife._live`) ends a session that has begun, and normally it closes the
socket. These functions close the socket in its place: `SessionLife._abort`; `SessionLife._drop` for
a session that never began; `psofa_gevent.session.inside.abandon` for a session whose callback does
not end; `Connection._end_with_hub` for one whose hub was destroyed; and `Connection._let_go` in a
child process, which leaves the connection to its parent.

What may switch: callbacks, the preamble, `linger`, and the waits for another thread's request and
for session tasks.
"""

from __future__ import annotations

import _socket
import contextlib
import logging
import uuid
from contextvars import Context
from typing import Any

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.hub.greenlets import LibraryGreenlet
from psofa_gevent.messages import M
from psofa_gevent.net.sockopts import Endpoint, end, reset
from psofa_gevent.session.connection import Manager
from psofa_gevent.session.framed import FramedReceiver
from psofa_gevent.session.lingering import linger
from psofa_gevent.session.receiving import ReceivingHalf
from psofa_gevent.session.tasks import TaskReaper
from psofa_gevent.tls.socket import TlsSocket

__all__ = ["SessionGreenlet", "SessionLife"]

REQUEST_LOOK = 0.05
"""Seconds between two checks whether another thread's close request has reached the hub."""


class SessionGreenlet(LibraryGreenlet):
    """The greenlet of one session."""

    __slots__ = ("session",)

    def __init__(self, session: SessionLife[Any]) -> None:
        # Skips the __init__ of `LibraryGreenlet`: the manager's pool knows this greenlet.
        super(LibraryGreenlet, self).__init__()
        # Set once, so it costs nothing per message. Only one greenlet at a time could be in
        # Context.run.
        self.gr_context = session._context
        self.session: Any = session
        """None when the session has ended, as other greenlets may hold this one after a switch."""

    def switch_out(self) -> None:
        """Send the collected messages. gevent calls this when the session's greenlet will wait."""
        if self.session is not None and self.session._cork is not None:
            self.session._uncork_without_waiting()
            if self.session._framed is not None:
                self.session._framed.waits()

    def _run(self) -> None:
        assert self.session is not None
        self.session._live()
        self.session = None


class SessionLife(ReceivingHalf[M]):
    """A session from its connected socket to the close queue. In the hub's thread."""

    __slots__ = ()

    greenlet: SessionGreenlet | None
    _reaper: TaskReaper | None

    def __init__(
        self,
        manager: Manager,
        sock: _socket.socket | TlsSocket,
        remote_endpoint: object,
        connection_id: uuid.UUID | None,
        local_endpoint: Endpoint | None,
        context: Context,
    ) -> None:
        super().__init__(manager, sock, remote_endpoint, connection_id, local_endpoint, context)
        framing = manager.settings.framing
        try:  # undo all if a line fails, for lack of memory for example
            if framing is not None:
                self._framed = FramedReceiver(framing)
            if type(sock) is TlsSocket:
                self._use_tls(sock)
            self.greenlet = SessionGreenlet(self)
            self._ready.register()
        except BaseException:
            self._watcher.close()
            self.greenlet = None
            raise

    def _live(self) -> None:
        self._started = True
        try:
            try:
                if self._is_opening and self._manager.preamble is not None:
                    self._manager.preamble(self)
                    self._is_opening = not self._open
                if not self._is_opening:
                    self._log(logging.DEBUG, "%r: opened", self)
                    self._manager.callbacks.on_open(self)
                    if self._framed is not None:  # on_open may have received messages itself
                        self._framed.hand_over(self)
                    self._read()
            except BaseException as exc:
                self._uncork_without_waiting()
                self._fail(exc)
            while self._reason is PsCloseReason.NONE and not self._open:
                # Another thread's request is on its way, after the posts of that thread.
                self._wait_until_woken(REQUEST_LOOK)
            self._kill_tasks()
            if self._abort_asked:  # by another thread; its request is on its way
                self._abort()
            linger(self)
        except BaseException as exc:
            # Killed since the last callback: end the session without any more waiting.
            if isinstance(exc, (KeyboardInterrupt, SystemExit)):
                self._manager.thread.raise_in_main(exc)
            self._log(logging.DEBUG, "%r: did not linger to the end: %r", self, exc)
        finally:
            self._end()

    def _end(self) -> None:
        """Take the last steps: all of them, even if an exception was thrown in on the way."""
        try:
            self._request_close(PsCloseReason.SELF_CLOSE)  # without effect if there is a reason
            self._release(with_reset=self._abort_asked)
        finally:
            try:
                self._kill_tasks()
                if self._reaper is not None:
                    self._reaper.wait()
                    self._reaper = None
            finally:
                self.greenlet = None
                self._manager.session_ended(self)

    def _kill_tasks(self) -> None:
        """Begin to kill the session tasks, unless that has begun. The callbacks have ended."""
        if self._tasks and self._reaper is None:
            self._reaper = TaskReaper(self, self._wake)

    def _abort(self) -> None:
        self._request_close(PsCloseReason.SELF_CLOSE, linger=False)
        if not self._released:
            self._release(with_reset=True)
            self._wake()

    def _release(self, *, with_reset: bool = False) -> None:
        """Close the watcher, then the socket, whose descriptor may be used again at once."""
        if self._released:
            return
        self._released = True
        self._watches = False
        self._watcher.stop()
        self._watcher.close()
        self._ready.unregister()
        if self._send_queue is not None:
            self._send_queue.close()
        if with_reset:
            reset(self._sock)
            return
        if self._tls is not None and not self._eof_sent:
            with contextlib.suppress(OSError):
                self._shut_socket()
        if self._eof_sent and self._eof_received:
            self._sock.close()  # both ends have sent their FIN
        else:
            end(self._sock)

    def _drop(self, reason: PsCloseReason, cause: BaseException | None = None) -> None:
        """End a session whose greenlet has not run: no callback is called.

        The manager ends its session tasks. A second call has no effect.
        """
        self._decide(reason, cause)
        self._context = None
        self._leave_all()
        self._release()
        greenlet, self.greenlet = self.greenlet, None
        if greenlet is not None:
            greenlet.session = None
            greenlet.kill(block=False)
