"""Sending (design, point 6): whole messages, in order, with a timeout that means "took nothing".

Callers that must not wait (coroutines, the hub) are in test_send_async.py.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import gevent
import pytest

from acting import wait_until_stalled
from helpers import NativeThread, Stopwatch, takes
from psofa_gevent import PsCloseReason, PsSendError, PsSession, run_coroutine
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)
from slow_peers import (
    BIG,
    HUGE,
    LARGE_BUFFER,
    SHORT,
    FullLineFactory,
    LineFactory,
    Outcome,
    attempt,
    cancelled_send,
    close_reason,
    expect_timed_out,
    line_up,
    result,
    start_waiting_send,
)

# Whole messages


@pytest.mark.parametrize(
    "message",
    [
        pytest.param("é" * BIG, id="str"),
        pytest.param(b"\x00\xff" * BIG, id="bytes"),
        pytest.param(bytearray(b"ab" * BIG), id="bytearray"),
        pytest.param(memoryview(b"xabx" * BIG)[1:-1], id="memoryview"),
        pytest.param(memoryview(array.array("I", range(BIG))), id="memoryview-of-ints"),
    ],
)
def test_message_that_has_to_wait_arrives_whole(
    message: str | bytes | bytearray | memoryview, line: LineFactory
) -> None:
    _server, session, peer, _callback = line()
    expected = message.encode() if isinstance(message, str) else bytes(message)
    sender = attempt(session.send, message)
    assert peer.receive(len(expected)) == expected
    assert result(sender) is None
    assert session.bytes_sent == len(expected)
    peer.expect_nothing(0.01)


def test_send_returns_when_the_kernel_took_all(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = callback.wait_for("on_open")[0].session
    assert session is not None
    sender = attempt(session.send, bytes(HUGE), timeout=None)
    received = 0
    while received < HUGE:
        # The kernel can't have taken all as long as so much has not even arrived.
        assert not (sender.ready() and received < HUGE - 16 * 1024 * 1024)
        received += len(client.receive(min(256 * 1024, HUGE - received)))
    assert result(sender) is None
    assert session.bytes_sent == HUGE


def test_sends_of_many_greenlets_never_interleave(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    letters = [bytes([letter]) for letter in b"abcdefghijklmnop"]
    senders = [attempt(session.send, letter * 50_000) for letter in letters]
    received = peer.receive(50_000 * len(letters))
    assert [result(sender) for sender in senders] == [None] * len(senders)
    assert received == b"".join(letter * 50_000 for letter in letters)


def test_sends_of_greenlets_coroutines_and_threads_never_interleave(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    count = 30_000
    letters = [bytes([letter]) for letter in b"abcdefghijkl"]

    async def send_in_a_coroutine(message: bytes) -> None:
        await session.send_async(message)

    senders: list[Outcome] = []
    threads = []
    for index, letter in enumerate(letters):
        match index % 3:
            case 0:
                senders.append(attempt(session.send, letter * count))
            case 1:
                senders.append(attempt(run_coroutine, send_in_a_coroutine(letter * count)))
            case 2:
                threads.append(NativeThread(session.send, letter * count))
    received = peer.receive(count * len(letters))
    for sender in senders:
        assert result(sender) is None
    for thread in threads:
        thread.wait()
    runs = {received[start : start + count] for start in range(0, len(received), count)}
    assert runs == {letter * count for letter in letters}


def test_messages_leave_in_the_order_in_which_their_sends_began(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    first = start_waiting_send(session)
    senders = [line_up(session, f"<{number}>") for number in range(20)]
    peer.expect(b"a" * BIG)
    peer.expect("".join(f"<{number}>" for number in range(20)))
    assert [result(sender) for sender in [first, *senders]] == [None] * 21


def test_send_that_begins_while_others_wait_does_not_overtake_them(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    first = start_waiting_send(session)
    second = line_up(session, "b" * BIG)
    peer.receive(BIG)
    # There is room again now and then, but the second is before the third.
    third = attempt(session.send, "c")
    peer.expect("b" * BIG + "c")
    assert [result(sender) for sender in (first, second, third)] == [None] * 3


def test_empty_message_is_sent_at_once_and_in_line(line: LineFactory) -> None:
    _server, session, peer, _callback = line(send_timeout=SHORT)
    session.send("")
    first = start_waiting_send(session)
    empty = line_up(session, "")
    last = line_up(session, "last", timeout=None)
    peer.expect(b"a" * BIG + b"last")
    assert [result(sender) for sender in (first, empty, last)] == [None] * 3
    assert session.is_open


def test_stalled_session_does_not_hold_up_sends_to_others(
    line: LineFactory, ps_client: ClientFactory
) -> None:
    server, session, _peer, callback = line()
    start_waiting_send(session)
    quick = ps_client(server)
    other = callback.wait_for("on_open", 2)[1].session
    assert other is not None
    for number in range(100):
        other.send(f"{number}\n")
    quick.expect("".join(f"{number}\n" for number in range(100)))


# The timeout


def test_send_fails_when_the_peer_takes_nothing_for_the_timeout(line: LineFactory) -> None:
    stalled = line(send_timeout=None)
    stopwatch = Stopwatch()
    expect_timed_out(stalled, attempt(stalled.session.send, bytes(BIG), SHORT), SHORT, stopwatch)


def test_send_without_a_timeout_of_its_own_has_that_of_its_owner(line: LineFactory) -> None:
    stalled = line(send_timeout=SHORT)
    stopwatch = Stopwatch()
    expect_timed_out(stalled, attempt(stalled.session.send, bytes(BIG)), SHORT, stopwatch)


def test_send_timeout_in_a_callback_closes_the_session_with_the_error_as_its_cause(
    line: LineFactory,
) -> None:
    stalled = line(RecordingCallback(reply=lambda _message: bytes(BIG)), send_timeout=SHORT)
    stalled.peer.send("x")
    assert stalled.close_reason() is PsCloseReason.FAILED
    assert isinstance(stalled.session.close_cause, PsSendError)
    assert f"{SHORT:g} s" in str(stalled.session.close_cause)


def test_send_with_timeout_zero_fails_at_once_where_it_would_wait(line: LineFactory) -> None:
    stalled = line()
    stalled.session.send("room enough", timeout=0)
    stalled.peer.expect("room enough")
    stopwatch = Stopwatch()
    expect_timed_out(stalled, attempt(stalled.session.send, bytes(BIG), 0), 0, stopwatch)


def test_send_with_timeout_none_waits_for_a_peer_that_takes_its_time(line: LineFactory) -> None:
    _server, session, peer, _callback = line(send_timeout=0.05)
    sender = start_waiting_send(session, timeout=None)
    gevent.sleep(0.5)  # ten times what the owner would allow
    assert not sender.ready()
    peer.expect(b"a" * BIG)
    assert result(sender) is None
    assert session.is_open


def read_slowly(peer: ScriptedClient, size: int, pause: float, until: Callable[[], bool]) -> int:
    """Read `size` bytes every `pause` seconds until it is so; return how many bytes that were."""
    received = 0
    while not until():
        received += len(peer.receive(size))
        gevent.sleep(pause)
    return received


def test_peer_that_takes_a_little_now_and_then_never_times_a_send_out(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    sender = attempt(session.send, bytes(BIG), 1.0)
    until = time.monotonic() + 2 * 1.0
    received = read_slowly(peer, 1_000, 0.02, lambda: sender.ready() or time.monotonic() > until)
    assert not sender.ready()
    peer.expect(bytes(BIG - received))
    assert result(sender) is None
    assert session.is_open


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nothing finer")
def test_progress_too_small_to_make_the_socket_writable_counts(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    session._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGE_BUFFER)
    sender = start_waiting_send(session, bytes(HUGE), timeout=1.0)
    taken = session.bytes_sent
    until = time.monotonic() + 2.5
    received = read_slowly(peer, 500, 0.02, lambda: sender.ready() or time.monotonic() > until)
    assert not sender.ready()
    assert session.is_open
    assert received < taken / 3, "enough to make it writable: this shows nothing"
    session.abort()
    assert isinstance(result(sender), PsSendError)


def test_sender_in_line_counts_the_progress_of_the_first(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    first = start_waiting_send(session, timeout=None)
    second = line_up(session, b"second", timeout=1.0)
    until = time.monotonic() + 2 * 1.0
    received = read_slowly(peer, 1_000, 0.02, lambda: first.ready() or time.monotonic() > until)
    assert not first.ready()
    peer.expect((b"a" * BIG + b"second")[received:])
    assert result(first) is None
    assert result(second) is None


def test_sender_in_line_times_out_when_the_first_makes_no_progress(line: LineFactory) -> None:
    stalled = line()
    first = start_waiting_send(stalled.session, timeout=None)
    stopwatch = Stopwatch()
    second = line_up(stalled.session, "second", timeout=SHORT)
    expect_timed_out(stalled, second, SHORT, stopwatch)
    assert isinstance(result(first), PsSendError)


def test_senders_with_different_timeouts_fail_together_at_the_shortest(line: LineFactory) -> None:
    stalled = line()
    stopwatch = Stopwatch()
    senders = [start_waiting_send(stalled.session, timeout=5.0)]
    senders += [line_up(stalled.session, "x", timeout) for timeout in (10.0, SHORT, None)]
    for sender in senders:
        assert isinstance(result(sender), PsSendError)
    stopwatch.check(SHORT, most=SHORT)
    assert stalled.close_reason() is PsCloseReason.FAILED


@pytest.mark.parametrize("size", [1, BIG])
@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_bad_timeout_is_refused_before_anything_left(
    size: int, timeout: Any, error: type[Exception], line: LineFactory
) -> None:
    _server, session, peer, _callback = line()
    with pytest.raises(error, match="timeout"):
        session.send(bytes(size), timeout=timeout)
    with pytest.raises(error, match="timeout"):
        run_coroutine(session.send_async(bytes(size), timeout=timeout))
    assert session.bytes_sent == 0
    assert session.is_open
    session.send("fine")
    peer.expect("fine")


@pytest.mark.parametrize("message", [None, 1, ["x"], object()])
def test_message_of_another_type_is_refused_and_the_session_stays_open(
    message: Any, line: LineFactory
) -> None:
    _server, session, peer, _callback = line()
    with pytest.raises(TypeError):
        session.send(message)
    with pytest.raises(TypeError):
        run_coroutine(session.send_async(message))
    session.send("fine")
    peer.expect("fine")


# A session that is closed, or closes


def test_send_on_a_closed_session_raises_at_once(line: LineFactory) -> None:
    stalled = line()
    stalled.session.close()
    for _ in range(2):
        with takes(most=0):
            with pytest.raises(PsSendError):
                stalled.session.send("x", timeout=None)
            with pytest.raises(PsSendError):
                stalled.session.send(bytes(BIG), timeout=None)
            with pytest.raises(PsSendError):
                run_coroutine(stalled.session.send_async("x", timeout=None))
            with pytest.raises(PsSendError):
                NativeThread(stalled.session.send, "x", timeout=None).join()
        assert stalled.close_reason() is PsCloseReason.SELF_CLOSE
    assert stalled.session.bytes_sent == 0


def test_send_in_on_close_raises_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    errors: list[BaseException | None] = []

    class SendsInClose(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            try:
                session.send("too late")
            except PsSendError as error:
                errors.append(error)
            super().on_close(session, close_reason)

    callback = SendsInClose()
    client = ps_client(ps_server(callback))
    client.eof()
    assert callback.wait_for("on_close")[0].value is PsCloseReason.PEER_CLOSE
    assert len(errors) == 1


def test_close_wakes_every_sender_whoever_called_it(line: LineFactory) -> None:
    errors: list[BaseException] = []

    class SendsInMessage(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            try:
                session.send("from its own callback", timeout=None)
            except PsSendError as error:
                errors.append(error)

    stalled = line(SendsInMessage())
    first = start_waiting_send(stalled.session)
    in_line = [line_up(stalled.session, "x") for _ in range(3)]
    in_coroutine = attempt(run_coroutine, stalled.session.send_async("x", timeout=None))
    in_thread = NativeThread(stalled.session.send, "x", timeout=None)
    stalled.peer.send("x")
    stalled.callback.wait_for("on_message")
    stopwatch = Stopwatch()
    stalled.session.close()
    for sender in [first, *in_line, in_coroutine]:
        assert isinstance(result(sender), PsSendError)
    with pytest.raises(PsSendError):
        in_thread.wait()
    assert stalled.close_reason() is PsCloseReason.SELF_CLOSE
    stopwatch.check(most=0)
    assert len(errors) == 1


def test_reset_by_the_peer_wakes_every_sender(line: LineFactory) -> None:
    stalled = line()
    senders = [start_waiting_send(stalled.session)]
    senders += [line_up(stalled.session, "x") for _ in range(3)]
    stalled.peer.reset()
    for sender in senders:
        assert isinstance(result(sender), PsSendError)
    assert stalled.close_reason() is PsCloseReason.FAILED
    assert isinstance(stalled.session.close_cause, OSError)


def test_abort_wakes_every_sender(line: LineFactory) -> None:
    stalled = line()
    senders = [start_waiting_send(stalled.session), line_up(stalled.session, "x")]
    stalled.session.abort()
    for sender in senders:
        assert isinstance(result(sender), PsSendError)
    assert stalled.close_reason() is PsCloseReason.SELF_CLOSE


def test_send_eof_comes_after_the_sends_that_have_begun(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    senders = [start_waiting_send(session), line_up(session, "b"), line_up(session, "c")]
    session.send_eof()
    with pytest.raises(PsSendError):
        session.send("d")
    assert session.is_open
    assert peer.receive_until_eof() == b"a" * BIG + b"bc"
    assert [result(sender) for sender in senders] == [None] * 3


# Shutdown: the sends of a running callback go on


class SendsWhileShuttingDown(RecordingCallback):
    """Begins a big send; when that is through, and SHUTDOWN has come, sends some more."""

    def __init__(self, *, use_async_callback: bool) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self.errors: list[BaseException] = []

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        try:
            session.send(b"a" * BIG)
            eventually(lambda: not session.is_open)
            session.send(b"b" * BIG)
            session.send("c")
        except PsSendError as error:
            self.errors.append(error)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        try:
            await session.send_async(b"a" * BIG)
            while session.is_open:
                await asyncio.sleep(0.005)
            await session.send_async(b"b" * BIG)
            session.send("c")  # it need not wait
        except PsSendError as error:
            self.errors.append(error)


@pytest.mark.parametrize("use_async_callback", [False, True])
def test_shutdown_neither_interrupts_nor_refuses_the_sends_of_a_callback(
    use_async_callback: bool, line: LineFactory
) -> None:
    callback = SendsWhileShuttingDown(use_async_callback=use_async_callback)
    server, session, peer, _callback = line(callback, linger_timeout=1.0)
    peer.send("go")
    eventually(lambda: session.bytes_sent > 0)
    stopping = gevent.spawn(server.shutdown, 10.0)
    eventually(lambda: not session.is_open)
    assert peer.receive_until_eof() == b"a" * BIG + b"b" * BIG + b"c"
    stopping.get(timeout=5)
    assert callback.errors == []
    assert callback.named("on_close")[0].value is PsCloseReason.SHUTDOWN


def test_shutdown_interrupts_and_refuses_the_sends_of_others(line: LineFactory) -> None:
    server, session, _peer, _callback = line()
    senders = [start_waiting_send(session), line_up(session, "x")]
    stopping = gevent.spawn(server.shutdown, 10.0)
    for sender in senders:
        assert isinstance(result(sender), PsSendError)
    with pytest.raises(PsSendError):
        session.send("x")
    stopping.get(timeout=5)


def test_shutdown_lets_the_send_of_a_callback_to_another_session_go_on(
    line: LineFactory, ps_client: ClientFactory
) -> None:
    class SendsToTheFirst(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            first.send(b"a" * BIG, timeout=None)

    server, first, peer, callback = line(SendsToTheFirst(), linger_timeout=1.0)
    ps_client(server).send("x")
    eventually(lambda: first.bytes_sent > 0)
    stopping = gevent.spawn(server.shutdown, 10.0)
    eventually(lambda: not first.is_open)
    assert peer.receive_until_eof() == b"a" * BIG
    stopping.get(timeout=5)
    reasons = [event.value for event in callback.named("on_close")]
    assert reasons == [PsCloseReason.SHUTDOWN] * 2


# A sender that is thrown out


def kill(sender: Outcome) -> BaseException | None:
    sender.kill()
    return result(sender)


def test_sender_killed_in_line_leaves_the_stream_whole(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    first = start_waiting_send(session)
    senders = [line_up(session, letter * BIG) for letter in "bcd"]
    assert isinstance(kill(senders[1]), gevent.GreenletExit)
    assert session.is_open
    peer.expect("a" * BIG + "b" * BIG + "d" * BIG)
    assert [result(sender) for sender in (first, senders[0], senders[2])] == [None] * 3
    session.send("fine")
    peer.expect("fine")


def test_sender_hit_by_a_timeout_in_line_leaves_the_stream_whole(line: LineFactory) -> None:
    _server, session, peer, _callback = line()
    first = start_waiting_send(session)
    timeout = gevent.Timeout(0.05)
    with pytest.raises(gevent.Timeout) as caught, timeout:
        session.send("b" * BIG, timeout=None)
    assert caught.value is timeout
    assert session.is_open
    peer.expect("a" * BIG)
    assert result(first) is None
    session.send("fine")
    peer.expect("fine")


def test_first_sender_of_whose_message_nothing_left_may_be_thrown_out(
    full_line: FullLineFactory,
) -> None:
    session, peer, _callback, filled = full_line()
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
        session.send("b" * BIG, timeout=None)
    assert isinstance(kill(line_up(session, "c" * BIG)), gevent.GreenletExit)
    with pytest.raises(asyncio.CancelledError):
        run_coroutine(cancelled_send(session, "d" * BIG))
    assert session.is_open
    peer.expect("-" * filled)
    session.send("fine")
    peer.expect("fine")


@pytest.mark.parametrize("steps", range(4))
def test_sender_killed_as_its_turn_comes_passes_it_on_or_fails_the_session(
    steps: int, full_line: FullLineFactory
) -> None:
    stalled = full_line()
    filled = stalled.filled
    first = line_up(stalled.session, "b" * BIG)
    second = line_up(stalled.session, "c")
    stalled.peer.receive(filled // 2)
    for _ in range(steps):
        gevent.sleep(0)
    assert isinstance(kill(first), gevent.GreenletExit)
    if stalled.session.is_open:
        stalled.peer.expect("-" * (filled - filled // 2) + "c")
        assert result(second) is None
    else:
        assert isinstance(result(second), PsSendError)
        assert close_reason(stalled.callback, stalled.session) is PsCloseReason.FAILED


@pytest.mark.logs_errors
def test_sender_killed_after_a_part_left_fails_the_session_and_all_in_line(
    line: LineFactory,
) -> None:
    stalled = line()
    first = start_waiting_send(stalled.session)
    others = [line_up(stalled.session, letter) for letter in "bcd"]
    assert isinstance(kill(first), gevent.GreenletExit)
    assert not stalled.session.is_open
    for sender in others:
        assert isinstance(result(sender), PsSendError)
    assert stalled.close_reason() is PsCloseReason.FAILED
    assert isinstance(stalled.session.close_cause, gevent.GreenletExit)
    # Whatever of it was on its way: nothing that follows a broken message is sent.
    assert set(received_until_the_end(stalled.peer)) <= {ord("a")}


def test_sender_killed_after_a_part_left_when_its_turn_came_fails_the_session(
    full_line: FullLineFactory,
) -> None:
    stalled = full_line()
    filled = stalled.filled
    sender = line_up(stalled.session, "b" * BIG)
    stalled.peer.expect("-" * filled)
    eventually(lambda: stalled.session.bytes_sent > filled)
    wait_until_stalled(stalled.session)
    assert isinstance(kill(sender), gevent.GreenletExit)
    assert close_reason(stalled.callback, stalled.session) is PsCloseReason.FAILED
    assert isinstance(stalled.session.close_cause, gevent.GreenletExit)


def received_until_the_end(peer: ScriptedClient) -> bytes:
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while chunk := peer.socket.recv(65_536):
            received += chunk
    return bytes(received)


def test_sender_hit_by_a_timeout_after_a_part_left_fails_the_session(line: LineFactory) -> None:
    stalled = line()
    timeout = gevent.Timeout(0.05)
    with pytest.raises(gevent.Timeout) as caught, timeout:
        stalled.session.send(bytes(BIG), timeout=None)
    assert caught.value is timeout
    assert not stalled.session.is_open
    assert stalled.close_reason() is PsCloseReason.FAILED
    assert stalled.session.close_cause is timeout


def test_coroutine_cancelled_after_a_part_left_fails_the_session(line: LineFactory) -> None:
    stalled = line()
    with pytest.raises(asyncio.CancelledError):
        run_coroutine(cancelled_send(stalled.session, "a" * BIG))
    assert not stalled.session.is_open
    assert stalled.close_reason() is PsCloseReason.FAILED
    assert isinstance(stalled.session.close_cause, asyncio.CancelledError)


def test_timeout_swallowed_in_a_callback_after_a_part_left_fails_the_session_all_the_same(
    line: LineFactory,
) -> None:
    class GivesUp(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.05):
                session.send(bytes(BIG), timeout=None)
            super().on_message(session, message)

    stalled = line(GivesUp())
    stalled.peer.send("x")
    assert stalled.close_reason() is PsCloseReason.FAILED
    assert isinstance(stalled.session.close_cause, gevent.Timeout)


# Other callbacks' sends


def test_callback_that_sends_to_a_stalled_session_holds_up_itself_only(
    line: LineFactory, ps_client: ClientFactory
) -> None:
    class FloodsTheFirst(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            if message == b"flood":
                first.send(b"a" * BIG, timeout=None)
            session.send(message)

    server, first, peer, _callback = line(FloodsTheFirst())
    flooding, quick = ps_client(server), ps_client(server)
    flooding.send("flood")
    eventually(lambda: first.bytes_sent > 0)
    quick.send("quick")
    quick.expect("quick")
    flooding.expect_nothing(0.01)
    peer.expect(b"a" * BIG)
    flooding.expect("flood")
