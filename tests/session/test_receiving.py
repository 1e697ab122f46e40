"""Straight-line code: `PsHandler`, `PsSession.receive`, and the loop over a session's messages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent
import gevent.event
import pytest
from gevent import GreenletExit, monkey

from helpers import NativeThread, close_reasons, takes
from psofa_gevent import (
    PsCallback,
    PsCallbackError,
    PsClient,
    PsClosedError,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsSession,
    run_coroutine,
)
from psofa_gevent.framing import FixedSize, LengthPrefix, Line, Raw
from psofa_gevent.net.sockopts import unacknowledged
from psofa_gevent.session import framed
from psofa_gevent.session.sending import SendingHalf
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

blocking_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")
Handle = Callable[[PsSession[Any]], object]


class Handler(PsHandler[Any]):
    """A handler that keeps its sessions and close reasons, and what its function returned."""

    def __init__(self, function: Handle) -> None:
        super().__init__()
        self.function = function
        self.returned: list[object] = []
        self.closed: list[tuple[PsSession[Any], PsCloseReason]] = []

    def handle(self, session: PsSession[Any]) -> None:
        self.returned.append(self.function(session))

    def on_close(self, session: PsSession[Any], close_reason: PsCloseReason) -> None:
        self.closed.append((session, close_reason))

    def reason(self) -> PsCloseReason:
        eventually(lambda: self.closed, 10)
        ((_, reason),) = self.closed
        return reason


def acknowledged(client: ScriptedClient) -> None:
    """Wait until the peer's kernel has all that the client has sent."""
    eventually(lambda: unacknowledged(client.socket) == 0)


def is_handled(session: PsSession[Any], count: int) -> bool:
    """Whether so many messages came, and the session waits for the peer again."""
    waits = session.waiting_since or session._send_queue is not None
    return session.messages_received == count and bool(waits)


def echo(session: PsSession[Any]) -> None:
    for message in session:
        session.send(message)


def collect(session: PsSession[Any]) -> list[Any]:
    return list(session)


# A session's messages, one after the other


