"""Lingering: a closing session waits, before it closes its socket, until the peer has its data.

A plain close with unread bytes would send RST and destroy the data on its way to the peer (RFC
2525, section 2.17). So the session sends the data it still has, shuts down writing, then reads
and drops further bytes. Lingering ends at the peer's FIN, or when no sent byte is unacknowledged
and no byte is left to read, or after ``linger_timeout``. After PEER_CLOSE the session only sends;
after socket errors and send timeouts it does not linger at all. This part only shuts down writing;
`SessionLife._release` closes the socket.

Runs in the session's own greenlet, and switches. An abort wakes the session here; a kill is raised.
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
"""Bytes read and dropped at a time."""
FIRST_LOOK = 0.001
"""Seconds from the first to the second check whether bytes were taken or acknowledged; doubles."""
LONGEST_LOOK = 0.05
"""Most seconds between two checks."""


def linger(session: SendingHalf[Any]) -> None:
    """Wait until the peer has taken the data. Call it after the session's close was requested."""
    session._uncork_without_waiting()  # the cork of a block in another greenlet
    deadline = monotonic() + session._manager.settings.linger_timeout
    try:
        while session._send_queue is not None and not session._released:
            if _lets_callbacks_finish(session):
                _wait(session, LONGEST_LOOK)
                deadline = monotonic() + session._manager.settings.linger_timeout
            elif not (session._may_linger and _sends_on(session, deadline)):
                break
        if session._send_queue is not None and session._may_linger:
            # The close has interrupted senders, but they have not left the queue yet.
            _wait(session, FIRST_LOOK)
        if session._may_linger and session._reason is not PsCloseReason.PEER_CLOSE:
            _drain(session, deadline)
    except OSError as exc:
        session._log(logging.DEBUG, "%r: lingering ended: %s", session, exc)


def _sends_on(session: SendingHalf[Any], deadline: float) -> bool:
    """Wait until posted and collected messages have left; whether callbacks may send more.

    Also after the peer's FIN: the peer may have closed only its half. False after `deadline`.
    """
    look = FIRST_LOOK
    while session._send_queue is not None and session._send_queue.holds_batches:
        # The peer may take nothing until the data that it sends itself has been read.
        if _read_and_drop(session):
            look = FIRST_LOOK
        left = deadline - monotonic()
        if left <= 0:
            return False
        _wait(session, min(look, left))
        look = min(look * 2, LONGEST_LOOK)
    return _lets_callbacks_finish(session)


def _lets_callbacks_finish(session: SendingHalf[Any]) -> bool:
    """Whether other callbacks wait to send to this session, and SHUTDOWN lets them finish."""
    is_let = session._may_linger and session._reason is PsCloseReason.SHUTDOWN
    return is_let and session._send_queue is not None and session._send_queue.holds_callbacks


def _drain(session: SendingHalf[Any], deadline: float) -> None:
    """Shut down writing, then read and drop, until the peer has taken all sent data."""
    look = FIRST_LOOK
    while not session._eof_sent:
        try:
            session._shut_socket()
        except BlockingIOError:  # the end of the TLS stream does not fit into the kernel's buffer
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
    """Read some received bytes; empty: the peer's FIN; ``None``: no bytes are there."""
    try:
        data: bytes = session._sock.recv(DRAIN_SIZE)
    except BlockingIOError:
        return None
    return data


def _wait(session: SendingHalf[Any], seconds: float, *, readable: bool = False) -> None:
    """Wait for `seconds`, or until the session is woken, or with `readable` until bytes come.

    Raises:
        OSError: the session was aborted before the wait.
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
