"""The TLS handshake of a session, before ``on_open`` or in the middle of the session.

A callback begins a handshake in the middle of a session (`begin_tls`, `begin_tls_async`). The
handshake runs in the session's own greenlet, or in the asyncio task for which that greenlet waits;
it switches, or awaits, whenever it waits for the peer. Messages that others send meanwhile wait. If
the handshake is not completed they never leave, because they would leave unencrypted.
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
from psofa_gevent.hub.parking import Parking, TaskParking, run_in_greenlet
from psofa_gevent.hub.times import NEVER, SHORTEST_TIMER
from psofa_gevent.session.send_queue import SendQueue
from psofa_gevent.tls.socket import TlsSocket

if TYPE_CHECKING:
    from psofa_gevent.session.receiving import ReceivingHalf

__all__ = ["Handshake", "SessionParking", "begin_tls", "begin_tls_async", "wait_for_peer"]

WRITE_LOOK = 0.01
"""Seconds between two tries to send a handshake to a full kernel buffer, which is rare."""


class SessionParking:
    """Waits in the session's own greenlet, in a wait of the session, which a close ends."""

    __slots__ = ("_session",)

    def __init__(self, session: ReceivingHalf[Any]) -> None:
        self._session = session

    def __await__(self) -> Generator[Any, None, None]:
        self._session._wait_until_woken(None)
        yield from ()

    def wake(self) -> bool:
        """Wake the session soon."""
        self._session._wake()
        return True


@dataclass(frozen=True, slots=True)
class Handshake:
    """A TLS handshake that a session must complete before `deadline` (monotonic clock)."""

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
        """Make a handshake from a user's arguments; its timeout begins now.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range or does not fit the others.
        """
        check_ssl_context("ssl_context", ssl_context, server_side=server_side)
        if not isinstance(ssl_context, ssl.SSLContext):
            raise TypeError("ssl_context must be an ssl.SSLContext, not None")
        check_hostname("server_hostname", server_hostname, ssl_context)
        check_seconds("timeout", timeout)
        deadline = NEVER if timeout is None else monotonic() + timeout
        return cls(ssl_context, deadline, server_side, server_hostname)

    async def shake_hands(self, session: ReceivingHalf[Any], parking: Parking) -> None:
        """Run the handshake and give the session its TLS socket. Waits for the peer in `parking`.

        Raises:
            OSError: the handshake failed (`ssl.SSLError`), was not complete in time
                (`TimeoutError`), or the session was closed meanwhile (`ConnectionAbortedError`).
        """
        tls = TlsSocket(
            session._sock,
            self.context,
            server_side=self.server_side,
            server_hostname=self.server_hostname,
        )
        tls.wire_sent = session._wire_sent  # the senders in the queue count from there
        while True:
            try:
                tls.shake_hands()
            except BlockingIOError:
                await wait_for_peer(session, self.deadline, parking, writes=tls.wants_write)
            else:
                session._use_tls(tls)
                return


def begin_tls(session: ReceivingHalf[Any], handshake: Handshake) -> None:
    """Begin TLS in the middle of a session (`PsSession.start_tls`). Switches."""
    if getcurrent() is not session.greenlet or session.waiting_since:
        raise RuntimeError(
            f"{session!r}: start_tls must be called in a sync callback of the session "
            "(start_tls_async in an async one)"
        )
    _check_is_plain(session)
    session._uncork()
    run_in_greenlet(_go_over(session, handshake, SessionParking(session)))


async def begin_tls_async(session: ReceivingHalf[Any], handshake: Handshake) -> None:
    """Begin TLS in an async callback (`PsSession.start_tls_async`).

    The session's own greenlet waits for that callback, and does not use the read watcher meanwhile.
    """
    if not _is_awaited_by(session):
        raise RuntimeError(
            f"{session!r}: start_tls_async must be awaited in an async callback of the session"
        )
    _check_is_plain(session)
    await session._uncork_async()
    await _go_over(session, handshake, TaskParking())


def _is_awaited_by(session: ReceivingHalf[Any]) -> bool:
    """Whether the running task is the task of a callback of `session`.

    (The task keeps its exception, which keeps its frames: so a frame must not keep the task.)
    """
    task = asyncio.current_task()
    waiting = None if task is None else greenlet_that_waits(task)
    return waiting is not None and waiting is session.greenlet


def _check_is_plain(session: ReceivingHalf[Any]) -> None:
    if session._tls is not None:
        raise RuntimeError(f"{session!r} has TLS already")


async def _go_over(session: ReceivingHalf[Any], handshake: Handshake, parking: Parking) -> None:
    """Send what is in the queue, then run the handshake. Waits in `parking`."""
    session.stop_watching()  # the handshake uses the watcher now
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


def _failed(session: ReceivingHalf[Any], error: PsTlsError) -> PsTlsError:
    """Close the session with `error`, unless it is closed, and return `error`, to be raised.

    A local name for the error in the frame that raises it would be a reference cycle.
    """
    if session._open:
        session._request_close(PsCloseReason.FAILED, error)
        session._log_peer("the TLS handshake failed", "%s", error)
    return error


@contextlib.contextmanager
def _holding_senders(session: ReceivingHalf[Any], parking: Parking) -> Iterator[None]:
    """Make messages that others send wait for the end of the block: they must leave encrypted.

    A close wakes `parking`, as it wakes all senders. If the block fails, nothing more is sent, not
    even posts. If the block was interrupted (by a kill, for example), the session closes with
    FAILED.
    """
    queue = session._send_queue = SendQueue(session)
    release = queue.hold(parking)
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
    session: ReceivingHalf[Any], deadline: float, parking: Parking, *, writes: bool
) -> None:
    """Wait until bytes may have come; with `writes`, until bytes may leave.

    Raises:
        OSError: `deadline` has passed (`TimeoutError`), or the session was closed meanwhile
            (`ConnectionAbortedError`).
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


def _become_readable(session: ReceivingHalf[Any], parking: Parking) -> None:
    session._watcher.stop()  # it would fire again until the bytes are read
    parking.wake()
