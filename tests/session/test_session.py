"""What `PsSession` offers to callbacks: sending, values, endpoints, counters, half-close."""

from __future__ import annotations

import array
import ctypes
import enum
import re
import socket
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest
from gevent import monkey

from acting import STALLING, ActingCallback, sending, wait_until_stalled
from helpers import NativeThread, run_python, stalled_peer
from psofa_gevent import (
    PsClient,
    PsCloseReason,
    PsGroup,
    PsHandler,
    PsMultiClient,
    PsRequester,
    PsSendError,
    PsSession,
    PsSocketAddressFamily,
    run_coroutine,
)
from psofa_gevent.framing import Line
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    connected_session,
    eventually,
)

FOREVER = 600.0


@pytest.fixture(name="callback")
def quiet_callback() -> ActingCallback:
    return ActingCallback()


# What can be sent


class Text(str):
    __slots__ = ()


class Data(bytes):
    __slots__ = ()


class Word(enum.StrEnum):
    HELLO = "hello"


MESSAGES: list[tuple[str | bytes | bytearray | memoryview, bytes]] = [
    ("plain", b"plain"),
    ("Grüße, 世界 🌍\0\n", b"Gr\xc3\xbc\xc3\x9fe, \xe4\xb8\x96\xe7\x95\x8c \xf0\x9f\x8c\x8d\0\n"),
    (Text("a subclass"), b"a subclass"),
    (Word.HELLO, b"hello"),
    (b"\x00\xff\x80", b"\x00\xff\x80"),
    (Data(b"a subclass"), b"a subclass"),
    (bytearray(b"mutable"), b"mutable"),
    (memoryview(b"a view"), b"a view"),
    (memoryview(bytearray(b"a part of it"))[2:6], b"part"),
    (memoryview(array.array("i", [1, -1])), array.array("i", [1, -1]).tobytes()),
    (memoryview(array.array("d", [1.5])), array.array("d", [1.5]).tobytes()),
    (memoryview(b"abcdef").cast("B", (2, 3)), b"abcdef"),
    (memoryview((ctypes.c_uint16 * 2)(1, 2)), bytes((ctypes.c_uint16 * 2)(1, 2))),
    (memoryview(b"x").cast("B", ()), b"x"),
]


@pytest.mark.parametrize(("message", "expected"), MESSAGES)
def test_text_leaves_as_utf_8_and_buffers_byte_by_byte(
    callback: ActingCallback, message: str | bytes | bytearray | memoryview, expected: bytes
) -> None:
    with connected_session(callback) as connected:
        connected.session.send(message)
        connected.session.send("|")
        connected.peer.expect(expected + b"|")
        assert connected.session.bytes_sent == len(expected) + 1


@pytest.mark.parametrize("empty", ["", b"", bytearray(), memoryview(b""), memoryview(b"ab")[1:1]])
def test_an_empty_message_sends_nothing_and_harms_nothing(
    callback: ActingCallback, empty: str | bytes | bytearray | memoryview
) -> None:
    with connected_session(callback) as connected:
        connected.session.send(empty)
        connected.session.send("x")
        connected.session.send(empty, timeout=0)
        connected.peer.expect("x")
        assert connected.session.bytes_sent == 1
        connected.session.close()
        with pytest.raises(PsSendError):
            connected.session.send(empty)


def test_an_empty_message_in_line_behind_a_long_one_returns_when_its_turn_has_come(
    ps_server: ServerFactory, callback: ActingCallback
) -> None:
    with stalled_peer(ps_server(callback).address) as client:
        session = callback.opened()
        long = sending(session)
        wait_until_stalled(session)
        empty = [sending(session, b"", timeout) for timeout in (None, 5.0)]
        client.receive(len(STALLING))
        assert long.get() is None
        assert [each.get(timeout=5) for each in empty] == [None, None]
        assert session.is_open


@pytest.mark.parametrize("wrong", [None, 1, 1.5, ["x"], array.array("b"), object(), PsSession])
def test_what_is_neither_text_nor_bytes_is_refused_and_the_session_stays_open(
    callback: ActingCallback, wrong: object
) -> None:
    with connected_session(callback) as connected:
        for refuse in (connected.session.send, lambda it: sending_in_thread(connected.session, it)):
            with pytest.raises(TypeError, match=type(wrong).__name__):
                refuse(wrong)  # type: ignore[arg-type]  # that is the point
        assert connected.session.is_open
        connected.session.send("fine")
        connected.peer.expect("fine")


