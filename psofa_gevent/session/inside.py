"""What the rest of the package may ask of a session, beside its public methods: the one door.

No file outside of this folder touches a private name of a session. Each name here says what is
asked or done. Where a method of the session does just that, the name here is another name of the
method itself: a function around it would cost every caller a call, and every record in the log its
line. An `attrgetter` is the cheapest function that reads a value.

All of it belongs to the hub's thread and does not switch, where it does not say otherwise.
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
"""What a framing makes of a message."""
Alike: TypeAlias = tuple[Encode | None, HubThread, list[PsSession[Any]]]
"""What encodes messages for some sessions, where they live, and which they are."""

# Who it is, and where it lives: in any thread

manager_of: Callable[[Connection[Any]], Manager] = attrgetter("_manager")
"""The manager that it belongs to."""
thread_of: Callable[[Connection[Any]], HubThread] = attrgetter("_manager.thread")
"""Where its hub runs."""
context_of: Callable[[Connection[Any]], Context | None] = attrgetter("_context")
"""The context variables of its callbacks; None when ``on_close`` has returned."""


def id_bytes(session: Connection[Any]) -> bytes:
    """Its id, of which no `uuid.UUID` is made for that. In any thread."""
    return bytes_of(session._connection_id)


def runs_in(session: Connection[Any], greenlet: object) -> bool:
    """Whether that greenlet is the session's own, in which its sync callbacks run."""
    return greenlet is not None and greenlet is session.greenlet


# Which phase it is in: in any thread


def is_usable(session: Connection[Any]) -> bool:
    """Whether it is open, and is not held up before ``on_open``."""
    return session._open and not session._is_opening


def usable_of(sessions: Iterable[PsSession[M]]) -> list[PsSession[M]]:
    """Those of `sessions` that are usable: one call, as there may be many."""
    return [session for session in sessions if session._open and not session._is_opening]


def has_begun(session: Connection[Any]) -> bool:
    """Whether its greenlet has run."""
    return session._started


def has_on_close(session: Connection[Any]) -> bool:
    """Whether ``on_close`` is due at its end: it opened, or failed before that."""
    return not session._is_opening or session._reason is PsCloseReason.FAILED


def may_receive(session: Connection[Any]) -> bool:
    """Whether it is open, and its peer has not sent a FIN that was read."""
    return session._open and not session._eof_received


# Close

request_close = Connection._request_close
"""Ask it to end; the first reason wins."""
ask_to_close = Connection._ask_to_close
"""Ask it to end, from any thread."""
fail = Connection._fail
"""Close it with FAILED, for what somebody raised in its name, and log that."""

# The log: a record has the caller's line

log = Connection._log
"""Log about it, in its context."""
log_peer = Connection._log_peer
"""Log what its peer did, not too often."""

# Memberships: in any thread

join = Connection._join
"""Let it belong to something, until its close is requested."""
leave = Connection._leave
"""Let it belong to something no more."""


def kept_for(session: Connection[Any], membership: Membership) -> Any:
    """What it keeps for something that it belongs to; None: it does not belong there."""
    memberships = session._memberships
    return None if memberships is None else memberships.get(membership)


# Send

flush = SendingHalf._uncork_without_waiting
"""Send what was collected: now and, what the kernel does not take, later."""
post_encoded = SendingHalf._post_here
"""Post in the hub's thread what its framing has made of a message; whether it was taken."""
post_encoded_from_thread = SendingHalf._post_from_thread
"""`post_encoded` in another thread."""


def alike(sessions: Iterable[PsSession[Any]]) -> list[Alike]:
    """Group those that follow each other, and take the same bytes in the same thread.

    One call, as there may be thousands.
    """
    found: list[Alike] = []
    receivers: list[PsSession[Any]] = []
    encode: object = found  # none yet
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
    """Whether its own callback waits in a send to its peer, which does not take all of it."""
    lines = (each for each in (session._send_queue, session._outbox) if each is not None)
    return any(runs_in(session, _who_waits(parking)) for each in lines for parking in each.parkings)


def _who_waits(parking: object) -> object:
    """The greenlet that waits there, or for the task that does."""
    if isinstance(parking, GreenletParking):
        return parking.greenlet
    if isinstance(parking, TaskParking) and parking.task is not None:
        return greenlet_that_waits(parking.task)
    return None


