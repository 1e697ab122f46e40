"""Sessions with a framing: whole messages in, whole messages out."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import gevent
import gevent.subprocess
import pytest

from helpers import NativeThread, Stopwatch, close_reasons, echo
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsFramingError,
    PsMultiClient,
    PsSession,
)
from psofa_gevent.framing import (
    SKIP,
    Between,
    Decoded,
    Delimiter,
    FixedSize,
    Framing,
    LengthPrefix,
    Line,
    Raw,
    Varint,
)
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

FRAMINGS: list[Framing[bytes]] = [
    Line(),
    Delimiter(b"\r\n"),
    LengthPrefix(),
    LengthPrefix(3, byteorder="little", includes_prefix=True),
    Varint(),
    FixedSize(4),
    Between(b"\x02", b"\x03"),
    Between(b"~", b"~"),
]
MESSAGES = [b"one ", b"two ", b"3   ", b"four"]


class Acting(RecordingCallback):
    """Records, and does for each message what a test says."""

    def __init__(self, act: Callable[[PsSession[Any], Any], object]) -> None:
        super().__init__()
        self.act = act

    def on_message(self, session: PsSession[Any], message: Any) -> None:
        super().on_message(session, message)
        self.act(session, message)


def messages_of(callback: RecordingCallback) -> list[Any]:
    return [event.value for event in callback.named("on_message")]


# Whole messages


@pytest.mark.parametrize("framing", FRAMINGS, ids=lambda framing: type(framing).__name__)
@pytest.mark.parametrize("step", [1, 3, 1_000])
def test_messages_are_whole_and_in_order_however_their_bytes_come(
    framing: Framing[bytes], step: int, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = echo()
    client = ps_client(ps_server(callback, framing=framing))
    stream = b"".join(map(framing.encode, MESSAGES))
    for at in range(0, len(stream), step):
        client.send(stream[at : at + step])
        gevent.sleep(0.001)  # so that they come in several reads
    client.expect(stream)
    assert messages_of(callback) == MESSAGES
    (session,) = {event.session for event in callback.named("on_message")}
    assert session is not None
    assert (session.messages_received, session.bytes_received) == (4, len(stream))


@pytest.mark.parametrize("framing", FRAMINGS, ids=lambda framing: type(framing).__name__)
@pytest.mark.parametrize("kind", [PsClient, PsMultiClient])
def test_a_client_and_a_server_exchange_messages(
    framing: Framing[bytes], kind: type[Any], ps_server: ServerFactory
) -> None:
    server = ps_server(echo(), framing=framing)
    answers = RecordingCallback()
    host, port = server.address[:2]
    if kind is PsClient:
        with PsClient(answers, host, port, framing=framing) as client:
            session = client.session
            assert session is not None
            for message in MESSAGES:
                session.send(message)
            answers.wait_for("on_message", len(MESSAGES))
    else:
        with PsMultiClient(answers, framing=framing) as bundle:
            session = bundle.connect(host, port).session
            for message in MESSAGES:
                session.send(message)
            answers.wait_for("on_message", len(MESSAGES))
    assert messages_of(answers) == MESSAGES


def test_messages_of_ones_own_types(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    got: list[dict[str, int]] = []

    class Counter(PsCallback[dict[str, int]]):
        def on_message(self, session: PsSession[dict[str, int]], message: dict[str, int]) -> None:
            got.append(message)
            session.send({"n": message["n"] + 1})

    framing = Line().typed(json.loads, json.dumps)
    client = ps_client(ps_server(Counter(), framing=framing))
    client.send('{"n": 1}\n{"n"')
    client.send(": 5}\n")
    client.expect('{"n": 2}\n{"n": 6}\n')
    assert got == [{"n": 1}, {"n": 5}]


def test_messages_of_async_callbacks(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    class Shout(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            await session.send_async(message.upper())

    client = ps_client(ps_server(Shout(), framing=Line()))
    client.send("one\ntwo\nthr")
    client.expect("ONE\nTWO\n")
    client.send("ee\n")
    client.expect("THREE\n")


def test_a_large_message_is_larger_than_a_read(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    framing = LengthPrefix()
    callback = RecordingCallback()
    client = ps_client(ps_server(callback, framing=framing, read_buffer_size=1_000))
    client.send(framing.encode(b"x" * 100_000))
    callback.wait_for("on_message")
    assert messages_of(callback) == [b"x" * 100_000]


def test_a_message_from_another_thread_is_framed_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), framing=LengthPrefix(2))
    client = ps_client(server)
    (session,) = eventually(lambda: server.sessions)
    NativeThread(session.send, b"hello").wait()
    client.expect(b"\0\5hello")


def test_raw_bytes_are_sent_as_they_are(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    def reply(session: PsSession, message: bytes) -> None:
        session.send(b"%d" % len(message))
        session.send(message, raw=True)

    client = ps_client(ps_server(Acting(reply), framing=Line()))
    client.send("hello\n")
    client.expect("5\nhello")


def test_a_message_that_cannot_be_framed_is_an_error_and_the_session_goes_on(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def reply(session: PsSession, message: bytes) -> None:
        with pytest.raises(PsFramingError, match="contains a newline"):
            session.send(message + b"\nINJECTED")
        session.send("fine")

    client = ps_client(ps_server(Acting(reply), framing=Line()))
    client.send("hello\n")
    client.expect("fine\n")


# Between the messages of one read


def test_no_message_comes_after_a_close(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    def close(session: PsSession, message: bytes) -> None:
        if message == b"2":
            session.close()

    callback = Acting(close)
    client = ps_client(ps_server(callback, framing=Line()))
    client.send("1\n2\n3\n4\n")
    client.expect_eof()
    callback.wait_for("on_close")
    assert messages_of(callback) == [b"1", b"2"]
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@pytest.mark.logs_errors
def test_no_message_comes_after_an_exception(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(session: PsSession, message: bytes) -> None:
        session.send(message)
        if message == b"2":
            raise PsFramingError("of the callback's own")

    callback = Acting(fail)
    client = ps_client(ps_server(callback, framing=Line()))
    client.send("1\n2\n3\n")
    client.expect("1\n2\n")
    client.expect_eof()
    callback.wait_for("on_close")
    assert messages_of(callback) == [b"1", b"2"]
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    assert "Traceback" in caplog.text  # it is no fault of the peer's


def test_bytes_before_fin_are_handed_over_as_messages(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "psofa_gevent")
    callback = RecordingCallback()
    client = ps_client(ps_server(callback, framing=Line()))
    client.send("1\n2\nhalf")
    client.eof()
    callback.wait_for("on_close")
    assert messages_of(callback) == [b"1", b"2"]
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]
    assert "after 4 bytes of a message" in caplog.text


def test_messages_come_one_at_a_time_also_if_one_takes_long(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    running = 0

    def take_long(_session: PsSession, _message: bytes) -> None:
        nonlocal running
        running += 1
        assert running == 1
        gevent.sleep(0.002)
        running -= 1

    callback = Acting(take_long)
    client = ps_client(ps_server(callback, framing=Line()))
    for number in range(20):
        client.send(f"{number}\nfirst half of a line, ")
        gevent.sleep(0.001)
        client.send("and the second\n")
    callback.wait_for("on_message", 40)
    client.eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


# Switching


def test_a_callback_switches_the_framing_from_the_next_byte_on(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def upgrade(session: PsSession, message: bytes) -> None:
        session.send(message)
        if message == b"UPGRADE":
            session.set_framing(LengthPrefix(1))
        if message == b"down":
            session.set_framing(Line(newline=b"\r\n"))

    callback = Acting(upgrade)
    client = ps_client(ps_server(callback, framing=Line()))
    # All in one read: what was read already is kept.
    client.send(b"hello\nUPGRADE\n\3one\4down" + b"line\nand ")
    client.expect(b"hello\nUPGRADE\n\3one\4downline\r\n")
    client.send("another\n")
    client.expect("and another\r\n")
    assert messages_of(callback) == [
        b"hello",
        b"UPGRADE",
        b"one",
        b"down",
        b"line",
        b"and another",
    ]


@pytest.mark.parametrize("step", [1, 5, 1_000])
def test_a_header_and_then_so_many_bytes(
    step: int, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    bodies: list[bytes] = []

    class Upload(PsCallback):
        missing = 0

        def on_message(self, session: PsSession, message: bytes) -> None:
            if self.missing:
                bodies[-1] += message
                self.missing -= len(message)
                if not self.missing:
                    session.send("stored")
            else:
                verb, size = message.split()
                assert verb == b"PUT"
                self.missing = int(size)
                bodies.append(b"")
                session.set_framing(Raw(self.missing))

    client = ps_client(ps_server(Upload(), framing=Line()))
    stream = b"PUT 5\n12\n45PUT 3\nabcPUT 1\n\nPUT 2000\n" + b"x" * 2_000
    for at in range(0, len(stream), step):
        client.send(stream[at : at + step])
        if step < 1_000:
            gevent.sleep(0)
    client.expect("stored\n" * 4)
    assert bodies == [b"12\n45", b"abc", b"\n", b"x" * 2_000]


def test_a_session_without_framing_gets_one_and_loses_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    told: list[Framing[Any] | None] = []

    def switch(session: PsSession, message: bytes) -> None:
        if message == b"frame me":
            told.append(session.framing)
            session.set_framing(Line())
            told.append(session.framing)
            session.send("framed")
        elif message == b"enough":
            session.set_framing(None)
            session.send("raw again")
        else:
            session.send(message)

    client = ps_client(ps_server(Acting(switch)))
    client.send("frame me")
    client.expect("framed\n")
    client.send("li")
    client.send("ne\nenough\nchunk")
    client.expect("line\nraw againchunk")
    client.send("more")
    client.expect("more")
    assert [type(framing) for framing in told] == [type(None), Line]


def test_a_framing_set_in_on_open_holds_from_the_first_byte(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Open(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            session.set_framing(FixedSize(2))
            session.send("ok")

    callback = Open()
    client = ps_client(ps_server(callback))
    client.send("abcd")
    client.expect("ok")
    callback.wait_for("on_message", 2)
    assert messages_of(callback) == [b"ab", b"cd"]


def test_the_framing_is_switched_in_callbacks_only(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(RecordingCallback(), framing=Line())
    ps_client(server)
    (session,) = eventually(lambda: server.sessions)
    eventually(lambda: session.waiting_since)
    with pytest.raises(RuntimeError, match="in a callback of the session"):
        session.set_framing(Line())


# What is no message


@pytest.mark.parametrize(
    ("framing", "stream", "why"),
    [
        (Line(max_size=10), b"x" * 12, "larger than max_size"),
        (Line(max_size=10), b"x" * 12 + b"\n", "larger than max_size"),
        (LengthPrefix(max_size=10), b"\0\0\0\x0bx", "a length says 11 bytes"),
        (Varint(), b"\xff" * 10, "more than 5 bytes"),
        (Between(b"\x02", b"\x03"), b"noise", "starts with"),
        (Line().typed(json.loads, json.dumps), b"{not json\n", "JSONDecodeError"),
    ],
    ids=["endless", "large", "length", "varint", "noise", "json"],
)
def test_a_malformed_message_closes_its_session_and_says_why(
    framing: Framing[Any],
    stream: bytes,
    why: str,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = echo()
    server = ps_server(callback, framing=framing)
    good, bad = ps_client(server), ps_client(server)
    fine = framing.encode("1")
    bad.send(fine + stream + fine)
    bad.expect(fine)  # the reply to the message before it
    bad.expect_eof()
    callback.wait_for("on_close")
    (closed,) = callback.named("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, PsFramingError)
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert why in record.getMessage()
    assert repr(closed.session.connection_id)[6:-2] in record.getMessage()
    assert record.exc_info is None
    good.send(fine)
    good.expect(fine)


def test_an_endless_message_is_not_read_further_than_max_size_and_a_read(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, framing=Line(max_size=100_000), linger_timeout=0.0)
    client = ps_client(server)
    with pytest.raises((ConnectionError, TimeoutError)):
        client.send(bytes(100_000_000))
    callback.wait_for("on_close")
    (closed,) = callback.named("on_close")
    assert closed.session is not None
    assert closed.session.bytes_received <= 100_001 + 65_536


# Messages that trickle in


def test_a_message_must_be_whole_in_frame_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback, framing=Line(), frame_timeout=0.3, divide=1))
    stopwatch = Stopwatch()

    def trickle() -> None:
        with contextlib.suppress(ConnectionError):
            while not callback.named("on_close"):
                client.send("x")
                gevent.sleep(0.01)

    trickling = gevent.spawn(trickle)
    callback.wait_for("on_close")
    stopwatch.check(0.3, most=1.3)
    trickling.get(timeout=5)
    (closed,) = callback.named("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, TimeoutError)
    assert "frame_timeout=0.3 s" in caplog.text


def test_a_message_that_stops_in_the_middle_times_out(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback, framing=Line(), frame_timeout=0.1))
    client.send("half")
    callback.wait_for("on_close", timeout=5)
    assert close_reasons(callback) == [PsCloseReason.FAILED]


def test_frame_timeout_begins_anew_with_each_message_and_not_between_them(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, framing=Line(), frame_timeout=1.5, divide=1)
    client = ps_client(server)
    quiet = ps_client(server)
    quiet.send("whole\n")
    # Never without a message that has begun, for longer than frame_timeout.
    for number in range(8):
        client.send(f"of {number}\nhalf ")
        gevent.sleep(0.3)
    client.send("\n")
    callback.wait_for("on_message", 10)
    assert close_reasons(callback) == []


def test_frame_timeout_does_not_count_what_a_callback_takes(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Acting(lambda _session, _message: gevent.sleep(2.0))
    client = ps_client(ps_server(callback, framing=Line(), frame_timeout=1.5, divide=1))
    client.send("long\nhalf ")
    gevent.sleep(2.5)  # half a second of it is the peer's
    client.send("and half\n")
    callback.wait_for("on_message", 2)
    assert messages_of(callback) == [b"long", b"half and half"]


class Stomp(Framing[bytes]):
    """Ended by NUL, with line ends in between that mean nothing, which are skipped or kept."""

    max_size = 64

    def __init__(self, *, skips: bool) -> None:
        self.skips = skips

    def __repr__(self) -> str:
        return f"Stomp(skips={self.skips})"

    def decode(self, data: bytes, start: int) -> Decoded[bytes]:
        begin = start
        while begin < len(data) and data[begin] == 10:
            begin += 1
        if begin > start and self.skips:
            return SKIP, begin
        end = data.find(b"\0", begin)
        return None if end < 0 else (data[begin:end], end + 1)


@pytest.mark.parametrize(
    ("framing", "beat", "message", "right"),
    [
        (Stomp(skips=True), b"\n", b"SEND\0", b"SEND"),
        (Stomp(skips=False), b"\n", b"SEND\0", b"SEND"),
        (Delimiter(b"\0", ignore=b"\r\n"), b"\r\n", b"SEND\0", b"SEND"),
        (Delimiter(b"\0"), b"\n", b"SEND\0", b"\n" * 100 + b"SEND"),
        (Between(b"~", b"~"), b"~", b"~SEND~", b"SEND"),
        (Between(b"~", b"~"), b"~", b"SEND~", b"SEND"),
        (Between(b"~", b"~", resynchronise=True), b"~", b"SEND~", b"SEND"),
    ],
    ids=repr,
)
def test_bytes_that_keep_a_connection_alive_are_no_message_that_has_begun(
    framing: Framing[bytes],
    beat: bytes,
    message: bytes,
    right: bytes,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "psofa_gevent")
    callback = RecordingCallback()
    server = ps_server(callback, framing=framing, frame_timeout=0.3, divide=1)
    client = ps_client(server)
    (session,) = eventually(lambda: server.sessions)

    def send(data: bytes) -> None:
        expected = session.bytes_received + len(data)
        client.send(data)
        eventually(lambda: session.bytes_received == expected)

    for _ in range(100):
        send(beat)
    # Looked at together, and this one begins later.
    other = ps_client(server)
    other.send(b"SE" if beat != b"~" else b"~SE")
    callback.wait_for("on_close")
    assert [event.session is session for event in callback.named("on_close")] == [False]
    send(message)
    send(beat)
    client.eof()
    callback.wait_for("on_close", 2)
    assert messages_of(callback) == [right]
    assert callback.named("on_close", session)[0].value is PsCloseReason.PEER_CLOSE
    assert not [each for each in caplog.messages if "of a message" in each and "closed" in each]


def test_frame_timeout_begins_anew_behind_what_is_skipped(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Telnet(Framing[bytes]):
        """Options of three bytes, which mean nothing here, between lines."""

        def decode(self, data: bytes, start: int) -> Decoded[bytes]:
            if data[start] == 255:
                return (SKIP, start + 3) if len(data) - start >= 3 else None
            end = data.find(b"\n", start)
            return None if end < 0 else (data[start:end], end + 1)

    callback = RecordingCallback()
    server = ps_server(callback, framing=Telnet(), frame_timeout=0.8, divide=1)
    client = ps_client(server)
    # Never without something that has begun, for longer than frame_timeout.
    client.send(b"\xff")
    for _ in range(25):
        gevent.sleep(0.1)
        client.send(b"\xfb\x01\xff")
    client.send(b"\xfb\x01line\n")
    callback.wait_for("on_message")
    assert close_reasons(callback) == []


# What others send


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_telnet_sends_lines(ps_server: ServerFactory) -> None:
    callback = echo()
    server = ps_server(callback, framing=Line())
    host, port = server.address[:2]
    curl = gevent.spawn(
        gevent.subprocess.run,
        ["curl", "-s", "-N", "-m", "1", f"telnet://{host}:{port}"],
        input=b"one\ntwo\n",
        stdout=subprocess.PIPE,
        check=False,
    )
    assert curl.get(timeout=10).stdout == b"one\ntwo\n"
    assert messages_of(callback) == [b"one", b"two"]


def test_a_peer_resets_in_the_middle_of_a_message(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, framing=LengthPrefix())
    with ScriptedClient(server.address) as client:
        client.send(b"\0\0\0\5he")
        callback.wait_for("on_open")
        client.reset()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    assert messages_of(callback) == []