def sending_in_thread(session: PsSession, message: object) -> None:
    NativeThread(session.send, message).wait()  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("framing", [None, Line()], ids=["raw", "framed"])
@pytest.mark.parametrize(
    "way", ["send", "send_async", "post", "broadcast", "group", "request", "in a thread"]
)
def test_text_that_is_no_utf_8_is_refused_and_the_session_stays_open(
    callback: ActingCallback, way: str, framing: Line | None
) -> None:
    text = "half a pair: \ud800"
    with connected_session(callback, framing=framing) as connected:
        session = connected.session
        eventually(lambda: session.waiting_since)
        group: PsGroup[bytes] = PsGroup()
        group.join(session)
        ways: dict[str, Callable[[], object]] = {
            "send": lambda: session.send(text),
            "send_async": lambda: run_coroutine(session.send_async(text)),
            "post": lambda: session.post(text),
            "broadcast": lambda: session.owner.broadcast(text),
            "group": lambda: group.post(text),
            "request": lambda: PsRequester[bytes]().request(session, text),
            "in a thread": lambda: sending_in_thread(session, text),
        }
        with pytest.raises(UnicodeEncodeError, match="position 13: surrogates not allowed"):
            ways[way]()
        session.send("fine")
        connected.peer.expect("fine" if framing is None else "fine\n")


@pytest.mark.parametrize(
    ("timeout", "error"),
    [("1", TypeError), (True, TypeError), (-1, ValueError), (float("nan"), ValueError)],
)
@pytest.mark.parametrize("message", [b"short", STALLING])
def test_a_wrong_timeout_is_refused_before_anything_is_sent(
    ps_server: ServerFactory,
    callback: ActingCallback,
    timeout: object,
    error: type[Exception],
    message: bytes,
) -> None:
    """A part of a message, with the session still open, would be a broken stream."""
    with stalled_peer(ps_server(callback).address) as client:
        session = callback.opened()
        with pytest.raises(error, match="timeout"):
            session.send(message, timeout)  # type: ignore[arg-type]  # that is the point
        assert session.bytes_sent == 0
        session.send("fine")
        client.expect("fine")


def test_a_buffer_may_change_when_send_has_returned(callback: ActingCallback) -> None:
    with connected_session(callback) as connected:
        buffer = bytearray(b"before")
        connected.session.send(buffer)
        buffer[:] = b"after it"
        connected.peer.expect("before")


