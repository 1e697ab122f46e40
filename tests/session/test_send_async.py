"""Sending where a caller must not block: coroutines, loops of other threads, the hub."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import gevent
import pytest
from gevent.event import Event

from helpers import NativeThread, Stopwatch, run_python
from psofa_gevent import (
    PsCloseReason,
    PsSendError,
    PsSession,
    await_greenlet,
    run_coroutine,
    spawn_coroutine,
)
from psofa_gevent.testing import RecordingCallback, eventually
from slow_peers import (
    BIG,
    SHORT,
    FullLineFactory,
    LineFactory,
    attempt,
    cancelled_send,
    expect_timed_out,
    line_up,
    result,
    start_waiting_send,
)

# Coroutines


def test_send_async_waits_without_holding_up_the_loop(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.005)

    async def send_and_tick() -> None:
        ticking = asyncio.ensure_future(tick())
        await session.send_async(b"a" * BIG, timeout=None)
        ticking.cancel()

    sender = attempt(run_coroutine, send_and_tick())
    eventually(lambda: len(ticks) > 20)
    assert not sender.ready()
    peer.expect(b"a" * BIG)
    assert result(sender) is None


def test_send_async_times_out_as_send_does(line: LineFactory) -> None:
    stalled = line(send_timeout=SHORT)
    stopwatch = Stopwatch()
    sender = attempt(run_coroutine, stalled.session.send_async(bytes(BIG)))
    expect_timed_out(stalled, sender, SHORT, stopwatch)


def test_send_async_cancelled_in_line_leaves_the_stream_whole(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    first = start_waiting_send(session)
    with pytest.raises(asyncio.CancelledError):
        run_coroutine(cancelled_send(session, "b" * BIG))
    assert session.is_open
    peer.expect("a" * BIG)
    assert result(first) is None
    session.send("fine")
    peer.expect("fine")


def test_asyncio_timeout_ends_a_send_async(line: LineFactory) -> None:
    stalled = line()

    async def send_with_a_limit() -> None:
        async with asyncio.timeout(0.05):
            await stalled.session.send_async(bytes(BIG), timeout=None)

    assert isinstance(result(attempt(run_coroutine, send_with_a_limit())), TimeoutError)
    assert stalled.close_reason() is PsCloseReason.FAILED


class AsyncAction(RecordingCallback):
    """Answers each message with `action`, and records what that raised."""

    def __init__(self, action: Callable[[PsSession], Awaitable[object]]) -> None:
        super().__init__(use_async_callback=True)
        self._action = action
        self.outcomes: list[BaseException | None] = []

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        try:
            await self._action(session)
        except PsSendError as error:
            self.outcomes.append(error)
        else:
            self.outcomes.append(None)

    def next_outcome(self) -> BaseException | None:
        eventually(lambda: self.outcomes)
        return self.outcomes.pop(0)


async def send_sync(session: PsSession) -> None:
    session.send(b"s" * BIG, timeout=None)


def test_sync_send_in_an_async_callback_works_where_it_need_not_wait(line: LineFactory) -> None:
    async def send_small(session: PsSession) -> None:
        session.send("small")

    callback = AsyncAction(send_small)
    _server, _session, peer, _callback = line(callback)
    peer.send("x")
    peer.expect("small")
    assert callback.next_outcome() is None


def test_sync_send_that_would_wait_in_an_async_callback_names_send_async(
    full_line: FullLineFactory,
) -> None:
    callback = AsyncAction(send_sync)
    session, peer, _callback, filled = full_line(callback)
    peer.send("x")
    error = callback.next_outcome()
    assert isinstance(error, PsSendError)
    assert "send_async" in str(error)
    assert session.is_open
    peer.expect("-" * filled)
    session.send("fine")
    peer.expect("fine")


def test_sync_send_in_an_async_callback_behind_others_names_send_async(line: LineFactory) -> None:
    callback = AsyncAction(send_sync)
    _server, session, peer, _callback = line(callback)
    first = start_waiting_send(session)
    peer.send("x")
    assert "send_async" in str(callback.next_outcome())
    assert session.is_open
    peer.expect("a" * BIG)
    assert result(first) is None


@pytest.mark.logs_errors
def test_sync_send_in_an_async_callback_that_waits_after_a_part_left_fails_the_session(
    line: LineFactory,
) -> None:
    callback = AsyncAction(send_sync)
    stalled = line(callback)
    stalled.peer.send("x")
    assert "send_async" in str(callback.next_outcome())
    assert stalled.close_reason() is PsCloseReason.FAILED
    assert isinstance(stalled.session.close_cause, PsSendError)


def test_sync_send_in_a_greenlet_awaited_by_an_async_callback_may_wait(line: LineFactory) -> None:
    async def send_in_a_greenlet(session: PsSession) -> None:
        await await_greenlet(gevent.spawn(session.send, b"s" * BIG, timeout=None))

    callback = AsyncAction(send_in_a_greenlet)
    _server, _session, peer, _callback = line(callback)
    peer.send("x")
    peer.expect(b"s" * BIG)
    assert callback.next_outcome() is None


def test_sync_send_in_a_coroutine_outside_a_callback_is_refused_the_same_way(
    full_line: FullLineFactory,
) -> None:
    session, _peer, _callback, _filled = full_line()
    with pytest.raises(PsSendError, match="send_async"):
        run_coroutine(send_sync(session))
    assert session.is_open


def test_async_sends_of_many_tasks_never_interleave_and_keep_their_order(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    letters = [bytes([letter]) for letter in b"abcdefgh"]

    async def send_all() -> None:
        async with asyncio.TaskGroup() as group:
            for letter in letters:
                group.create_task(session.send_async(letter * 50_000))

    sender = spawn_coroutine(send_all())
    assert peer.receive(50_000 * len(letters)) == b"".join(letter * 50_000 for letter in letters)
    sender.get(timeout=5)


def test_coroutine_that_is_held_up_while_first_in_line_costs_the_session_nothing(
    line: LineFactory,
) -> None:
    _server, session, peer, _callback = line()

    async def hold_the_loop() -> None:
        gevent.sleep(1.0)

    first = attempt(run_coroutine, session.send_async(b"a" * BIG, timeout=None))
    eventually(lambda: session.bytes_sent > 0)
    holding = spawn_coroutine(hold_the_loop())
    second = line_up(session, "b", timeout=SHORT)
    # The peer takes all there is; it is only the first in line who sends no more of it.
    peer.expect(b"a" * BIG + b"b")
    assert result(first) is None
    assert result(second) is None
    assert session.is_open
    holding.get(timeout=5)


ASYNCIO_RUN = """
    from gevent import monkey
    monkey.patch_all()
    import asyncio
    import gevent
    from helpers import stalled_peer
    from psofa_gevent import PsCloseReason
    from psofa_gevent.testing import RecordingCallback, eventually, serving

    HUGE = 32 * 1024 * 1024

    async def send_and_give_up():
        async with asyncio.timeout(0.1):
            await session.send_async(bytes(HUGE), timeout=None)

    callback = RecordingCallback()
    with serving(callback, linger_timeout=0) as server, stalled_peer(server.address) as peer:
        session = callback.wait_for("on_open")[0].session
        sending = gevent.spawn(asyncio.run, session.send_async(bytes(HUGE), timeout=None))
        eventually(lambda: session.bytes_sent > 0)
        peer.socket.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_RCVBUF, HUGE)
        peer.receive(HUGE)
        sending.get(timeout=5)
        assert session.is_open
        try:
            asyncio.run(send_and_give_up())
        except TimeoutError:
            print("gave up")
        assert callback.wait_for("on_close")[0].value is PsCloseReason.FAILED
