"""The receiving half of a session: it waits for bytes and hands them over, from open to close.

`ReceivingHalf._read` takes every message to ``on_message``. It ends at any close request. It
requests the close itself for the peer's FIN, for an error of the connection, and for a peer that
was silent for the idle time. `ReceivingHalf.receive` reads in the middle of a callback, for
straight-line code. It waits in the same way: with the same clocks for idle peers and unfinished
messages, and after sending the collected messages.

Runs in the session's own greenlet. `psofa_gevent.session.connection` says who may wake it there.

- The wait comes before the read, so an idle session owns no buffer.
- What may switch: a callback, a wait, and the end of a turn between two messages of one read
  (`psofa_gevent.session.framed`). Nothing else switches, so no other greenlet runs between these.
"""

from __future__ import annotations

import _socket
import logging
import os
from collections.abc import Iterator
from time import monotonic
from typing import Any, NoReturn

from gevent import getcurrent

from psofa_gevent.checks import check_seconds
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsClosedError, PsSendError
from psofa_gevent.hub.forking import unwatch, watch
from psofa_gevent.hub.ready import switch
from psofa_gevent.hub.times import NEVER, SHORTEST_TIMER
from psofa_gevent.messages import M
from psofa_gevent.session.framed import NOTHING, FramedReceiver
from psofa_gevent.session.sending import SendingHalf

__all__ = ["ReceivingHalf"]

HALF_OPEN_LOOK = 1.0
"""Seconds between two checks for a reset, after the peer has closed its half."""
RETRY = 0.005
"""Seconds after which a `receive` that has timed out but still waits is woken again."""