def test_send_is_refused_before_on_close_as_soon_as_the_close_is_requested(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def close_and_send(session: PsSession, message: bytes) -> None:
        session.close()
        with pytest.raises(PsSendError, match=str(session.connection_id)):
            session.send("too late")
        session.set_value("refused", True)

    callback = ActingCallback(on_message=close_and_send)
    client = ps_client(ps_server(callback))
    client.send("x")
    client.expect_eof()
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE
    assert session.get_value("refused")


# Who it is


def test_the_connection_id_is_random_for_a_server_and_chosen_or_random_for_a_client(
    ps_server: ServerFactory, callback: ActingCallback
) -> None:
    server = ps_server(callback)
    host, port = server.address[:2]
    chosen = uuid.uuid1()
    with PsMultiClient(RecordingCallback()) as bundle:
        mine = bundle.connect(host, port, connection_id=chosen).session
        other = bundle.connect(host, port).session
        ids = {mine.connection_id, other.connection_id}
        ids |= {callback.opened(number).connection_id for number in range(2)}
    assert mine.connection_id is chosen
    assert len(ids) == 4
    assert all(isinstance(each, uuid.UUID) for each in ids)


def test_the_connection_id_is_the_same_whenever_and_wherever_it_is_asked_for(
    ps_server: ServerFactory, ps_client: ClientFactory, callback: ActingCallback
) -> None:
    ps_client(ps_server(callback)).close()
    session = callback.opened()
    callback.closed(session)
    ids = [NativeThread(lambda: session.connection_id).wait() for _ in range(4)]
    assert {*ids, session.connection_id} == {session.connection_id}
    assert session.connection_id.version == 4
    assert session.connection_id.variant == uuid.RFC_4122


def test_a_forked_child_gives_its_sessions_other_ids_than_its_parent() -> None:
    program = """
        import os
        from psofa_gevent import PsCallback
        from psofa_gevent.testing import connected_session

        def ids():
            for _ in range(3):
                with connected_session(PsCallback()) as connected:
                    print(connected.session.connection_id, flush=True)

        ids()  # some random bytes are left of these
        if os.fork() == 0:
            ids()
            os._exit(0)
        os.wait()
        ids()
    """
    done = run_python(program)
    assert (done.stderr, done.returncode) == ("", 0)
    assert len(set(done.stdout.split())) == 9


@pytest.mark.parametrize("no_delay", [True, False])
def test_no_delay_is_set_on_the_sockets_of_servers_and_clients(
    ps_server: ServerFactory, callback: ActingCallback, no_delay: bool
) -> None:
    server = ps_server(callback, no_delay=no_delay)
    host, port = server.address[:2]
    with (
        PsClient(RecordingCallback(), host, port, no_delay=no_delay) as client,
        PsMultiClient(RecordingCallback(), no_delay=no_delay) as bundle,
    ):
        sessions = [client.session, bundle.connect(host, port).session]
        sessions += [callback.opened(number) for number in range(2)]
        for session in sessions:
            assert session is not None
            option = session._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert bool(option) is no_delay


def test_the_owner_is_the_server_or_client_also_after_the_close(
    ps_server: ServerFactory, callback: ActingCallback
) -> None:
    server = ps_server(callback)
    host, port = server.address[:2]
    with PsClient(RecordingCallback(), host, port) as client, PsMultiClient(callback) as bundle:
        session = client.session
        assert session is not None
        many = bundle.connect(host, port).session
        owners = (callback.opened().owner, session.owner, many.owner)
        assert owners == (server, client, bundle)
    assert session.owner is client
    assert many.owner is bundle


@pytest.mark.parametrize(
    ("host", "to", "family"),
    [
        ("127.0.0.1", "127.0.0.1", PsSocketAddressFamily.IPV4),
        ("0.0.0.0", "127.0.0.1", PsSocketAddressFamily.IPV4),
        ("::1", "::1", PsSocketAddressFamily.IPV6),
        ("::", "::1", PsSocketAddressFamily.IPV6),
        ("::ffff:0.0.0.0", "::ffff:127.0.0.1", PsSocketAddressFamily.IPV6),
    ],
)
def test_the_endpoints_are_those_of_the_connection_also_after_the_close(
    ps_server: ServerFactory,
    callback: ActingCallback,
    host: str,
    to: str,
    family: PsSocketAddressFamily,
) -> None:
    server = ps_server(callback, host=host, socket_address_family=family)
    with ScriptedClient((to, server.address[1])) as client:
        session = callback.opened()
        expected = (client.socket.getpeername(), client.local_endpoint)
        assert (session.local_endpoint, session.remote_endpoint) == expected
        client.reset()
    callback.closed(session)
    server.shutdown()
    assert (session.local_endpoint, session.remote_endpoint) == expected


def test_the_endpoints_of_a_client_are_those_of_its_servers_session_the_other_way_round(
    ps_server: ServerFactory, callback: ActingCallback
) -> None:
    server = ps_server(callback)
    with PsClient(RecordingCallback(), *server.address[:2]) as client:
        session = client.session
        assert session is not None
        theirs = callback.opened()
        assert session.local_endpoint == theirs.remote_endpoint
        assert session.remote_endpoint == theirs.local_endpoint == server.address


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_repr_is_one_line_with_the_id_both_endpoints_and_the_state_also_after_the_close(
    ps_server: ServerFactory, ps_client: ClientFactory, callback: ActingCallback, host: str
) -> None:
    ipv6 = {"socket_address_family": PsSocketAddressFamily.IPV6} if ":" in host else {}
    server = ps_server(callback, **ipv6)
    client = ps_client(server)
    session = callback.opened()
    session.set_value("secret", "password\n")
    shown = f"[{host}]" if ipv6 else host
    assert client.local_endpoint is not None
    for state in ("open", "PEER_CLOSE"):
        line = repr(session)
        assert "\n" not in line
        assert str(session.connection_id) in line
        assert f"{shown}:{server.address[1]} " in line
        assert f"{shown}:{client.local_endpoint[1]} " in line
        assert state in line
        assert "secret" not in line
        if state == "open":
            client.close()
            callback.closed(session)


def test_repr_and_endpoints_of_a_socket_without_an_address(callback: ActingCallback) -> None:
    with connected_session(callback) as connected:
        assert connected.session.local_endpoint is None
        assert connected.session.remote_endpoint is None
        line = repr(connected.session)
    assert re.fullmatch(r"<PsSession \S+ \? - \? open>", line)


def test_sessions_are_told_apart_by_identity_and_can_be_keys(
    ps_server: ServerFactory, ps_client: ClientFactory, callback: ActingCallback
) -> None:
    server = ps_server(callback)
    clients = [ps_client(server) for _ in range(2)]
    first, second = callback.opened(0), callback.opened(1)
    names = {first: "first", second: "second"}
    for client in clients:
        client.eof()
    callback.wait_for("on_close", 2)
    assert names[first] == "first"
    assert first != second
    assert first not in server.sessions


# Values


def test_values_of_any_type_are_kept_under_their_names(callback: ActingCallback) -> None:
    with connected_session(callback) as connected:
        session = connected.session
        values = {"none": None, "list": [1], "type": int, "it": session, "": gevent.spawn, "ü": 0}
        for name, value in values.items():
            session.set_value(name, value)
        for name, value in values.items():
            assert session.get_value(name) is value
            assert session.get_value(name, "default") is value
        session.set_value("list", "another")
        assert session.get_value("list") == "another"


def test_a_value_that_is_not_there_is_the_default(callback: ActingCallback) -> None:
    with connected_session(callback) as connected:
        session = connected.session
        assert session.get_value("name") is None
        assert session.get_value("name", 5) == 5
        assert session.get_value("name", default=session) is session
        session.clear_value("name")
        session.set_value("name", 1)
        session.clear_value("name")
        session.clear_value("name")
        assert session.get_value("name", "gone") == "gone"


def test_values_belong_to_one_session_and_last_until_the_user_drops_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def count(session: PsSession, message: bytes) -> None:
        session.set_value("count", session.get_value("count", 0) + 1)
        session.send(str(session.get_value("count")))

    callback = ActingCallback(
        on_message=count, on_close=lambda session, reason: session.set_value("closed", reason)
    )
    server = ps_server(callback)
    first, second = ps_client(server), ps_client(server)
    for client, expected in ((first, "1"), (first, "2"), (second, "1"), (first, "3")):
        client.send("x")
        client.expect(expected)
    first.eof()
    [closed] = callback.wait_for("on_close")
    assert closed.session is not None
    eventually(lambda: closed.session and closed.session.get_value("closed"))
    assert closed.session.get_value("count") == 3


@pytest.mark.parametrize("wrong", [None, 1, b"name", ["name"]])
def test_the_name_of_a_value_must_be_text(callback: ActingCallback, wrong: object) -> None:
    with connected_session(callback) as connected:
        session = connected.session
        with pytest.raises(TypeError, match="name must be a str"):
            session.set_value(wrong, 1)  # type: ignore[arg-type]  # that is the point
        assert session.is_open


def test_no_other_attributes_can_be_set(callback: ActingCallback) -> None:
    """A misspelt name must not vanish: that is what `set_value` is for."""
    with connected_session(callback) as connected:
        with pytest.raises(AttributeError):
            connected.session.is_open = True  # type: ignore[misc]  # that is the point
        with pytest.raises(AttributeError):
            connected.session.my_own = 1  # type: ignore[attr-defined]  # that is the point


# Counters


def test_the_counters_tell_what_came_and_went(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    seen: list[tuple[int, int, int]] = []

    def count(session: PsSession, message: bytes) -> None:
        session.send(message + message)
        seen.append((session.messages_received, session.bytes_received, session.bytes_sent))

    callback = ActingCallback(on_message=count)
    server = ps_server(callback)
    client = ps_client(server)
    session = callback.opened()
    assert (session.messages_received, session.bytes_received, session.bytes_sent) == (0, 0, 0)
    for message in (b"12345", b"x", b"123"):
        client.send(message)
        client.expect(message * 2)
    client.eof()
    callback.closed(session)
    assert seen == [(1, 5, 10), (2, 6, 12), (3, 9, 18)]
    assert (session.messages_received, session.bytes_received, session.bytes_sent) == seen[-1]


def test_bytes_sent_counts_what_the_kernel_took_of_a_message_that_was_cut_off(
    ps_server: ServerFactory, callback: ActingCallback
) -> None:
    with stalled_peer(ps_server(callback, linger_timeout=FOREVER).address) as client:
        session = callback.opened()
        sender = sending(session)
        wait_until_stalled(session)
        session.close()
        assert isinstance(sender.get(), PsSendError)
        assert 0 < session.bytes_sent < len(STALLING)
        assert len(client.receive_until_eof()) == session.bytes_sent


def test_opened_at_is_the_time_of_the_connection_in_utc(
    ps_server: ServerFactory, ps_client: ClientFactory, callback: ActingCallback
) -> None:
    before = datetime.now(UTC)
    client = ps_client(ps_server(callback))
    session = callback.opened()
    after = datetime.now(UTC)
    opened_at = session.opened_at
    assert opened_at.tzinfo is UTC
    # The resolution of a float of seconds.
    assert before - timedelta(milliseconds=1) <= opened_at <= after
    client.eof()
    callback.closed(session)
    assert session.opened_at == opened_at


# Idle time


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)],
)
def test_a_wrong_idle_time_is_refused_and_changes_nothing(
    callback: ActingCallback, wrong: object, error: type[Exception]
) -> None:
    with connected_session(callback) as connected:
        with pytest.raises(error, match="idle_milliseconds"):
            connected.session.change_idle_milliseconds(wrong)  # type: ignore[arg-type]  # that is the point
        connected.peer.expect_nothing(0.05)
        assert connected.session.is_open