"""


def test_send_async_waits_in_an_asyncio_loop_of_the_programs_own() -> None:
    # On libuv gevent warns of the short timers that asyncio's own loop asks it for.
    done = run_python(ASYNCIO_RUN, environment={"PYTHONWARNINGS": "ignore"})
    assert (done.stdout, done.stderr, done.returncode) == ("gave up\n", "", 0)


CLOSED_LOOP = """
    from gevent import monkey
    monkey.patch_all()
    import asyncio
    import logging
    import gevent
    from helpers import stalled_peer
    from psofa_gevent import PsCloseReason, PsSendError
    from psofa_gevent.testing import RecordingCallback, eventually, serving

    HUGE = 32 * 1024 * 1024
    logging.getLogger("asyncio").disabled = True  # it says that tasks were pending

    def send_in_a_loop_that_is_closed(message):
        loop = asyncio.new_event_loop()
        task = loop.create_task(session.send_async(message, timeout=None))
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()
        return task  # if it went, it would leave the line at once

    def expect_error(message):
        try:
            session.send(message, timeout=None)
        except PsSendError:
            print("the line ended")

    callback = RecordingCallback()
    with serving(callback, linger_timeout=0) as server:
        with stalled_peer(server.address) as peer:
            session = callback.wait_for("on_open")[0].session
            first = gevent.spawn(session.send, bytes(HUGE), timeout=None)
            eventually(lambda: session.bytes_sent > 0)
            kept = gevent.spawn(send_in_a_loop_that_is_closed, b"never").get(timeout=5)
            third = gevent.spawn(session.send, b"c", timeout=None)
            gevent.sleep(0)
            peer.socket.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_RCVBUF, HUGE)
            peer.expect(bytes(HUGE) + b"c")
            first.get(timeout=5)
            third.get(timeout=5)
            print("the line went on")
        with stalled_peer(server.address) as peer:
            session = callback.wait_for("on_open", 2)[1].session
            kept_too = gevent.spawn(send_in_a_loop_that_is_closed, bytes(HUGE)).get(timeout=5)
            assert session.bytes_sent > 0
            second = gevent.spawn(expect_error, b"c")
            gevent.sleep(0)
            peer.receive(1_000_000)
            second.get(timeout=5)
            assert callback.wait_for("on_close", 2)[1].value is PsCloseReason.FAILED
