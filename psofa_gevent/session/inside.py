"""What other packages may ask of a session, in addition to its public methods.

No file outside of this folder uses a private name of a session. Where a method of the session does
exactly what is asked, the name here is an alias of that method: a wrapper would add a call for
every caller, and give log records the wrapper's line instead of the caller's. An `attrgetter` is
the cheapest function that reads a value.

Everything here belongs to the hub's thread and does not switch, unless it says otherwise.
"""

from __future__ import annotations

import _socket
import contextlib
from collections.abc import Callable, Iterable
from contextvars import Context
from operator import attrgetter
from typing import Any, TypeAlias

from psofa_gevent.aio.coroutines import greenlet_that_waits
from psofa_gevent.enums import PsCloseReason
from psofa_gevent.hub.parking import GreenletParking, TaskParking
from psofa_gevent.hub.thread import HubThread
from psofa_gevent.hub.times import NEVER
from psofa_gevent.messages import M
from psofa_gevent.session.connection import Connection, Manager, Membership, TimeLimit
from psofa_gevent.session.connection_id import bytes_of
from psofa_gevent.session.life import SessionGreenlet, SessionLife
from psofa_gevent.session.sending import COLLECTED, SendingHalf
from psofa_gevent.session.session import PsSession
from psofa_gevent.session.tasks import TaskReaper, kill_tasks

Encode: TypeAlias = Callable[[Any], bytes]
"""Encodes a message: a framing's ``encode``."""
Alike: TypeAlias = tuple[Encode | None, HubThread, list[PsSession[Any]]]
"""Sessions of one hub thread that send with one encoder: the encoder, the thread, the sessions."""

# Identity and place: in any thread

manager_of: Callable[[Connection[Any]], Manager] = attrgetter("_manager")
"""The session's manager."""
thread_of: Callable[[Connection[Any]], HubThread] = attrgetter("_manager.thread")
"""The thread of the session's hub."""
context_of: Callable[[Connection[Any]], Context | None] = attrgetter("_context")
"""The context of the session's callbacks; None when ``on_close`` has returned."""


def id_bytes(session: Connection[Any]) -> bytes:
    """The bytes of the session's id, without making a `uuid.UUID`. In any thread."""
    return bytes_of(session._connection_id)


def runs_in(session: Connection[Any], greenlet: object) -> bool:
    """Whether `greenlet` is the session's own, in which its sync callbacks run."""
    return greenlet is not None and greenlet is session.greenlet


# Phase: in any thread


def is_usable(session: Connection[Any]) -> bool:
    """Whether the session is open and has passed its preamble."""
    return session._open and not session._is_opening


def usable_of(sessions: Iterable[PsSession[M]]) -> list[PsSession[M]]:
    """The usable ones among `sessions`: one call for all, because there may be many."""
    return [session for session in sessions if session._open and not session._is_opening]


def has_begun(session: Connection[Any]) -> bool:
    """Whether the session's greenlet has begun to run."""
    return session._started


def has_on_close(session: Connection[Any]) -> bool:
    """Whether ``on_close`` is due at the end: the session opened, or failed before that."""
    return not session._is_opening or session._reason is PsCloseReason.FAILED


def may_receive(session: Connection[Any]) -> bool:
    """Whether the session is open and has not read its peer's FIN."""
    return session._open and not session._eof_received


# Close

request_close = Connection._request_close
"""Ask the session to end; the first reason wins."""
ask_to_close = Connection._ask_to_close
"""Ask the session to end, from any thread."""
fail = Connection._fail
"""Close the session with FAILED for an exception of code that acts for it, and log it."""

# The log: a record has the caller's line

log = Connection._log
"""Log about the session, in its context."""
log_peer = Connection._log_peer
"""Log what the session's peer did, not too often."""

# Memberships: in any thread

join = Connection._join
"""Add a membership, which lasts until the session's close is requested."""
leave = Connection._leave
"""End a membership of the session."""


def kept_for(session: Connection[Any], membership: Membership) -> Any:
    """The state kept for `membership`; None: the session does not belong to it."""
    memberships = session._memberships
    return None if memberships is None else memberships.get(membership)


# Send

flush = SendingHalf._uncork_without_waiting
"""Send the collected messages: what the kernel does not take now leaves later."""
post_encoded = SendingHalf._post_here
"""Post an encoded message, in the hub's thread; return whether it was taken."""
post_encoded_from_thread = SendingHalf._post_from_thread
"""`post_encoded`, in another thread than the hub's."""


def alike(sessions: Iterable[PsSession[Any]]) -> list[Alike]:
    """Group consecutive sessions that have the same encoder and the same hub thread.

    One call for all, because there may be thousands.
    """
    found: list[Alike] = []
    receivers: list[PsSession[Any]] = []
    encode: object = found  # differs from every encoder
    thread = None
    for session in sessions:
        own = session._encode
        if own != encode or session._manager.thread is not thread:
            encode, thread = own, session._manager.thread
            receivers = []
            found.append((own, thread, receivers))
        receivers.append(session)
    return found


def is_held_by_its_peer(session: SendingHalf[Any]) -> bool:
    """Whether the session's own callback waits in a send for the peer to take more."""
    lines = (each for each in (session._send_queue, session._outbox) if each is not None)
    return any(runs_in(session, _who_waits(parking)) for each in lines for parking in each.parkings)


def _who_waits(parking: object) -> object:
    """The greenlet that waits at `parking`, or that waits for the task that waits there."""
    if isinstance(parking, GreenletParking):
        return parking.greenlet
    if isinstance(parking, TaskParking) and parking.task is not None:
        return greenlet_that_waits(parking.task)
    return None


