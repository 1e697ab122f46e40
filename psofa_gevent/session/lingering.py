"""The end of a session that closes: the peer takes what was sent, before the socket is closed.

A plain close with unread bytes would send RST and destroy what is on its way (RFC 2525, section
2.17). So the session sends what it still has, shuts down writing, then reads and drops what comes.
It is over at the peer's FIN, or when nothing is unacknowledged and nothing left to read, or after
``linger_timeout``. After PEER_CLOSE it only sends, and after socket errors and send timeouts there
is none of it.

Runs in the session's own greenlet, and switches. Whoever aborts the session wakes it here; a kill
is raised.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.net.sockopts import unacknowledged

if TYPE_CHECKING:
    from psofa_gevent.session.sending import SendingHalf

__all__ = ["linger"]

DRAIN_SIZE = 65_536
"""Bytes read and thrown away at a time."""
FIRST_LOOK = 0.001
"""Seconds until it looks again whether its bytes are taken, or acknowledged; then doubled."""
LONGEST_LOOK = 0.05


def linger(session: SendingHalf[Any]) -> None:
    """Let the peer take what was sent. The session's close was requested."""
    session._uncork_without_waiting()  # of a block in another greenlet
    deadline = monotonic() + session._manager.settings.linger_timeout
    try:
        while session._send_queue is not None and not session._released:
            if _lets_callbacks_finish(session):
                _wait(session, LONGEST_LOOK)
                deadline = monotonic() + session._manager.settings.linger_timeout
            elif not (session._may_linger and _sends_on(session, deadline)):
                break
        if session._send_queue is not None and session._may_linger:
            # Senders that the close has interrupted have yet to leave the queue.
            _wait(session, FIRST_LOOK)
        if session._may_linger and session._reason is not PsCloseReason.PEER_CLOSE:
            _drain(session, deadline)
    except OSError as exc:
        session._log(logging.DEBUG, "%r: lingering ended: %s", session, exc)


def _sends_on(session: SendingHalf[Any], deadline: float) -> bool:
    """Wait for what was posted or collected, and has not left; whether there may be more of it.

    Also after the peer's FIN: it may have closed its half only.
    """
    look = FIRST_LOOK
    while session._send_queue is not None and session._send_queue.holds_batches:
        # The peer may not take anything before it is rid of what it sends itself.
        if _read_and_drop(session):
            look = FIRST_LOOK
        left = deadline - monotonic()
        if left <= 0:
            return False
        _wait(session, min(look, left))
        look = min(look * 2, LONGEST_LOOK)
    return _lets_callbacks_finish(session)


def _lets_callbacks_finish(session: SendingHalf[Any]) -> bool:
    """Whether callbacks of other sessions send to this one, and SHUTDOWN lets them finish."""
    is_let = session._may_linger and session._reason is PsCloseReason.SHUTDOWN
    return is_let and session._send_queue is not None and session._send_queue.holds_callbacks


def _drain(session: SendingHalf[Any], deadline: float) -> None:
    """Shut down writing, then read and drop, until the peer has taken all that was sent."""
    look = FIRST_LOOK
    while not session._eof_sent:
        try:
            session._shut_socket()
        except BlockingIOError:  # with TLS
            _read_and_drop(session)
            left = deadline - monotonic()
            if left <= 0:
                return
            _wait(session, min(LONGEST_LOOK, left))
    while True:
        read = _read_and_drop(session)
        if read == b"":
            session._eof_received = True
            return
        if read is None and unacknowledged(session._sock) == 0:
            return
        left = deadline - monotonic()
        if left <= 0:
            return
        _wait(session, min(look, left), readable=True)
        look = min(look * 2, LONGEST_LOOK)


def _read_and_drop(session: SendingHalf[Any]) -> bytes | None:
    """Some of what has come; empty: the peer's FIN; ``None``: nothing is there."""
    try:
        data: bytes = session._sock.recv(DRAIN_SIZE)
    except BlockingIOError:
        return None
    return data


def _wait(session: SendingHalf[Any], seconds: float, *, readable: bool = False) -> None:
    """Wait, at most so long; ends early when the session is woken, or (`readable`) bytes come.

    Raises:
        OSError: the session was aborted before.
    """
    if session._released:
        raise OSError("aborted")
    if readable:
        session._watcher.start(session._resume)
    try:
        session._wait_until_woken(max(seconds, FIRST_LOOK))
    finally:
        if readable and not session._released:
            session._watcher.stop()