"""


def test_loop_of_the_programs_own_closed_under_a_sender_does_not_hold_up_the_line() -> None:
    done = run_python(CLOSED_LOOP, environment={"PYTHONWARNINGS": "ignore"})
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "the line went on\nthe line ended\n"


# An asyncio loop of another OS thread


def test_send_async_in_a_loop_of_another_thread_arrives(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    thread = NativeThread(asyncio.run, session.send_async(b"a" * BIG, timeout=None))
    peer.expect(b"a" * BIG)
    thread.wait()


def test_send_async_in_a_loop_of_another_thread_does_not_hold_that_loop_up(
    line: LineFactory,
) -> None:
    _server, session, peer, _callback = line()
    ticks: list[float] = []

    async def send_and_tick() -> None:
        sending = asyncio.ensure_future(session.send_async(b"a" * BIG, timeout=None))
        while not sending.done():
            ticks.append(time.monotonic())
            await asyncio.sleep(0.005)
        await sending

    thread = NativeThread(asyncio.run, send_and_tick())
    try:
        eventually(lambda: len(ticks) > 20)
    finally:
        peer.expect(b"a" * BIG)
        thread.wait()


def test_send_async_errors_reach_a_loop_of_another_thread(line: LineFactory) -> None:
    stalled = line(send_timeout=SHORT)
    thread = NativeThread(asyncio.run, stalled.session.send_async(bytes(BIG)))
    with pytest.raises(PsSendError):
        thread.wait()
    assert stalled.close_reason() is PsCloseReason.FAILED
    with pytest.raises(PsSendError):
        NativeThread(asyncio.run, stalled.session.send_async("x")).wait()


def test_send_async_of_another_thread_cancelled_in_line_leaves_nothing(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    first = start_waiting_send(session)
    thread = NativeThread(asyncio.run, expect_cancelled(cancelled_send(session, "b" * 10)))
    thread.wait()
    assert session.is_open
    peer.expect("a" * BIG)
    assert result(first) is None
    session.send("fine")
    peer.expect("fine")


def test_send_async_of_another_thread_cancelled_after_a_part_left_fails_the_session(
    line: LineFactory,
) -> None:
    stalled = line()
    NativeThread(asyncio.run, expect_cancelled(cancelled_send(stalled.session, "a" * BIG))).wait()
    assert stalled.close_reason() is PsCloseReason.FAILED


def send_in_a_loop_that_is_closed(session: PsSession, message: bytes) -> None:
    """Close an asyncio loop, of another thread than the session's, while its send waits."""
    loop = asyncio.new_event_loop()
    sending: Any = loop.create_task(session.send_async(message, timeout=None))
    loop.run_until_complete(asyncio.sleep(0.1))
    assert not sending.done()
    loop.close()
    sending._log_destroy_pending = False  # asyncio would say so in whichever test runs by then