def collect_post(session: SendingHalf[Any], data: bytes) -> bool:
    """Post what its framing has made of a message, at the next `flush`.

    Returns:
        False: there need not be one, since it was posted at once (or refused): the session has
        closed, or collects already, or others wait to send.
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
    """Whether it has opened, and has sent nothing since it had sent that many bytes."""
    return session._bytes_sent == sent and not session._is_opening and session._started


def has_nothing_to_send(session: Connection[Any]) -> bool:
    """Whether it could send, and nobody waits to do so."""
    return session._open and session._send_queue is None and not session._eof_requested


def run_in_its_thread(session: Connection[Any], function: Callable[[], object]) -> bool:
    """`HubThread.run` for a session: false if that has ended before `function` has. Waits."""
    return session._manager.thread.run(lambda: session._released, function)


async def run_in_its_thread_async(session: Connection[Any], function: Callable[[], object]) -> bool:
    """`HubThread.run_async` for a session: see `run_in_its_thread`."""
    return await session._manager.thread.run_async(lambda: session._released, function)


# Wait for bytes


def is_within_read(session: Connection[Any]) -> bool:
    """Whether it has given up its turn between two messages of one read."""
    framed = session._framed
    return session.waiting_since > 0 and framed is not None and framed.has_messages


wake = Connection._wake
"""Let it look around, soon, if it waits for bytes."""


def wake_overdue(sessions: Iterable[Connection[Any]], now: float) -> float:
    """Wake those of `sessions` whose peers were silent for too long; the next such moment."""
    due = NEVER
    for session in sessions:
        deadline = (session.waiting_since or now) + session._idle
        deadline = min(deadline, session._frame_deadline)
        due = min(due, deadline)
        if deadline <= now and session._open:
            session._wake()
    return due


def idle_seconds(session: Connection[Any]) -> float:
    """How long its peer may be silent."""
    return session._idle


def set_idle_slice(session: Connection[Any], idle_slice: Any) -> Any:
    """Let `idle_slice` be what looks at it for idleness; what that was before."""
    before, session._slice = session._slice, idle_slice
    return before


# Before ``on_open``, in its own greenlet


def peek(session: Connection[Any], size: int) -> bytes:
    """What has come, at most `size` bytes, which stay there; none: the peer's FIN.

    Raises:
        OSError: as of ``recv``; nothing has come (`BlockingIOError`).
    """
    seen: bytes = session._sock.recv(size, _socket.MSG_PEEK)
    return seen


def take(session: Connection[Any], size: int) -> bytes:
    """At most `size` bytes that have come, before it counts any. Errors as of `peek`."""
    data: bytes = session._sock.recv(size)
    return data


def say(session: Connection[Any], words: bytes) -> None:
    """Send a few words unencrypted, as far as the kernel takes them now, which is all of them."""
    with contextlib.suppress(OSError):
        session._sock.send(words)


use_proxy = Connection._use_proxy
"""Its peer is the one of whom a load balancer's header tells."""

# A callback's time


def call_limited(
    session: PsSession[Any], limit: TimeLimit, call: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Call a callback of it, whose time `limit` counts, in its own greenlet. Switches as that."""
    session._time_limit = limit
    try:
        return call(session, *args)
    finally:
        session._time_limit = None


# Begin and end: its manager's


def greenlet_of(session: SessionLife[Any]) -> SessionGreenlet:
    """The greenlet in which it lives, which its manager starts."""
    greenlet = session.greenlet
    assert greenlet is not None
    return greenlet


def forget_context(session: Connection[Any]) -> None:
    """Let go of its context: no callback comes any more."""
    session._context = None


def kill(session: SessionLife[Any], *, again: bool) -> None:
    """Throw `GreenletExit` into whatever it still does.

    `again`: a callback that runs has swallowed one, so what works beside it gets one as well; at
    first it is left for the session to kill, once its callback has ended.
    """
    if session.greenlet is not None:
        session.greenlet.kill(block=False)
    if session.greenlet is None or (again and session._reaper is None):
        kill_tasks(session)


def abandon(session: SessionLife[Any]) -> None:
    """Close its socket, though a callback of it runs and does not end."""
    session._release()
    if session._reaper is not None:
        session._reaper.stop()


def drop(
    session: SessionLife[Any],
    reason: PsCloseReason,
    cause: BaseException | None,
    gone: Callable[[], object],
) -> None:
    """End it before its greenlet has run: no callback hears of it. Again without effect.

    `gone` is called when its tasks have ended, too: at once if there is none.
    """
    session._drop(reason, cause)
    if session._tasks and session._reaper is None:
        session._reaper = TaskReaper(session, gone)
    elif not session._tasks:
        gone()


def stop_reaper(session: SessionLife[Any]) -> None:
    """Kill its tasks no more: all have ended."""
    if session._reaper is not None:
        session._reaper.stop()
        session._reaper = None


end_with_hub = Connection._end_with_hub
"""Close its socket: its hub was destroyed. In any thread."""
let_go = Connection._let_go
"""Leave it to the parent process (`psofa_gevent.hub.forking`)."""