def test_the_messages_come_one_after_the_other(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    handler = Handler(collect)
    client = ps_client(ps_server(handler, framing=Line()))
    client.send("one\ntwo\nth")
    client.send("ree\nunfinished")
    client.close()
    assert handler.reason() is PsCloseReason.PEER_CLOSE
    assert handler.returned == [[b"one", b"two", b"three"]]
    ((session, _),) = handler.closed
    assert session.messages_received == 3
    assert session.bytes_received == len("one\ntwo\nthree\nunfinished")


def test_without_a_framing_the_chunks_come(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    handler = Handler(b"".join)
    client = ps_client(ps_server(handler, read_buffer_size=1_000))
    client.send(bytes(range(256)) * 1_000)
    client.close()
    assert handler.reason() is PsCloseReason.PEER_CLOSE
    assert handler.returned == [bytes(range(256)) * 1_000]


def test_a_function_or_a_decorated_one_will_do(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    @PsHandler
    def decorated(session: PsSession[bytes]) -> None:
        for message in session:
            session.send(message.upper())

    client = ps_client(ps_server(decorated))
    client.send("hello")
    client.expect("HELLO")
    other = ps_client(ps_server(PsHandler(echo)))
    other.send("hello")
    other.expect("hello")


def test_both_clients_take_a_handler(ps_server: ServerFactory) -> None:
    address = ps_server(PsHandler(echo), framing=Line()).address
    came: list[bytes] = []

    def talk(session: PsSession[bytes]) -> None:
        session.send("one")
        came.append(session.receive())
        session.send("two")
        came.append(session.receive(timeout=5))

    callback = Handler(talk)
    client = PsClient(callback, *address[:2], framing=Line())
    client.connect()
    assert callback.reason() is PsCloseReason.SELF_CLOSE
    client.disconnect()
    callback = Handler(talk)
    with PsMultiClient(callback, framing=Line()) as bundle:
        bundle.connect(*address[:2])
        assert callback.reason() is PsCloseReason.SELF_CLOSE
    assert came == [b"one", b"two"] * 2


def test_1000_sessions_have_their_handlers_side_by_side(ps_server: ServerFactory) -> None:
    server = ps_server(PsHandler(echo), framing=Line())
    came: list[bytes] = []

    def talk(session: PsSession[bytes]) -> None:
        for number in range(5):
            session.send(f"{number}")
            assert session.receive(timeout=20) == b"%d" % number
        came.append(b"")

    with PsMultiClient(PsHandler(talk), framing=Line()) as bundle:
        for _ in range(1_000):
            bundle.connect(*server.address[:2])
        eventually(lambda: len(came) == 1_000, 30)


# The end of the messages


def test_a_handler_that_returns_closes_the_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    handler = Handler(lambda session: session.send("bye"))
    client = ps_client(ps_server(handler))
    client.expect("bye")
    client.expect_eof()
    assert handler.reason() is PsCloseReason.SELF_CLOSE


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda _, client: client.close(), PsCloseReason.PEER_CLOSE),
        (lambda _, client: client.reset(), PsCloseReason.FAILED),
        (lambda session, _: session.close(), PsCloseReason.SELF_CLOSE),
        (lambda session, _: session.abort(), PsCloseReason.SELF_CLOSE),
        (lambda session, _: NativeThread(session.close).wait(), PsCloseReason.SELF_CLOSE),
        (lambda session, _: session.owner.shutdown(), PsCloseReason.SHUTDOWN),
        (lambda session, _: session.change_idle_milliseconds(1), PsCloseReason.TIMEOUT),
    ],
    ids=["FIN", "RST", "close", "abort", "thread", "shutdown", "idle"],
)
@pytest.mark.parametrize("framing", [None, Line()], ids=["raw", "lines"])
def test_the_loop_ends_however_the_session_ends(
    end: Callable[..., object],
    reason: PsCloseReason,
    framing: Line | None,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = Handler(collect)
    server = ps_server(handler, framing=framing)
    client = ps_client(server)
    client.send("one\n")
    (session,) = eventually(lambda: server.sessions)
    eventually(lambda: session.messages_received)
    with caplog.at_level(logging.INFO, "psofa_gevent"):
        end(session, client)
        assert handler.reason() is reason
    assert handler.returned == [[b"one\n" if framing is None else b"one"]]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_receive_says_why_no_message_will_come(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    errors: list[str] = []

    def handle(session: PsSession[Any]) -> None:
        session.receive()
        for _ in range(2):
            with pytest.raises(PsClosedError) as caught:
                session.receive(timeout=5)
            errors.append(str(caught.value))

    handler = Handler(handle)
    client = ps_client(ps_server(handler))
    client.send("x")
    client.close()
    assert handler.reason() is PsCloseReason.PEER_CLOSE
    assert all("PEER_CLOSE" in error for error in errors)
    assert len(errors) == 2


def test_a_handler_that_does_not_catch_the_end_ends_without_noise(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(session: PsSession[Any]) -> None:
        while True:
            session.receive()

    for half_open in (False, True):
        handler = Handler(handle)
        client = ps_client(ps_server(handler, allow_half_open=half_open))
        client.send("x")
        client.eof()
        reason = PsCloseReason.SELF_CLOSE if half_open else PsCloseReason.PEER_CLOSE
        assert handler.reason() is reason
        client.expect_eof()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_after_the_peers_fin_a_half_open_session_sends_on(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        received = b"".join(session)
        assert session.is_open
        session.send(received[::-1])
        with pytest.raises(PsClosedError, match="the peer sends no more"):
            session.receive()
        session.send_eof()
        assert not session.is_open

    handler = Handler(handle)
    client = ps_client(ps_server(handler, allow_half_open=True))
    client.send("abc")
    client.eof()
    client.expect("cba")
    client.expect_eof()
    assert handler.reason() is PsCloseReason.PEER_CLOSE


@pytest.mark.logs_errors
def test_an_exception_of_a_handler_fails_the_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        for message in session:
            session.send(b"before " + message)
            raise LookupError("x")

    handler = Handler(handle)
    client = ps_client(ps_server(handler, framing=Line()))
    client.send("one\ntwo\n")
    client.expect("before one\n")
    client.expect_eof()
    assert handler.reason() is PsCloseReason.FAILED
    ((session, _),) = handler.closed
    assert isinstance(session.close_cause, LookupError)


@pytest.mark.logs_errors
def test_a_handler_that_is_killed_fails_the_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    handler = Handler(collect)
    server = ps_server(handler)
    ps_client(server)
    (session,) = eventually(lambda: server.sessions)
    eventually(lambda: session.waiting_since)
    greenlet: Any = session.greenlet
    greenlet.kill()
    assert handler.reason() is PsCloseReason.FAILED
    assert isinstance(session.close_cause, GreenletExit)


def test_a_malformed_message_ends_the_loop_after_those_before_it(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(session: PsSession[Any]) -> list[bytes]:
        messages = []
        for message in session:
            session.send(message)
            messages.append(message)
        return messages

    handler = Handler(handle)
    client = ps_client(ps_server(handler, framing=Line(max_size=5)))
    client.send("one\ntwo\n" + "x" * 100)
    client.expect("one\ntwo\n")
    client.expect_eof()
    assert handler.reason() is PsCloseReason.FAILED
    assert handler.returned == [[b"one", b"two"]]
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "larger than max_size" in record.getMessage()


# Time


def test_a_timeout_leaves_the_session_as_it_is(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        for timeout in (0, 0.05):
            with pytest.raises(TimeoutError, match="no message came in time"):
                session.receive(timeout)
        session.send("now")
        session.send(session.receive(timeout=5))

    client = ps_client(ps_server(PsHandler(handle), framing=Line()))
    client.send("half ")
    client.expect("now\n")
    client.send("and half\n")
    client.expect("half and half\n")


def test_a_timeout_that_comes_with_half_a_message_is_not_lost(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        with pytest.raises(TimeoutError):
            session.receive(0.05)
        session.send("timed out")

    server = ps_server(PsHandler(handle), framing=Line())
    client = ps_client(server)
    (session,) = eventually(lambda: server.sessions)
    eventually(lambda: session.waiting_since)
    client.send("half")
    blocking_sleep(0.1)  # so that both are due in the same round of the loop
    client.expect("timed out\n")


def test_a_message_that_is_there_needs_no_time(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    gate = gevent.event.Event()

    def handle(session: PsSession[Any]) -> None:
        gate.wait()
        session.send(session.receive(timeout=0) + session.receive(timeout=0))

    client = ps_client(ps_server(PsHandler(handle), framing=Line()))
    client.send("one\ntwo\n")
    acknowledged(client)
    gate.set()
    client.expect("onetwo\n")


@pytest.mark.parametrize("timeout", [None, 0.05])
def test_a_peer_that_says_nothing_is_idle_also_for_one_who_asks_again_and_again(
    timeout: float | None, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        while True:
            try:
                session.receive(timeout)
            except TimeoutError:
                continue

    handler = Handler(handle)
    client = ps_client(ps_server(handler, idle_milliseconds=400))
    with takes(0.4, most=1.5):
        assert handler.reason() is PsCloseReason.TIMEOUT
    client.close()


def test_bytes_restart_the_idle_clock_of_one_who_asks_again_and_again(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        while True:
            try:
                session.receive(0.05)
            except TimeoutError:
                continue

    handler = Handler(handle)
    client = ps_client(ps_server(handler, idle_milliseconds=1_200))
    for _ in range(10):
        gevent.sleep(0.3)
        client.send("x")
        assert not handler.closed
    assert handler.reason() is PsCloseReason.TIMEOUT


def test_what_a_handler_does_in_between_is_not_idle_time(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        gevent.sleep(1.5)
        session.send(session.receive())

    client = ps_client(ps_server(PsHandler(handle), idle_milliseconds=100))
    client.send("x")
    client.expect("x")


def test_frame_timeout_holds_for_handlers(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    handler = Handler(collect)
    client = ps_client(ps_server(handler, framing=Line(), frame_timeout=0.3))
    client.send("one\n")
    with contextlib.suppress(OSError):  # it may be closed just now
        while not handler.closed:
            client.send("x")
            gevent.sleep(0.05)
    assert handler.reason() is PsCloseReason.FAILED
    ((session, _),) = handler.closed
    assert isinstance(session.close_cause, TimeoutError)
    assert handler.returned == [[b"one"]]


def test_callback_timeout_does_not_count_the_wait_for_messages(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        for message in session:
            gevent.sleep(0.2)
            session.send(message)

    handler = Handler(handle)
    client = ps_client(ps_server(handler, callback_timeout=1.0))
    for _ in range(3):
        gevent.sleep(0.9)
        client.send("x")
        client.expect("x")
    assert not handler.closed


@pytest.mark.logs_errors
def test_callback_timeout_ends_a_handler_that_takes_too_long_for_a_message(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        for _ in session:
            gevent.sleep(600)

    handler = Handler(handle)
    client = ps_client(ps_server(handler, callback_timeout=0.5))
    gevent.sleep(0.8)
    assert not handler.closed
    client.send("x")
    assert handler.reason() is PsCloseReason.FAILED
    ((session, _),) = handler.closed
    assert isinstance(session.close_cause, TimeoutError)


def test_callback_timeout_begins_anew_with_each_message_of_one_read(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        for message in session:
            gevent.sleep(0.2)
            session.send(message)

    handler = Handler(handle)
    client = ps_client(ps_server(handler, framing=Line(), callback_timeout=1.0))
    client.send("x\n" * 10)
    client.expect("x\n" * 10)
    assert not handler.closed


def test_frame_timeout_does_not_count_what_a_handler_takes(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    gate = gevent.event.Event()

    def handle(session: PsSession[Any]) -> None:
        with pytest.raises(TimeoutError):
            session.receive(0.1)
        gate.wait()
        session.send(session.receive())

    client = ps_client(ps_server(PsHandler(handle), framing=Line(), frame_timeout=1.0))
    client.send("half ")
    gevent.sleep(0.2)
    client.send("and half\n")
    gevent.sleep(1.0)
    gate.set()
    client.expect("half and half\n")


@pytest.mark.parametrize("before", ["", "one\n"])
def test_frame_timeout_holds_for_one_who_asks_again_and_again(
    before: str,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handle(session: PsSession[Any]) -> None:
        while True:
            try:
                session.receive(0.05)
            except TimeoutError:
                continue

    handler = Handler(handle)
    client = ps_client(ps_server(handler, framing=Line(), frame_timeout=0.3))
    client.send(f"{before}half")
    assert handler.reason() is PsCloseReason.FAILED
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "4 bytes of a message in frame_timeout" in record.getMessage()


def test_a_peer_is_idle_also_for_one_who_limits_the_wait_in_gevents_way(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        while session.is_open:
            with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.05):
                session.receive()

    handler = Handler(handle)
    ps_client(ps_server(handler, idle_milliseconds=300))
    assert handler.reason() is PsCloseReason.TIMEOUT


def test_the_loop_ends_when_its_replies_cannot_leave(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> bool:
        for _ in session:
            session.send(bytes(60_000))  # collected, and sent before the next one
        return True

    handler = Handler(handle)
    server = ps_server(handler, framing=Line(), send_timeout=None)
    client = ps_client(server)
    (session,) = eventually(lambda: server.sessions)
    while session._send_queue is None:  # one message a read, so one reply before the next
        handled = session.messages_received
        client.send("x\n")
        eventually(partial(is_handled, session, handled + 1))
    session.close()
    assert handler.reason() is PsCloseReason.SELF_CLOSE
    assert handler.returned == [True]


# Replies leave together


def test_the_replies_to_the_messages_of_one_read_leave_together(
    ps_server: ServerFactory, ps_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    send_now = SendingHalf._send_now

    def counting(self: SendingHalf[Any], data: bytes | memoryview) -> int:
        sizes.append(len(data))
        return send_now(self, data)

    monkeypatch.setattr(SendingHalf, "_send_now", counting)
    monkeypatch.setattr(framed, "TURN", 1_000.0)  # at whose end it leaves, too
    client = ps_client(ps_server(PsHandler(echo), framing=Line()))
    lines = b"".join(b"%d\n" % number for number in range(1_000))
    client.send(lines)
    client.expect(lines)
    assert len(sizes) <= 3


def test_replies_leave_before_a_handler_waits_for_something_else(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    gate = gevent.event.Event()

    def handle(session: PsSession[Any]) -> None:
        session.send(session.receive())
        gate.wait()
        session.send(session.receive())

    client = ps_client(ps_server(PsHandler(handle), framing=Line()))
    client.send("one\ntwo\n")
    client.expect("one\n")
    gate.set()
    client.expect("two\n")
    client.expect_eof()


# In callbacks, and between framings


class Login(RecordingCallback):
    """Asks for a name first, and for a confirmation in between."""

    def on_open(self, session: PsSession[Any]) -> None:
        super().on_open(session)
        session.send("name?")
        session.set_value("name", session.receive(timeout=5))

    def on_message(self, session: PsSession[Any], message: bytes) -> None:
        super().on_message(session, message)
        if message == b"delete":
            session.send("sure?")
            session.send(b"deleted" if session.receive(timeout=5) == b"yes" else b"kept")
        else:
            session.send(session.get_value("name") + b": " + message)


def test_callbacks_receive_in_their_middle_and_the_rest_comes_to_on_message(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Login()
    client = ps_client(ps_server(callback, framing=Line()))
    client.expect("name?\n")
    client.send("ann\nhello\ndelete\nyes\nand\ndelete\n")
    client.expect("ann: hello\nsure?\ndeleted\nann: and\nsure?\n")
    client.send("no\nbye\n")
    client.expect("kept\nann: bye\n")
    came = [event.value for event in callback.named("on_message")]
    assert came == [b"hello", b"delete", b"and", b"delete", b"bye"]


def test_callbacks_receive_chunks_too(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    server = ps_server(Login())
    client = ps_client(server)
    client.expect("name?")
    (session,) = server.sessions
    client.send("ann")
    eventually(lambda: session.bytes_received == 3)
    client.send("delete")
    client.expect("sure?")
    client.send("yes")
    client.expect("deleted")
    client.send("x")
    client.expect("ann: x")


@pytest.mark.parametrize("end", ["FIN", "close"])
def test_a_session_that_closes_in_the_middle_of_a_callback_closes_once(
    end: str, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Login()
    server = ps_server(callback, framing=Line())
    client = ps_client(server)
    client.send("ann\ndelete\n")
    client.expect("name?\nsure?\n")
    if end == "FIN":
        client.close()
    else:
        server.sessions[0].close()
    callback.wait_for("on_close")
    expected = PsCloseReason.PEER_CLOSE if end == "FIN" else PsCloseReason.SELF_CLOSE
    assert close_reasons(callback) == [expected]


def test_on_eof_comes_after_a_callback_that_received_the_fin(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Eof(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            with pytest.raises(PsClosedError):
                session.receive(timeout=5)
            session.send("no more?")

        def on_eof(self, session: PsSession[Any]) -> None:
            with pytest.raises(PsClosedError):
                session.receive(timeout=5)
            session.send("no more")
            session.close()

    server = ps_server(Eof(), allow_half_open=True)
    client = ps_client(server)
    client.send("x")
    eventually(lambda: any(session.messages_received for session in server.sessions))
    client.eof()
    client.expect("no more?no more")
    client.expect_eof()


def test_the_framing_may_change_between_two_messages(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def handle(session: PsSession[Any]) -> None:
        size = int(session.receive())
        session.set_framing(Raw(size))
        body = b""
        while len(body) < size:
            body += session.receive()
        assert session.receive() == b"line"
        session.set_framing(LengthPrefix(1))
        session.send(session.receive() + body)

    client = ps_client(ps_server(PsHandler(handle), framing=Line()))
    client.send(b"5\nab\nc\nline\n\x02hi")
    client.expect(b"\x07hiab\nc\n")
    client.expect_eof()
    client = ps_client(ps_server(PsHandler(handle), framing=Line()))
    for byte in b"5\nab\nc\nline\n\x02hi":
        client.send(bytes([byte]))
        gevent.sleep(0.001)
    client.expect(b"\x07hiab\nc\n")


def test_framing_changes_in_a_callback_that_receives(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Upload(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            if message.isdigit():
                session.set_framing(Raw(int(message)))
                session.send(session.receive(timeout=5), raw=True)

    callback = Upload()
    client = ps_client(ps_server(callback, framing=Line()))
    client.send(b"before\n3\na\nbafter\n2\n\n\nend\n")
    client.expect(b"a\nb\n\n")
    callback.wait_for("on_message", 5)
    came = [event.value for event in callback.named("on_message")]
    assert came == [b"before", b"3", b"after", b"2", b"end"]


@pytest.mark.parametrize("cut", [False, True])
def test_a_callback_without_a_framing_goes_on_with_one_and_receives(
    cut: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Upgrade(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            if message == b"upgrade":
                session.set_framing(Line())
                session.send(b"welcome " + session.receive(timeout=5))

    callback = Upgrade()
    server = ps_server(callback)
    client = ps_client(server)
    client.send("upgrade")
    (session,) = eventually(lambda: server.sessions)
    eventually(lambda: session.framing)
    client.send("name\none\ntwo\n" if not cut else "name\none\ntwo\nth")
    client.expect("welcome name\n")
    callback.wait_for("on_message", 3)
    client.send("three\n" if not cut else "ree\n")
    callback.wait_for("on_message", 4)
    came = [event.value for event in callback.named("on_message")]
    assert came == [b"upgrade", b"one", b"two", b"three"]


def test_what_on_eof_receives_and_replies_is_not_lost(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    class Eof(RecordingCallback):
        def on_eof(self, session: PsSession[Any]) -> None:
            session.set_framing(FixedSize(2))
            session.send(session.receive())

        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            session.send(message.upper())
            session.close()

    callback = Eof()
    client = ps_client(ps_server(callback, framing=Line(), allow_half_open=True))
    with caplog.at_level(logging.INFO, "psofa_gevent"):
        client.send("abcd")
        client.eof()
        client.expect("abCD")
        client.expect_eof()
        callback.wait_for("on_close")
    assert caplog.text.count("bytes of a message") == 1


# Where it can't work


def test_receive_belongs_to_the_sessions_own_greenlet(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())
    ps_client(server)
    (session,) = eventually(lambda: server.sessions)
    with pytest.raises(RuntimeError, match="belongs to the greenlet"):
        session.receive()
    with pytest.raises(RuntimeError, match="belongs to the greenlet"):
        list(session)
    with pytest.raises(RuntimeError, match="belongs to the greenlet"):
        NativeThread(session.receive).wait()


def test_a_coroutine_and_an_async_callback_cannot_receive(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    errors: list[str] = []

    async def receive(session: PsSession[Any]) -> None:
        with pytest.raises(RuntimeError, match="belongs to the greenlet"):
            session.receive()
        errors.append("")

    class Async(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            await receive(session)
            await asyncio.sleep(0)
            await session.send_async("still here")

    class Sync(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            run_coroutine(receive(session))
            session.send("still here")

    for callback in (Async(), Sync()):
        client = ps_client(ps_server(callback))
        client.send("x")
        client.expect("still here")
    assert len(errors) == 2


def test_a_wrong_timeout_is_refused(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    def handle(session: PsSession[Any]) -> None:
        with pytest.raises(ValueError, match="timeout must be"):
            session.receive(-1)
        with pytest.raises(TypeError, match="timeout must be"):
            session.receive("1")  # type: ignore[arg-type]  # the point
        session.send("ok")

    client = ps_client(ps_server(PsHandler(handle)))
    client.expect("ok")


async def coroutine(_session: PsSession[Any]) -> None:
    pass


def generator(_session: PsSession[Any]) -> Any:
    yield


async def async_generator(_session: PsSession[Any]) -> Any:
    yield


class AsyncCallable:
    async def __call__(self, _session: PsSession[Any]) -> None:
        pass


class Mixin:
    def on_message(self, _session: PsSession[Any], _message: bytes) -> None:
        pass


AnyHandler: Any = PsHandler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (PsHandler, "needs a function"),
        (partial(AnyHandler, 5), "must be a function"),
        (partial(AnyHandler, coroutine), "plain function"),
        (partial(AnyHandler, generator), "plain function"),
        (partial(AnyHandler, async_generator), "plain function"),
        (partial(AnyHandler, AsyncCallable()), "plain function"),
        (lambda: type("X", (Mixin, PsHandler), {}), "X.on_message would never"),
        (partial(AnyHandler, lambda: None), "does not take"),
        (partial(AnyHandler, lambda one, two: None), "does not take"),
        (lambda: type("Both", (PsHandler,), {"handle": echo})(echo), "would never be called"),
        (lambda: type("X", (PsHandler,), {"on_message": echo}), "X.on_message would never"),
        (lambda: type("X", (PsHandler,), {"on_open_async": echo}), "would never be called"),
        (lambda: type("X", (PsHandler,), {"use_async_callback": True}), "is not async"),
    ],
)
def test_what_could_never_work_is_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PsCallbackError, match=message):
        make()