@pytest.mark.logs_errors
def test_loop_of_another_thread_closed_under_the_first_sender_does_not_hold_up_the_line(
    line: LineFactory,
) -> None:
    _server, session, peer, _callback = line()
    NativeThread(send_in_a_loop_that_is_closed, session, b"a" * BIG).wait()
    assert session.bytes_sent > 0
    second = line_up(session, "b")
    # A part of the message had left, so the rest of it comes too.
    peer.expect(b"a" * BIG + b"b")
    assert result(second) is None
    session.send("fine")
    peer.expect("fine")


@pytest.mark.logs_errors
def test_loop_of_another_thread_closed_under_a_sender_in_line_does_not_hold_up_the_line(
    line: LineFactory,
) -> None:
    _server, session, peer, _callback = line()
    first = start_waiting_send(session)
    NativeThread(send_in_a_loop_that_is_closed, session, b"b").wait()
    third = line_up(session, "c")
    peer.expect(b"a" * BIG)
    # Whether the message of the closed loop comes is not promised.
    if (rest := peer.receive(1)) != b"c":
        rest += peer.receive(1)
    assert rest in (b"c", b"bc")
    assert result(first) is None
    assert result(third) is None
    assert session.is_open


async def expect_cancelled(sending: Awaitable[None]) -> None:
    with pytest.raises(asyncio.CancelledError):
        await sending


# The hub


def in_the_hub(function: Callable[[], object]) -> BaseException | None:
    """Call `function` in the hub's own greenlet; return what it raised."""
    errors: list[BaseException | None] = []
    called = Event()

    def call() -> None:
        try:
            function()
        except Exception as error:
            errors.append(error)
        else:
            errors.append(None)
        called.set()

    gevent.get_hub().loop.run_callback(call)
    assert called.wait(5)
    return errors[0]


def test_send_in_the_hub_works_where_it_need_not_wait(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    assert in_the_hub(lambda: session.send("from the hub")) is None
    peer.expect("from the hub")


def test_send_in_the_hub_that_would_wait_is_refused(full_line: FullLineFactory) -> None:
    session, peer, _callback, filled = full_line()
    assert isinstance(in_the_hub(lambda: session.send("x" * BIG)), PsSendError)
    assert session.is_open
    peer.expect("-" * filled)
    assert in_the_hub(lambda: session.send("fine")) is None
    peer.expect("fine")


@pytest.mark.logs_errors
def test_send_in_the_hub_that_would_wait_after_a_part_left_fails_the_session(
    line: LineFactory,
) -> None:
    stalled = line()
    assert isinstance(in_the_hub(lambda: stalled.session.send("x" * BIG)), PsSendError)
    assert stalled.close_reason() is PsCloseReason.FAILED