# Half-close by us


def test_after_send_eof_the_peer_sees_the_end_and_may_go_on_sending(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """Without `allow_half_open` too: that is about the peer's FIN."""

    def send_last(session: PsSession) -> None:
        session.send("last")
        session.send_eof()

    callback = ActingCallback(on_open=send_last)
    client = ps_client(ps_server(callback))
    client.expect("last")
    client.expect_eof()
    session = callback.opened()
    assert session.is_open
    client.send("still")
    callback.wait_for("on_message")
    client.send(" heard")
    eventually(lambda: callback.received() == b"still heard")
    with pytest.raises(PsSendError, match="eof"):
        session.send("more")
    with pytest.raises(PsSendError):
        session.send("")
    assert session.is_open
    session.send_eof()
    client.eof()
    assert callback.closed(session) is PsCloseReason.PEER_CLOSE


@pytest.mark.parametrize("thread", [False, True])
def test_send_eof_never_waits_and_takes_effect_after_the_sends_that_have_begun(
    ps_server: ServerFactory, callback: ActingCallback, thread: bool
) -> None:
    with stalled_peer(ps_server(callback).address) as client:
        session = callback.opened()
        senders = [sending(session), sending(session, b"behind it")]
        wait_until_stalled(session)
        if thread:
            NativeThread(session.send_eof).join()
        else:
            session.send_eof()
        assert isinstance(sending(session, b"too late").get(), PsSendError)
        assert session.is_open
        assert client.receive_until_eof() == STALLING + b"behind it"
        assert [each.get() for each in senders] == [None, None]
        assert session.is_open
        client.eof()
        assert callback.closed(session) is PsCloseReason.PEER_CLOSE


@pytest.mark.parametrize("end", [PsSession.close, PsSession.abort])
def test_a_close_after_send_eof_ends_the_session(
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    callback: ActingCallback,
    end: Callable[[PsSession], None],
) -> None:
    client = ps_client(ps_server(callback, linger_timeout=FOREVER))
    session = callback.opened()
    session.send_eof()
    client.expect_eof()
    end(session)
    session.send_eof()
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE


def test_send_eof_to_a_peer_that_has_reset_fails_the_session_like_a_send(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    go_on = gevent.event.Event()

    def send_eof(session: PsSession, message: bytes) -> None:
        go_on.wait()
        session.send_eof()

    callback = ActingCallback(on_message=send_eof)
    client = ps_client(ps_server(callback))
    client.send("x")
    callback.wait_for("on_message")
    client.reset()
    go_on.set()
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.FAILED
    assert isinstance(session.close_cause, OSError)


# Half-close by the peer


def test_without_allow_half_open_the_peers_fin_closes_and_on_eof_is_not_called(
    ps_server: ServerFactory, ps_client: ClientFactory, callback: ActingCallback
) -> None:
    ps_client(ps_server(callback)).eof()
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.PEER_CLOSE
    assert callback.names(session) == ["on_open", "on_close"]


def test_with_allow_half_open_the_peers_fin_calls_on_eof_and_sending_goes_on(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActingCallback(on_eof=lambda session: session.send(callback.received()[::-1]))
    client = ps_client(ps_server(callback, allow_half_open=True))
    client.send("all of it")
    client.eof()
    client.expect("ti fo lla")
    session = callback.opened()
    assert session.is_open
    gevent.spawn(session.send, "and from elsewhere").get()
    client.expect("and from elsewhere")
    assert callback.names(session) == ["on_open", "on_message", "on_eof"]
    session.close()
    client.expect_eof()
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE
    assert callback.names(session) == ["on_open", "on_message", "on_eof", "on_close"]


@pytest.mark.parametrize("when", ["before on_eof", "in on_eof", "after on_eof"])
def test_a_session_with_both_directions_shut_ends_with_peer_close(
    ps_server: ServerFactory, ps_client: ClientFactory, when: str
) -> None:
    callback = ActingCallback(
        on_eof=lambda session: session.send_eof() if when == "in on_eof" else None
    )
    client = ps_client(ps_server(callback, allow_half_open=True))
    session = callback.opened()
    if when == "before on_eof":
        session.send_eof()
        client.expect_eof()
    client.eof()
    callback.wait_for("on_eof")
    if when == "after on_eof":
        session.send_eof()
    client.receive_until_eof()
    assert callback.closed(session) is PsCloseReason.PEER_CLOSE
    assert callback.names(session) == ["on_open", "on_eof", "on_close"]


def test_both_directions_shut_while_a_send_waits_the_session_ends_when_it_is_done(
    ps_server: ServerFactory, callback: ActingCallback
) -> None:
    server = ps_server(callback, allow_half_open=True)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        sender = sending(session)
        wait_until_stalled(session)
        client.eof()
        callback.wait_for("on_eof")
        session.send_eof()
        gevent.sleep(0.02)
        assert session.is_open
        assert client.receive_until_eof() == STALLING
        assert sender.get() is None
        assert callback.closed(session) is PsCloseReason.PEER_CLOSE


def test_the_idle_clock_runs_on_after_on_eof(
    ps_server: ServerFactory, ps_client: ClientFactory, callback: ActingCallback
) -> None:
    client = ps_client(ps_server(callback, allow_half_open=True, idle_milliseconds=None))
    client.eof()
    session = callback.opened()
    callback.wait_for("on_eof")
    gevent.sleep(0.01)
    assert session.is_open
    session.change_idle_milliseconds(1)
    assert callback.closed(session) is PsCloseReason.TIMEOUT


@pytest.mark.parametrize("end", ["close", "abort", "shutdown", "send fails", "reset"])
def test_a_half_open_session_can_be_ended_in_every_way(
    ps_server: ServerFactory, callback: ActingCallback, end: str
) -> None:
    server = ps_server(callback, allow_half_open=True)
    with stalled_peer(server.address) as client:
        client.eof()
        session = callback.opened()
        callback.wait_for("on_eof")
        reason = PsCloseReason.SELF_CLOSE
        if end == "close":
            session.close()
        elif end == "abort":
            session.abort()
            client.expect_reset()
        elif end == "shutdown":
            server.shutdown()
            reason = PsCloseReason.SHUTDOWN
        elif end == "reset":
            client.reset()
            reason = PsCloseReason.FAILED
        else:
            assert isinstance(sending(session, timeout=0.05).get(), PsSendError)
            reason = PsCloseReason.FAILED
        assert callback.closed(session) is reason


def test_both_ends_ours_half_close_both_ways_and_nothing_is_lost(
    ps_server: ServerFactory,
) -> None:
    """The client sends all and then EOF; the server answers with all of it, once it is complete."""

    def answer(session: PsSession) -> None:
        session.send(serving.received(session), None)
        session.send_eof()

    serving = ActingCallback(on_eof=answer)
    server = ps_server(serving, allow_half_open=True)
    asking = RecordingCallback()
    with PsMultiClient(asking) as bundle:
        sessions = [bundle.connect(*server.address[:2]).session for _ in range(5)]
        for number, session in enumerate(sessions):
            session.send(b"%d" % number * 200_000, None)
            session.send_eof()
        closed = asking.wait_for("on_close", 5)
        assert {event.value for event in closed} == {PsCloseReason.PEER_CLOSE}
        for number, session in enumerate(sessions):
            assert asking.received(session) == b"%d" % number * 200_000
    assert {event.value for event in serving.wait_for("on_close", 5)} == {PsCloseReason.PEER_CLOSE}


# Why it closed, and when it received last


def test_the_close_reason_is_none_while_the_session_is_open(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    seen: list[object] = []

    class Looking(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            seen.append(session.close_reason)
            session.close()
            seen.append(session.close_reason)

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            seen.append(session.close_reason)
            super().on_close(session, close_reason)

    callback = Looking()
    ps_client(ps_server(callback)).send("x")
    callback.wait_for("on_close")
    assert seen == [PsCloseReason.NONE, PsCloseReason.SELF_CLOSE, PsCloseReason.SELF_CLOSE]


@pytest.mark.parametrize("ask", [PsSession.close, PsSession.abort])
def test_the_close_reason_changes_with_is_open_also_where_another_thread_asks(
    ask: Callable[[PsSession], None], ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    ps_client(ps_server(callback))
    (opened,) = callback.wait_for("on_open")
    session = opened.session
    assert session is not None
    NativeThread(ask, session).join()  # and the hub has had no turn since
    assert not session.is_open
    assert session.close_reason is PsCloseReason.SELF_CLOSE
    assert "SELF_CLOSE" in repr(session)
    session._request_close(PsCloseReason.TIMEOUT)  # whatever comes up then
    (closed,) = callback.wait_for("on_close")
    assert closed.value is session.close_reason is PsCloseReason.SELF_CLOSE


def test_a_session_that_never_began_has_a_close_reason_too(ps_server: ServerFactory) -> None:
    with PsMultiClient(RecordingCallback()) as bundle:
        session = bundle.connect(*ps_server(RecordingCallback()).address).session
        greenlet: Any = session.greenlet
        greenlet.kill()
        eventually(lambda: not session.is_open)
    assert session.close_reason is PsCloseReason.FAILED
    assert isinstance(session.close_cause, gevent.GreenletExit)


def now() -> datetime:
    return datetime.now(UTC)


def test_last_received_at_is_when_the_last_bytes_were_read(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    seen: list[datetime | None] = []

    class Slow(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            seen.append(session.last_received_at)
            super().on_open(session)

        def on_message(self, session: PsSession, message: bytes) -> None:
            seen.append(session.last_received_at)
            gevent.sleep(0.05)
            seen.append(session.last_received_at)
            super().on_message(session, message)

    callback = Slow()
    client = ps_client(ps_server(callback))
    (opened,) = callback.wait_for("on_open")
    session = opened.session
    assert session is not None
    for count in (1, 2):
        before = now()
        client.send("x")
        eventually(lambda count=count: session.messages_received == count)  # type: ignore[misc]  # its default
        after = now()
        callback.wait_for("on_message", count)
        last = session.last_received_at
        assert last is not None
        assert before <= last <= after
        assert last.tzinfo is UTC
        assert seen[-2:] == [last, last]  # however long the callback took
    assert seen[0] is None
    session.change_idle_milliseconds(None)  # which restarts another clock
    client.eof()
    callback.wait_for("on_close")
    assert session.last_received_at == last


def test_last_received_at_counts_what_is_received_by_asking_and_what_is_not_whole(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    seen: list[datetime] = []

    class Asking(PsHandler[bytes]):
        def handle(self, session: PsSession[bytes]) -> None:
            seen.extend(session.last_received_at or now() for _ in session)

    server = ps_server(Asking(), framing=Line())
    client = ps_client(server)
    session = eventually(lambda: server.sessions)[0]
    before = now()
    client.send("begun")
    begun = eventually(lambda: session.last_received_at)
    assert begun is not None
    assert before <= begun <= now()
    client.send(", ended\n")
    eventually(lambda: seen)
    assert begun < seen[0] == session.last_received_at


def test_last_received_at_is_not_old_where_the_hub_stood_still(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    # The idle timer is first to wake the session, which finds bytes.
    callback = RecordingCallback()
    client = ps_client(ps_server(callback, divide=100))
    (opened,) = callback.wait_for("on_open")
    session = opened.session
    assert session is not None
    for count in (1, 2):
        session.change_idle_milliseconds(50)
        before = now()
        client.send("x")
        monkey.get_original("time", "sleep")(0.1)
        callback.wait_for("on_message", count)
        session.change_idle_milliseconds(None)
        last = session.last_received_at
        assert last is not None
        assert last >= before
