"""Receiving by asking: the next message of a session, for straight-line code.

Runs in the session's own greenlet, in the middle of a callback, and waits as the session does
between two callbacks: with the same clock for idle peers and unfinished messages, and with what was
collected sent before.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsClosedError, PsSendError
from psofa_gevent.hub.forking import unwatch, watch
from psofa_gevent.hub.times import NEVER, SHORTEST_TIMER
from psofa_gevent.session.framed import NOTHING
from psofa_gevent.session.reading import read

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession

__all__ = ["receive_next"]

RETRY = 0.005
"""Seconds after which one whose time was over is woken again, if it has waited on."""


def receive_next(session: PsSession[Any], timeout: float | None) -> Any:
    """The next message. Arguments and errors as of `PsSession.receive`."""
    limit = session._time_limit
    if session._framed is not None:
        message = session._framed.take(session)
        if message is not NOTHING:
            if limit is not None:
                limit.restart()
            return message
    if limit is None:
        return _wait_for_message(session, timeout)
    with limit.paused():
        return _wait_for_message(session, timeout)


def _wait_for_message(session: PsSession[Any], timeout: float | None) -> Any:
    if timeout is None:
        return _read_message(session, NEVER)
    # Again and again: it may come a little early, or in the moment in which bytes come.
    timer = watch(session._loop.timer(max(timeout, SHORTEST_TIMER), RETRY))
    timer.start(session._resume)
    try:
        return _read_message(session, monotonic() + timeout)
    finally:
        unwatch(timer)


def _read_message(session: PsSession[Any], deadline: float) -> Any:
    """Read until a message is whole, or until `deadline`."""
    while True:
        _get_ready(session, waits=deadline == NEVER)
        data = None
        try:
            data = read(session, deadline)
        finally:
            if not data and session._framed is not None:
                session._framed.stop_clock(session)
        if data is None and session._open:
            raise TimeoutError(f"{session!r}: no message came in time")
        if not data:
            _end(session, has_eof=data is not None)
        session._received_at = session._ready.now
        if session._framed is None:
            session._messages_received += 1
            return data
        session._framed.feed(session, data)
        message = session._framed.take(session)
        if message is not NOTHING:
            return message
        del data  # a session that waits owns no buffer


def _get_ready(session: PsSession[Any], *, waits: bool) -> None:
    """Do what comes before a wait for bytes. Raises when there is nothing to wait for.

    `waits`: what was collected may wait for the peer, too.
    """
    if session._open:
        _send_collected(session, waits=waits)
        if session._framed is not None:
            session._framed.set_deadline(session)
    if not session._open or session._eof_received:
        raise _closed_error(session)
    waited, received = session._waited
    if waited and received == session._bytes_received:
        # With no bytes in between it is still the same wait.
        session._waiting_since = monotonic() - waited
        if session._slice is not None:
            session._slice.due = min(session._slice.due, session._waiting_since + session._idle)


def _send_collected(session: PsSession[Any], *, waits: bool) -> None:
    if not waits:
        session._uncork_without_waiting()
        return
    try:
        session._uncork()
    except PsSendError as exc:
        if session._open:
            raise
        raise _closed_error(session) from exc


def _end(session: PsSession[Any], *, has_eof: bool) -> NoReturn:
    if has_eof:
        if session._framed is not None and not session._eof_received:
            session._framed.end(session)
        session._eof_received = True
        if not session._manager.settings.allow_half_open or session._eof_sent:
            session._request_close(PsCloseReason.PEER_CLOSE)
    raise _closed_error(session)


def _closed_error(session: PsSession[Any]) -> PsClosedError:
    why = "the peer sends no more" if session._open else session.close_reason.name
    return PsClosedError(f"{session!r}: no message will come: {why}")
