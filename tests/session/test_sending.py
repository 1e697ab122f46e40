"""Sending (design, point 6): whole messages, in order, with a timeout that means "took nothing".

The peers here read when the test says so. The kernel's buffers between are made small, so that a
message of `BIG` bytes waits soon; `fill` fills them to the last byte, so that nothing of the next
message can leave.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import gevent
import pytest
from gevent.event import Event

from acting import wait_until_stalled
from helpers import NativeThread, Stopwatch, run_python, stalled_peer, takes
from psofa_gevent import (
    PsCloseReason,
    PsSendError,
    PsServer,
    PsSession,
    await_greenlet,
    run_coroutine,
    spawn_coroutine,
)
from psofa_gevent.testing import (
    ClientFactory,
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


def expect_timed_out(line: Line, sender: Outcome, timeout: float, stopwatch: Stopwatch) -> None:
    error = result(sender)
    stopwatch.check(timeout, most=timeout * 1.25)
    assert isinstance(error, PsSendError)
    assert not line.session.is_open
    assert line.close_reason() is PsCloseReason.FAILED
    assert isinstance(line.session.close_cause, PsSendError)


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


async def cancelled_send(session: PsSession, message: str) -> None:
    """Begin a send, and cancel it when it waits."""
    task = asyncio.ensure_future(session.send_async(message, timeout=None))
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    await task


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
