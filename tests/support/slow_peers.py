"""Sessions whose peers read when the test says so, and what sends to them.

The kernel's buffers between are made small, so that a message of `BIG` bytes waits soon; `fill`
fills them to the last byte, so that nothing of the next message can leave.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import gevent
import pytest

from acting import wait_until_stalled
from helpers import Stopwatch, stalled_peer
from psofa_gevent import PsCloseReason, PsSendError, PsServer, PsSession
from psofa_gevent.testing import (
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    connected_session,
    eventually,
)

BIG = 200_000
"""Bytes: more than the small buffers of `Line` take, and soon read."""
HUGE = 32 * 1024 * 1024
"""Bytes: more than the kernel's ordinary buffers take."""
SMALL_BUFFER = 32_768
LARGE_BUFFER = 212_992
"""Bytes: what Linux allows at most, unless configured otherwise."""
SHORT = 0.3
"""Seconds: a send's timeout that is waited for."""

Outcome: TypeAlias = "gevent.Greenlet[..., BaseException | None]"


class Line(NamedTuple):
    """A session with small buffers, and its peer, which has read nothing so far."""

    server: PsServer
    session: PsSession
    peer: ScriptedClient
    callback: RecordingCallback

    def close_reason(self) -> object:
        return close_reason(self.callback, self.session)


class FullLine(NamedTuple):
    """A session whose buffers are full to the last byte until its peer reads."""

    session: PsSession
    peer: ScriptedClient
    callback: RecordingCallback
    filled: int


def close_reason(callback: RecordingCallback, session: PsSession) -> object:
    """Wait for the close; the reason of the only ``on_close``."""
    events = callback.wait_for("on_close", session=session)
    assert len(events) == 1
    return events[0].value


LineFactory: TypeAlias = Callable[..., Line]
FullLineFactory: TypeAlias = Callable[..., FullLine]


@pytest.fixture
def line(ps_server: ServerFactory) -> Iterator[LineFactory]:
    """Makes a `Line`: ``line(callback, **settings)``."""
    with contextlib.ExitStack() as peers:

        def make(callback: RecordingCallback | None = None, **settings: Any) -> Line:
            callback = callback or RecordingCallback()
            own = {"linger_timeout": 0.0, "send_buffer_size": SMALL_BUFFER}
            server = ps_server(callback, **{**own, **settings})
            peer = peers.enter_context(stalled_peer(server.address))
            session = callback.wait_for("on_open")[-1].session
            assert session is not None
            return Line(server, session, peer, callback)

        yield make


@pytest.fixture
def full_line() -> Iterator[FullLineFactory]:
    """Makes a `FullLine`: ``full_line(callback)``.

    Of a Unix socket pair: a TCP connection that is full may take some bytes more whenever the
    kernel probes the peer's window.
    """
    with contextlib.ExitStack() as pairs:

        def make(callback: RecordingCallback | None = None) -> FullLine:
            callback = callback or RecordingCallback()
            own: dict[str, Any] = {"linger_timeout": 0.0, "send_buffer_size": SMALL_BUFFER}
            pair = pairs.enter_context(connected_session(callback, **own))
            callback.wait_for("on_open")
            return FullLine(pair.session, pair.peer, callback, fill(pair.session))

        yield make


def attempt(function: Callable[..., object], *args: Any, **kwargs: Any) -> Outcome:
    """Call `function` in a greenlet, whose value is what it raised, or None."""

    def body() -> BaseException | None:
        try:
            function(*args, **kwargs)
        except BaseException as error:
            return error
        return None

    return gevent.spawn(body)


def start_waiting_send(
    session: PsSession, message: str | bytes = b"a" * BIG, timeout: float | None = None
) -> Outcome:
    """A greenlet whose send waits for the peer, first in line; a part of its message has left."""
    before = session.bytes_sent
    sender = attempt(session.send, message, timeout=timeout)
    eventually(lambda: session.bytes_sent > before)
    wait_until_stalled(session)
    assert not sender.ready()
    return sender


def line_up(session: PsSession, message: str | bytes, timeout: float | None = None) -> Outcome:
    """A greenlet whose send stands in line behind another."""
    sender = attempt(session.send, message, timeout=timeout)
    gevent.sleep(0)
    gevent.sleep(0)
    assert not sender.ready()
    return sender


def fill(session: PsSession) -> int:
    """Fill the buffers to the last byte, with nobody left waiting; return how many that were."""

    def pour() -> None:
        while True:
            session.send("-", timeout=None)

    pouring = attempt(pour)
    wait_until_stalled(session)
    pouring.kill()
    assert session.is_open
    return session.bytes_sent


def result(outcome: Outcome) -> BaseException | None:
    return outcome.get(timeout=10)


def expect_timed_out(line: Line, sender: Outcome, timeout: float, stopwatch: Stopwatch) -> None:
    error = result(sender)
    stopwatch.check(timeout, most=timeout * 1.25)
    assert isinstance(error, PsSendError)
    assert not line.session.is_open
    assert line.close_reason() is PsCloseReason.FAILED
    assert isinstance(line.session.close_cause, PsSendError)


async def cancelled_send(session: PsSession, message: str) -> None:
    """Begin a send, and cancel it when it waits."""
    task = asyncio.ensure_future(session.send_async(message, timeout=None))
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    await task