class ReceivingHalf(SendingHalf[M]):
    """The half of a session that receives."""

    __slots__ = ()

    _framed: FramedReceiver | None

    # Ask for a message

    def receive(self, timeout: float | None = None) -> M:
        """Wait for the next message and return it, for straight-line code without ``on_message``.

        For `PsHandler`, and for the sync callbacks ``on_open`` and ``on_message`` of this session.
        ``on_message`` does not get the messages that they receive. The call waits for bytes as the
        session does between two callbacks: the session may close with TIMEOUT after the idle time,
        and ``callback_timeout`` does not count the wait.

        Args:
            timeout: seconds to wait; ``None``: until there is a message, or the session closes.

        Raises:
            TimeoutError: no message came within `timeout`. The session stays open.
            PsClosedError: no message will come: the peer has sent its FIN, or the session has
                closed for another reason.
            RuntimeError: called in another greenlet than the session's own, or in a coroutine.
            ValueError: `timeout` is negative.
        """
        if getcurrent() is not self.greenlet:
            raise RuntimeError(
                f"{self!r}: receive belongs to the greenlet of the session itself: a PsHandler, or "
                "a sync callback"
            )
        if timeout is not None:
            check_seconds("timeout", timeout)
        message: M = self._receive_next(timeout)
        return message

    def __iter__(self) -> Iterator[M]:
        """The messages, one after the other, until no more will come (`receive`)."""
        while True:
            try:
                message = self.receive()
            except PsClosedError:
                return
            yield message
            del message

    def _receive_next(self, timeout: float | None) -> Any:
        """The next message. Arguments and errors as for `PsSession.receive`."""
        limit = self._time_limit
        if self._framed is not None:
            message = self._framed.take(self)
            if message is not NOTHING:
                if limit is not None:
                    limit.restart()
                return message
        if limit is None:
            return self._wait_for_message(timeout)
        with limit.paused():
            return self._wait_for_message(timeout)

    def _wait_for_message(self, timeout: float | None) -> Any:
        if timeout is None:
            return self._read_message(NEVER)
        # Repeats: a timer may fire a little early, or in the moment in which bytes come.
        timer = watch(self._loop.timer(max(timeout, SHORTEST_TIMER), RETRY))
        timer.start(self._resume)
        try:
            return self._read_message(monotonic() + timeout)
        finally:
            unwatch(timer)

    def _read_message(self, deadline: float) -> Any:
        """Read until a message is whole, or until `deadline`."""
        while True:
            self._get_ready(waits=deadline == NEVER)
            data = None
            try:
                data = self._read(deadline)
            finally:
                if not data and self._framed is not None:
                    self._framed.stop_clock(self)
            if data is None and self._open:
                raise TimeoutError(f"{self!r}: no message came in time")
            if not data:
                self._end_receiving(has_eof=data is not None)
            self._received_at = self._ready.now
            if self._framed is None:
                self._messages_received += 1
                return data
            self._framed.feed(self, data)
            message = self._framed.take(self)
            if message is not NOTHING:
                return message
            del data  # a session that waits owns no buffer

    def _get_ready(self, *, waits: bool) -> None:
        """Send the collected messages and set the clocks, before a wait for bytes.

        With `waits`, that send may wait for the peer.

        Raises:
            PsClosedError: no message will come.
            PsSendError: the collected messages could not be sent, and the session is open.
        """
        if self._open:
            self._uncork_before_wait(waits=waits)
            if self._framed is not None:
                self._framed.set_deadline(self)
        if not self._open or self._eof_received:
            raise self._closed_error()
        waited, received = self._waited
        if waited and received == self._bytes_received:
            # No bytes came since the last wait, so its time counts as well.
            self.waiting_since = monotonic() - waited
            if self._slice is not None:
                self._slice.due = min(self._slice.due, self.waiting_since + self._idle)

    def _uncork_before_wait(self, *, waits: bool) -> None:
        if not waits:
            self._uncork_without_waiting()
            return
        try:
            self._uncork()
        except PsSendError as exc:
            if self._open:
                raise
            raise self._closed_error() from exc

    def _end_receiving(self, *, has_eof: bool) -> NoReturn:
        if has_eof:
            if self._framed is not None and not self._eof_received:
                self._framed.end(self)
            self._eof_received = True
            if not self._manager.settings.allow_half_open or self._eof_sent:
                self._request_close(PsCloseReason.PEER_CLOSE)
        raise self._closed_error()

    def _closed_error(self) -> PsClosedError:
        why = "the peer sends no more" if self._open else self.close_reason.name
        return PsClosedError(f"{self!r}: no message will come: {why}")

    # Read

    def _read(self, receive_deadline: float = 0.0) -> bytes | None:  # noqa: C901, PLR0912, PLR0915
        """Wait, read and hand over, until a close is requested. Every message comes through here.

        Each wait is a switch to the next ready session, or to the hub if there is none
        (`psofa_gevent.hub.ready`). All in one function, because each call would cost noticeable
        time.

        Args:
            receive_deadline: if not 0, hand over nothing, but return the bytes that were read; at
                the first wake-up without bytes after this monotonic time, return None.
        """
        of_hub = self._ready
        ready: list[Any] = of_hub.sessions  # each session that waits has a greenlet
        become_ready = ready.append
        hub = self._manager.thread.hub
        size = self._manager.settings.read_buffer_size
        on_message = self._manager.callbacks.on_message
        try:
            while self._open:
                if not self.waiting_since:
                    self.waiting_since = monotonic()
                if not self._watches:
                    self._watches = True
                    self._watcher.start(become_ready, self)
                while ready:
                    other = ready.pop()
                    if other.waiting_since:
                        greenlet = other.greenlet
                        del other  # a wait must not hold another session
                        switch(greenlet)
                        break
                    other.stop_watching()
                else:
                    switch(hub)
                if not self._open:
                    return None  # type: ignore[unreachable]  # others ran since the last look
                if not self._stays_armed:
                    self.stop_watching()
                try:
                    message: bytes | None = self._sock.recv(size)
                except BlockingIOError:
                    message = None
                except OSError as exc:
                    self.waiting_since = 0.0
                    self._request_close(PsCloseReason.FAILED, exc, linger=False)
                    self._log(logging.DEBUG, "%r: receive failed: %s", self, exc)
                    return None
                if message is None:
                    # No bytes are there: the idle timer or another wake-up, perhaps a stale one.
                    self._look_at_clock(is_pulled=receive_deadline > 0.0)
                    if receive_deadline and monotonic() >= receive_deadline:
                        return None
                    continue
                self.waiting_since = 0.0
                self._bytes_received += len(message)
                if receive_deadline:
                    return message
                if not message:
                    self.stop_watching()
                    self._receive_eof()
                    return None
                self._received_at = of_hub.now
                if self._framed is None:
                    self._messages_received += 1
                    on_message(self, message)
                else:
                    self._framed.feed(self, message)
                if self._framed is not None:  # on_message may have set the first framing
                    self._framed.hand_over(self)
                del message  # a session that waits owns no buffer
        finally:
            if receive_deadline and self.waiting_since:
                self._waited = (monotonic() - self.waiting_since, self._bytes_received)
            self.waiting_since = 0.0
            self.stop_watching()
        return None

    def _receive_eof(self) -> None:
        if self._framed is not None and not self._eof_received:
            self._framed.end(self)
        if not self._manager.settings.allow_half_open:
            self._request_close(PsCloseReason.PEER_CLOSE)
            return
        self._eof_received = True
        self._manager.callbacks.on_eof(self)
        if self._framed is not None:
            self._framed.hand_over(self)
        if self._eof_sent:
            self._request_close(PsCloseReason.PEER_CLOSE)
        self._wait_half_open()

    def _wait_half_open(self) -> None:
        """Wait for the close, after the peer's FIN.

        The socket stays readable from now on, so no event reports a reset: this checks for one.
        """
        look = watch(self._loop.timer(HALF_OPEN_LOOK, HALF_OPEN_LOOK))
        look.start(self._resume)
        self.waiting_since = monotonic()
        try:
            while self._open:
                if error := self._sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR):
                    cause = OSError(error, os.strerror(error))
                    self._request_close(PsCloseReason.FAILED, cause, linger=False)
                elif self._is_idle():
                    self._be_idle()
                    self.waiting_since = monotonic()
                else:
                    self._manager.thread.hub.switch()
        finally:
            self.waiting_since = 0.0
            unwatch(look)

    def _look_at_clock(self, *, is_pulled: bool) -> None:
        """Check the deadlines, as no bytes are there. `is_pulled`: a callback waits for bytes."""
        if self._tls is not None and self._tls.has_progress:  # a part of a record came
            self._tls.has_progress = False
            self.waiting_since = monotonic()
        if self._framed is not None and monotonic() >= self._frame_deadline:
            self.waiting_since = 0.0
            self._framed.time_out(self)
        elif self._is_idle():
            self._be_idle(may_call=not is_pulled)

    def _be_idle(self, *, may_call: bool = True) -> None:
        """Call ``on_idle`` after the idle time. Close if it returns False, or is not called."""
        on_idle = self._manager.callbacks.on_idle
        if on_idle is None or not may_call:
            self._request_close(PsCloseReason.TIMEOUT)
            return
        self.waiting_since = 0.0
        self._waited = (0.0, 0)
        if self._framed is not None:
            self._framed.stop_clock(self)  # a callback's time does not count as the peer's
        if on_idle(self) is False:
            self._request_close(PsCloseReason.TIMEOUT)
        elif self._framed is not None:
            self._framed.hand_over(self)  # on_idle may have received messages itself

    def _is_idle(self) -> bool:
        return monotonic() - self.waiting_since >= self._idle
