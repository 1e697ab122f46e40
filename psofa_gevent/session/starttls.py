"""The TLS handshake of a session, before ``on_open`` or in the middle of the session.

A handshake in the middle of a session (`begin_tls`, `begin_tls_async`) is a callback's: it runs in
the session's own greenlet, or in the task for which that waits. What others send meanwhile waits,
and if the handshake is not completed it never leaves, as that would be unencrypted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from gevent import getcurrent

from psofa_gevent.aio.coroutines import greenlet_that_waits
from psofa_gevent.checks import check_hostname, check_seconds, check_ssl_context
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.errors import PsTlsError
from psofa_gevent.hub.forking import unwatch, watch
from psofa_gevent.hub.times import NEVER, SHORTEST_TIMER
from psofa_gevent.session.send_queue import Parking, SendQueue, TaskParking, run_in_greenlet
from psofa_gevent.tls.socket import TlsSocket

if TYPE_CHECKING:
    from psofa_gevent.session.session import PsSession

__all__ = ["Handshake", "SessionParking", "begin_tls", "begin_tls_async", "wait_for_peer"]

WRITE_LOOK = 0.01
"""Seconds between two looks whether a full kernel takes more of a handshake: a rare thing."""


class SessionParking:
    """Waits as the session itself does, in its own greenlet: so whoever closes it wakes it."""

    __slots__ = ("_session",)

    def __init__(self, session: PsSession[Any]) -> None:
        self._session = session

    def __await__(self) -> Generator[Any, None, None]:
        self._session._wait_until_woken(None)
        yield from ()

    def wake(self) -> bool:
        """Go on, soon."""
        self._session._wake()
        return True


@dataclass(frozen=True, slots=True)
class Handshake:
    """A TLS handshake that a session is to go through, until `deadline` at most."""

    context: ssl.SSLContext
    deadline: float
    server_side: bool
    server_hostname: str | None = None

    @classmethod
    def of(
        cls,
        ssl_context: object,
        server_side: bool,
        server_hostname: str | None,
        timeout: float | None,
    ) -> Handshake:
        """One as a user asks for it, beginning now.

        Raises:
            TypeError, ValueError: an argument is not what it should be.
        """
        check_ssl_context("ssl_context", ssl_context, server_side=server_side)
        if not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError("ssl_context must be an ssl.SSLContext, not None")
        check_hostname("server_hostname", server_hostname, ssl_context)
        check_seconds("timeout", timeout)
        deadline = NEVER if timeout is None else monotonic() + timeout
        return cls(ssl_context, deadline, server_side, server_hostname)

    async def shake_hands(self, session: PsSession[Any], parking: Parking) -> None:
        """Go over to TLS. Waits for the peer there.

        Raises:
            OSError: it failed (`ssl.SSLError`), was not complete in time (`TimeoutError`), or the
                session was closed meanwhile (`ConnectionAbortedError`).
        """
        tls = TlsSocket(
            session._sock,
            self.context,
            server_side=self.server_side,
            server_hostname=self.server_hostname,
        )
        tls.wire_sent = session._wire_sent  # whoever waits in line counts on
        while True:
            try:
                tls.shake_hands()
            except BlockingIOError:
                await wait_for_peer(session, self.deadline, parking, writes=tls.wants_write)
            else:
                session._use_tls(tls)
                return


def begin_tls(session: PsSession[Any], handshake: Handshake) -> None:
    """Go over to TLS in the middle of a session: see `PsSession.start_tls`."""
    if getcurrent() is not session._greenlet or session._waiting_since:
        raise RuntimeError(
            f"{session!r}: start_tls must be called in a sync callback of the session "
            "(start_tls_async in an async one)"
        )
    _check_is_plain(session)
    session._uncork()
    run_in_greenlet(_go_over(session, handshake, SessionParking(session)))


async def begin_tls_async(session: PsSession[Any], handshake: Handshake) -> None:
    """Go over to TLS in an async callback: see `PsSession.start_tls_async`.

    The session's own greenlet waits for that callback, and leaves the read watcher alone.
    """
    if not _is_awaited_by(session):
        raise RuntimeError(
            f"{session!r}: start_tls_async must be awaited in an async callback of the session"
        )
    _check_is_plain(session)
    await session._uncork_async()
    await _go_over(session, handshake, TaskParking())


def _is_awaited_by(session: PsSession[Any]) -> bool:
    """Whether the running task is that of a callback of `session`.

    (Its error keeps the frames that it came through, so none of those may keep the task.)
    """
    task = asyncio.current_task()
    waiting = None if task is None else greenlet_that_waits(task)
    return waiting is not None and waiting is session._greenlet


def _check_is_plain(session: PsSession[Any]) -> None:
    if session._tls is not None:
        raise RuntimeError(f"{session!r} has TLS already")


async def _go_over(session: PsSession[Any], handshake: Handshake, parking: Parking) -> None:
    """What both do, and where it waits."""
    session._stop_watching()  # it is watched for the handshake now
    try:
        while session._send_queue is not None and session._open:
            await wait_for_peer(session, handshake.deadline, parking, writes=True)  # sent before
        if session._framed is not None and session._framed.start_anew():
            raise PsTlsError(f"{session!r}: bytes came before the TLS handshake, unencrypted")
        if not session._open:
            raise PsTlsError(f"{session!r}: the session is closed")
        with _holding_senders(session, parking):
            await handshake.shake_hands(session, parking)
    except PsTlsError as exc:
        _failed(session, exc)
        raise
    except OSError as exc:
        error = f"{session!r}: the TLS handshake failed: {exc}"
        raise _failed(session, PsTlsError(error)) from exc


def _failed(session: PsSession[Any], error: PsTlsError) -> PsTlsError:
    """Close the session with `error`, unless it is closed, and return it, to be raised.

    In the frame that raises it, a name for it would be a cycle.
    """
    if session._open:
        session._request_close(PsCloseReason.FAILED, error)
        session._log_peer("the TLS handshake failed", "%s", error)
    return error


@contextlib.contextmanager
def _holding_senders(session: PsSession[Any], parking: Parking) -> Iterator[None]:
    """What others send in the block waits for its end: it must not leave unencrypted.

    A close wakes `parking`, as it wakes all senders. If the block fails nothing is sent any more,
    also not of what was posted; and if it was broken off (by a kill, say), the session fails.
    """
    line = session._send_queue = SendQueue(session)
    release = line.hold(parking)
    try:
        yield
    except BaseException as exc:
        session._break_stream()
        if not isinstance(exc, OSError):
            session._request_close(PsCloseReason.FAILED, exc)
        raise
    finally:
        release()


async def wait_for_peer(
    session: PsSession[Any], deadline: float, parking: Parking, *, writes: bool
) -> None:
    """Wait until something may have come; with `writes`, until something may leave.

    Raises:
        OSError: it is `deadline` (`TimeoutError`), or the session was closed meanwhile.
    """
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError("it was not complete in time")
    if writes:
        left = min(left, WRITE_LOOK)
    else:
        session._watcher.start(_become_readable, session, parking)
    timer = None if left == NEVER else watch(session._loop.timer(max(left, SHORTEST_TIMER)))
    if timer is not None:
        timer.start(parking.wake)
    try:
        await parking
    finally:
        unwatch(timer)
        if not writes and not session._released:
            session._watcher.stop()
    if not session._open:
        raise ConnectionAbortedError("the session was closed meanwhile")


def _become_readable(session: PsSession[Any], parking: Parking) -> None:
    session._watcher.stop()  # it would tell of it again until someone reads
    parking.wake()