def collect_post(session: SendingHalf[Any], data: bytes) -> bool:
    """Collect an encoded message, to be posted at the next `flush`.

    Returns:
        Whether a `flush` is needed. False: the message was posted at once, because the session was
        corked or had a send queue; or was refused, because the session is closed.
    """
    is_corked = session._cork is not None or session._send_queue is not None
    if is_corked or not session._open or session._eof_requested:
        session._post_here(data)
        return False
    session._cork = [data]
    session._corked_size = len(data) + COLLECTED
    session._cork_has_posts = True
    return True


def is_quiet(session: Connection[Any], sent: int) -> bool:
    """Whether the session has opened, and the number of bytes it has sent is still `sent`."""
    return session._bytes_sent == sent and not session._is_opening and session._started


def has_nothing_to_send(session: Connection[Any]) -> bool:
    """Whether the session may send, and nobody waits to send."""
    return session._open and session._send_queue is None and not session._eof_requested


def run_in_its_thread(session: Connection[Any], function: Callable[[], object]) -> bool:
    """Run `function` in the hub's thread, and wait for it. From another thread.

    Returns:
        False if the session ended before `function` ran (`HubThread.run`).
    """
    return session._manager.thread.run(lambda: session._released, function)


async def run_in_its_thread_async(session: Connection[Any], function: Callable[[], object]) -> bool:
    """`run_in_its_thread` for coroutines (`HubThread.run_async`)."""
    return await session._manager.thread.run_async(lambda: session._released, function)


# Wait for bytes


def is_within_read(session: Connection[Any]) -> bool:
    """Whether the session has given up its turn between two messages of one read."""
    framed = session._framed
    return session.waiting_since > 0 and framed is not None and framed.has_messages


wake = Connection._wake
"""Wake the session soon, if it is in a wait of its own."""


def wake_overdue(sessions: Iterable[Connection[Any]], now: float) -> float:
    """Wake the sessions whose peers were silent for too long; return the earliest deadline."""
    due = NEVER
    for session in sessions:
        deadline = (session.waiting_since or now) + session._idle
        deadline = min(deadline, session._frame_deadline)
        due = min(due, deadline)
        if deadline <= now and session._open:
            session._wake()
    return due


def idle_seconds(session: Connection[Any]) -> float:
    """Seconds that the session waits for bytes before it closes."""
    return session._idle


def set_idle_slice(session: Connection[Any], idle_slice: Any) -> Any:
    """Set the `IdleSlice` that checks the session for idleness; return the one before."""
    before, session._slice = session._slice, idle_slice
    return before


# Before ``on_open``, in the session's own greenlet


def peek(session: Connection[Any], size: int) -> bytes:
    """Return at most `size` received bytes, and leave them in the socket; none: the peer's FIN.

    Raises:
        OSError: as for ``recv``; `BlockingIOError` if nothing was received.
    """
    seen: bytes = session._sock.recv(size, _socket.MSG_PEEK)
    return seen


def take(session: Connection[Any], size: int) -> bytes:
    """Read at most `size` received bytes, without counting them. Errors as for `peek`."""
    data: bytes = session._sock.recv(size)
    return data


def say(session: Connection[Any], words: bytes) -> None:
    """Send a few unencrypted bytes, all of which fit into the kernel's buffer. Ignores errors."""
    with contextlib.suppress(OSError):
        session._sock.send(words)


use_proxy = Connection._use_proxy
"""Take the peer's endpoint from a load balancer's header."""

# A callback's time


def call_limited(
    session: PsSession[Any], limit: TimeLimit, call: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Call a callback whose time `limit` counts. In the session's greenlet; `call` may switch."""
    session._time_limit = limit
    try:
        return call(session, *args)
    finally:
        session._time_limit = None


# Begin and end, for the manager


def greenlet_of(session: SessionLife[Any]) -> SessionGreenlet:
    """The session's own greenlet, which its manager starts."""
    greenlet = session.greenlet
    assert greenlet is not None
    return greenlet


def forget_context(session: Connection[Any]) -> None:
    """Drop the session's context: no callback will be called any more."""
    session._context = None


def kill(session: SessionLife[Any], *, again: bool) -> None:
    """Throw `GreenletExit` into the session's greenlet, or, if that has ended, into its tasks.

    `again`: the running callback has swallowed a first one, so the session tasks get one as well.
    The first time they are left to the session, which kills them when its callback has ended.
    """
    if session.greenlet is not None:
        session.greenlet.kill(block=False)
    if session.greenlet is None or (again and session._reaper is None):
        kill_tasks(session)


def abandon(session: SessionLife[Any]) -> None:
    """Close the socket of a session whose running callback does not end."""
    session._release()
    if session._reaper is not None:
        session._reaper.stop()


def drop(
    session: SessionLife[Any],
    reason: PsCloseReason,
    cause: BaseException | None,
    gone: Callable[[], object],
) -> None:
    """End a session before its greenlet has run: no callback is called. May be called again.

    `gone` is called when its session tasks have ended: at once if there are none.
    """
    session._drop(reason, cause)
    if session._tasks and session._reaper is None:
        session._reaper = TaskReaper(session, gone)
    elif not session._tasks:
        gone()


def stop_reaper(session: SessionLife[Any]) -> None:
    """Stop killing the session's tasks: all have ended."""
    if session._reaper is not None:
        session._reaper.stop()
        session._reaper = None


end_with_hub = Connection._end_with_hub
"""Close the socket of a session whose hub was destroyed. In any thread."""
let_go = Connection._let_go
"""Leave the session to the parent process (`psofa_gevent.hub.forking`)."""
