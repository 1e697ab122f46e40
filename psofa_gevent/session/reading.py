"""Reading: how a session waits for bytes and hands them over, from ``on_open`` to its close.

Runs in the session's own greenlet. Who may wake it there, and how: see
`psofa_gevent.session.session`. It ends when a close was requested, by whomever: here for the peer's
FIN, for what the kernel says of the connection, and for a peer that was silent for the idle time.

- The wait comes before the read: an idle session owns no buffer.
- What may switch: a callback, the wait, and the end of a turn between two messages of one read
  (`psofa_gevent.session.framed`). Nothing else, so between two of them no other greenlet
  runs.
"""

from __future__ import annotations

import _socket
import logging
import os
from time import monotonic
from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.hub.forking import unwatch, watch
from psofa_gevent.hub.ready import switch

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession

__all__ = ["read"]

HALF_OPEN_LOOK = 1.0
"""Seconds between two looks for a reset, while the peer has closed its half."""


def read(  # noqa: C901, PLR0912, PLR0915
    session: PsSession[Any], receive_deadline: float = 0.0
) -> bytes | None:
    """Wait, read, hand over, until a close is requested: the way of every message.

    Each wait is a switch to the next session that is readable, or to the hub if there is none
    (`psofa_gevent.hub.ready`). All in one function, as each call more would be felt.

    Args:
        session: the one whose greenlet this is.
        receive_deadline: not 0: hand over nothing, but return what was read; None when this moment
            of the monotonic clock has come, and somebody woke the session.
    """
    of_hub = session._ready
    ready: list[Any] = of_hub.sessions  # whoever waits has a greenlet
    become_ready = ready.append
    hub = session._manager.thread.hub
    size = session._manager.settings.read_buffer_size
    on_message = session._manager.callbacks.on_message
    try:
        while session._open:
            if not session._waiting_since:
                session._waiting_since = monotonic()
            if not session._watches:
                session._watches = True
                session._watcher.start(become_ready, session)
            while ready:
                other = ready.pop()
                if other._waiting_since:
                    greenlet = other._greenlet
                    del other  # a wait must not hold another session
                    switch(greenlet)
                    break
                other._stop_watching()
            else:
                switch(hub)
            if not session._open:
                return None  # type: ignore[unreachable]  # others ran since the last look
            if not session._stays_armed:
                session._stop_watching()
            try:
                message: bytes | None = session._sock.recv(size)
            except BlockingIOError:
                message = None
            except OSError as exc:
                session._waiting_since = 0.0
                session._request_close(PsCloseReason.FAILED, exc, linger=False)
                session._log(logging.DEBUG, "%r: receive failed: %s", session, exc)
                return None
            if message is None:
                # Woken by the idle timer, or by nothing at all: no bytes are there.
                _look_at_clock(session, is_pulled=receive_deadline > 0.0)
                if receive_deadline and monotonic() >= receive_deadline:
                    return None
                continue
            session._waiting_since = 0.0
            session._bytes_received += len(message)
            if receive_deadline:
                return message
            if not message:
                session._stop_watching()
                _receive_eof(session)
                return None
            session._received_at = of_hub.now
            if session._framed is None:
                session._messages_received += 1
                on_message(session, message)
            else:
                session._framed.feed(session, message)
            if session._framed is not None:  # or since just now
                session._framed.hand_over(session)
            del message  # a session that waits owns no buffer
    finally:
        if receive_deadline and session._waiting_since:
            session._waited = (monotonic() - session._waiting_since, session._bytes_received)
        session._waiting_since = 0.0
        session._stop_watching()
    return None


def _receive_eof(session: PsSession[Any]) -> None:
    if session._framed is not None and not session._eof_received:
        session._framed.end(session)
    if not session._manager.settings.allow_half_open:
        session._request_close(PsCloseReason.PEER_CLOSE)
        return
    session._eof_received = True
    session._manager.callbacks.on_eof(session)
    if session._framed is not None:
        session._framed.hand_over(session)
    if session._eof_sent:
        session._request_close(PsCloseReason.PEER_CLOSE)
    _wait_half_open(session)


def _wait_half_open(session: PsSession[Any]) -> None:
    """Wait for the close of a session whose peer sends no more.

    The socket is readable for ever now, so nothing tells of a reset: look for one.
    """
    look = watch(session._loop.timer(HALF_OPEN_LOOK, HALF_OPEN_LOOK))
    look.start(session._resume)
    session._waiting_since = monotonic()
    try:
        while session._open:
            if error := session._sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR):
                cause = OSError(error, os.strerror(error))
                session._request_close(PsCloseReason.FAILED, cause, linger=False)
            elif _is_idle(session):
                _be_idle(session)
                session._waiting_since = monotonic()
            else:
                session._manager.thread.hub.switch()
    finally:
        session._waiting_since = 0.0
        unwatch(look)


def _look_at_clock(session: PsSession[Any], *, is_pulled: bool) -> None:
    """No bytes are there. `is_pulled`: a callback waits for them."""
    if session._tls is not None and session._tls.has_progress:  # but a part of a record
        session._tls.has_progress = False
        session._waiting_since = monotonic()
    if session._framed is not None and monotonic() >= session._frame_deadline:
        session._waiting_since = 0.0
        session._framed.time_out(session)
    elif _is_idle(session):
        _be_idle(session, may_call=not is_pulled)


def _be_idle(session: PsSession[Any], *, may_call: bool = True) -> None:
    """The idle time is over: close, unless there is a callback for that."""
    on_idle = session._manager.callbacks.on_idle
    if on_idle is None or not may_call:
        session._request_close(PsCloseReason.TIMEOUT)
        return
    session._waiting_since = 0.0
    session._waited = (0.0, 0)
    if session._framed is not None:
        session._framed.stop_clock(session)  # what a callback takes is not the peer's time
    if on_idle(session) is False:
        session._request_close(PsCloseReason.TIMEOUT)
    elif session._framed is not None:
        session._framed.hand_over(session)  # it may have received messages itself


def _is_idle(session: PsSession[Any]) -> bool:
    return monotonic() - session._waiting_since >= session._idle
