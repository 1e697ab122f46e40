"""What an accepted connection goes through before its session opens: the TLS handshake.

It runs in the session's own greenlet and within one time limit, so a silent peer holds up nobody.
What fails closes the session with FAILED and one record in the log; ``on_close`` is told, and
``on_open`` was not. A session that is closed meanwhile for another reason gets neither.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any

from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsTlsError
from psofa_gevent.send_line import SendLine
from psofa_gevent.tls import TlsSocket

if TYPE_CHECKING:
    from psofa_gevent.session import PsSession

__all__ = ["Prologue", "begin_tls"]

logger = logging.getLogger("psofa_gevent")

WRITE_LOOK = 0.01
"""Seconds between two looks whether a full kernel takes more of a handshake: a rare thing."""
SHORTEST_TIMER = 0.001
"""Seconds: libuv knows no shorter timer, and warns of one."""
NEVER = float("inf")


class Prologue:
    """The steps of one server, for each accepted connection."""

    def __init__(
        self, ssl_context: Callable[[], ssl.SSLContext | None], timeout: float | None
    ) -> None:
        self._ssl_context = ssl_context
        self._timeout = timeout

    def __call__(self, session: PsSession[Any]) -> None:
        """Take the steps. In the session's own greenlet; may switch."""
        deadline = NEVER if self._timeout is None else monotonic() + self._timeout
        try:
            context = self._ssl_context()
            if context is not None:
                shake_hands(session, context, deadline, server_side=True)
        except OSError as exc:
            if session._open:
                session._request_close(PsCloseReason.FAILED, exc)
                logger.warning("%r: the TLS handshake failed: %s", session, exc)


def begin_tls(
    session: PsSession[Any],
    context: ssl.SSLContext,
    deadline: float,
    *,
    server_side: bool,
    server_hostname: str | None,
) -> None:
    """Go over to TLS in the middle of a session: see `PsSession.start_tls`."""
    session._uncork()
    session._stop_watching()  # it is watched for the handshake now
    try:
        while session._line is not None and session._open:
            _wait(session, deadline, writes=True)  # what was sent before leaves before
        if session._framed is not None and session._framed.start_anew():
            raise PsTlsError(f"{session!r}: bytes came before the TLS handshake, unencrypted")
        if not session._open:
            raise PsTlsError(f"{session!r}: the session is closed")
        with _holding_senders(session):
            shake_hands(
                session,
                context,
                deadline,
                server_side=server_side,
                server_hostname=server_hostname,
            )
    except (OSError, PsTlsError) as exc:
        error = exc
        if isinstance(exc, OSError):
            error = PsTlsError(f"{session!r}: the TLS handshake failed: {exc}")
        if session._open:
            session._request_close(PsCloseReason.FAILED, error)
            logger.warning("%s", error)
        raise error from (None if error is exc else exc)


@contextlib.contextmanager
def _holding_senders(session: PsSession[Any]) -> Iterator[None]:
    """What others send in the block waits for its end: it must not leave unencrypted."""
    line = session._line = SendLine(session)
    release = line.hold()
    try:
        yield
    finally:
        release()


def shake_hands(
    session: PsSession[Any],
    context: ssl.SSLContext,
    deadline: float,
    *,
    server_side: bool,
    server_hostname: str | None = None,
) -> None:
    """Go over to TLS. In the session's own greenlet, which waits for the peer.

    Raises:
        OSError: it failed (`ssl.SSLError`), was not complete by `deadline` (`TimeoutError`), or the
            session was closed meanwhile (`ConnectionAbortedError`).
    """
    tls = TlsSocket(
        session._sock, context, server_side=server_side, server_hostname=server_hostname
    )
    while True:
        try:
            tls.shake_hands()
        except BlockingIOError:
            _wait(session, deadline, writes=tls.wants_write)
        else:
            session._use_tls(tls)
            return


def _wait(session: PsSession[Any], deadline: float, *, writes: bool) -> None:
    """Wait until there may be something to do."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError("it was not complete in time")
    if writes:
        left = min(left, WRITE_LOOK)
    else:
        session._watcher.start(session._resume)
    try:
        session._wait_until_woken(None if left == NEVER else max(left, SHORTEST_TIMER))
    finally:
        if not writes and not session._released:
            session._watcher.stop()
    if not session._open:
        raise ConnectionAbortedError("the session was closed meanwhile")
