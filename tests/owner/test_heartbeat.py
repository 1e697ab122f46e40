"""Heartbeats: what a session sends when it has sent nothing for a while."""

from __future__ import annotations

import contextlib
import logging
import ssl
from functools import partial
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest
from gevent import monkey

from acting import STALLING, wait_until_stalled
from helpers import NativeThread, ScriptedServer, close_reasons, stalled_peer
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsHeartbeat,
    PsMultiClient,
    PsServer,
    PsSession,
)
from psofa_gevent.framing import LengthPrefix, Line
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)


def counting(session: PsSession[Any]) -> str:
    session.set_value("beats", session.get_value("beats", 0) + 1)
    return f"beat {session.get_value('beats')};"


async def counting_async(session: PsSession[Any]) -> str:
    return counting(session)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (b"ping", b"pingping"),
        ("ping", b"pingping"),
        (bytearray(b"ping"), b"pingping"),
        (counting, b"beat 1;beat 2;"),
        (counting_async, b"beat 1;beat 2;"),
    ],
)
def test_a_quiet_server_sends_heartbeats(
    what: object, expected: bytes, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    client = ps_client(ps_server(PsCallback(), heartbeat=(50, what)))
    client.expect(expected)


@pytest.mark.parametrize("framing", [None, Line()])
def test_a_client_sends_heartbeats_and_a_multi_client_too(framing: Line | None) -> None:
    expected = "ping\nping\n" if framing else "pingping"
    with ScriptedServer() as scripted:
        settings: dict[str, Any] = {"heartbeat": (50, b"ping"), "framing": framing}
        with PsClient(PsCallback(), *scripted.address, **settings):
            scripted.accept().expect(expected)
        with PsMultiClient(PsCallback(), **settings) as bundle:
            for _ in range(3):
                bundle.connect(*scripted.address)
            for peer in [scripted.accept() for _ in range(3)]:
                peer.expect(expected)


def say_nop(_session: PsSession[Any]) -> bytes:
    return b"\xff\xf1"


async def say_nop_async(session: PsSession[Any]) -> bytes:
    return say_nop(session)


@pytest.mark.parametrize("message", [b"\xff\xf1", bytearray(b"\xff\xf1"), say_nop, say_nop_async])
@pytest.mark.parametrize("framing", [None, Line(), LengthPrefix()])
def test_a_raw_heartbeat_goes_past_the_framing(
    framing: Any, message: object, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    heartbeat = PsHeartbeat(50, message, raw=True)
    client = ps_client(ps_server(PsCallback(), framing=framing, heartbeat=heartbeat))
    client.expect(b"\xff\xf1\xff\xf1")


def test_a_raw_heartbeat_may_be_what_the_framing_refuses(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    with pytest.raises(ValueError, match="line"):
        PsServer(PsCallback(), framing=Line(), heartbeat=(50, b"\n"))
    callback = RecordingCallback(bytes)
    heartbeat = PsHeartbeat(50, "\n", raw=True)
    client = ps_client(ps_server(callback, framing=Line(), heartbeat=heartbeat))
    client.expect("\n")
    client.send("question\n")
    received = b""
    while not received.endswith(b"question\n\n"):  # whole, between others
        received += client.receive(1)
    assert received.lstrip(b"\n") == b"question\n\n"


def test_none_is_sent_while_the_session_sends_other_things(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """Two sessions of one server: one gets what it is sent, while the other gets heartbeats."""
    callback = RecordingCallback()
    server = ps_server(callback, heartbeat=(300, b"h"))
    busy, quiet = ps_client(server), ps_client(server)
    session = callback.wait_for("on_open", 2)[0].session
    assert session is not None

    def send_often() -> None:
        while True:
            session.send("x")
            gevent.sleep(0.02)

    sender = gevent.spawn(send_often)
    quiet.expect("hhhhh")
    sender.kill()
    received = busy.receive(session.bytes_sent)
    # A machine that stood still for so long may have let one through, and hardly three.
    assert received.count(b"h") < 3
    assert received.count(b"x") > 3


def test_receiving_does_not_count_as_sending(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    client = ps_client(ps_server(PsCallback(), heartbeat=(100, b"ping")))

    def send_often() -> None:
        while True:
            client.send("x")
            gevent.sleep(0.02)

    sender = gevent.spawn(send_often)
    client.expect("pingping")
    sender.kill()


def test_a_heartbeat_does_not_keep_an_idle_session_open(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback, heartbeat=(50, b"p"), idle_milliseconds=300))
    assert set(client.receive_until_eof()) <= {ord("p")}
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.TIMEOUT]


def test_a_function_may_have_nothing_to_say(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    asked: list[PsSession] = []

    def third_time(session: PsSession) -> bytes | None:
        asked.append(session)
        return b"now" if len(asked) == 3 else None

    client = ps_client(ps_server(PsCallback(), heartbeat=(30, third_time)))
    client.expect("now")
    assert len(asked) >= 3


def test_a_slow_function_delays_no_other_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def slow_for_the_first(session: PsSession) -> bytes:
        if session is sessions[0]:
            gevent.sleep(60)
        return b"beat"

    callback = RecordingCallback()
    sessions: list[PsSession | None] = []
    server = ps_server(callback, heartbeat=(50, slow_for_the_first))
    ps_client(server)
    sessions += [event.session for event in callback.wait_for("on_open")]
    ps_client(server).expect("beatbeat")


def test_a_function_is_not_called_again_before_it_has_returned() -> None:
    asked: list[PsSession] = []
    go_on = gevent.event.Event()

    def slow(session: PsSession) -> bytes:
        asked.append(session)
        go_on.wait()
        return b"beat"

    with ScriptedServer() as scripted:
        settings: dict[str, Any] = {"heartbeat": (10, slow)}
        with PsMultiClient(PsCallback(), **settings) as bundle:
            session = bundle.connect(*scripted.address).session
            peer = scripted.accept()
            for number in range(1, 10):  # each of the others is asked, while the first one is slow
                bundle.connect(*scripted.address)
                eventually(partial(lambda count: len(set(asked)) == count, number + 1))
            assert asked.count(session) == 1
            go_on.set()
            peer.expect("beatbeat")


@pytest.mark.logs_errors
def test_a_function_that_raises_closes_its_session_only(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_for_the_first(session: PsSession) -> bytes:
        if session is sessions[0]:
            raise KeyError("no such device")
        return b"beat"

    callback = RecordingCallback()
    sessions: list[PsSession | None] = []
    with caplog.at_level(logging.ERROR):
        server = ps_server(callback, heartbeat=(50, fail_for_the_first))
        client = ps_client(server)
        sessions += [event.session for event in callback.wait_for("on_open")]
        client.expect_eof()
        callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    assert len(caplog.records) == 1
    ps_client(server).expect("beatbeat")


def test_a_close_in_another_thread_in_the_moment_of_a_heartbeat_is_no_error(
    ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close_and_spawn(session: PsSession, *args: Any) -> Any:
        if session in closed:
            NativeThread(session.close).join()
        return spawn(session, *args)

    closed: list[PsSession | None] = []
    spawn = PsSession.spawn
    monkeypatch.setattr(PsSession, "spawn", close_and_spawn)
    callback = RecordingCallback()
    server = ps_server(callback, heartbeat=(50, counting))
    with ScriptedClient(server.address) as first, ScriptedClient(server.address) as second:
        closed.append(callback.wait_for("on_open", 2)[0].session)
        first.expect_eof()
        second.expect("beat 1;beat 2;")
        eventually(lambda: close_reasons(callback) == [PsCloseReason.SELF_CLOSE])


@pytest.mark.logs_errors
def test_a_framing_that_cannot_carry_it_closes_the_session(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    class Numbers(Line):
        def encode(self, message: Any) -> bytes:
            return b"%d\n" % message

    class Changing(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            session.set_framing(Numbers())

    callback = Changing()
    with caplog.at_level(logging.ERROR):
        ps_client(ps_server(callback, framing=Line(), heartbeat=(50, b"ping"))).expect_eof()
        callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]


def test_a_message_that_the_framing_cannot_carry_is_refused_by_the_constructor() -> None:
    with pytest.raises(ValueError, match="line"):
        PsServer(PsCallback(), framing=Line(), heartbeat=(50, b"two\nlines"))


def test_none_is_kept_for_a_peer_that_takes_nothing(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, heartbeat=(20, b"ping"), high_water=2 * len(STALLING))
    canary: list[int] = []
    with stalled_peer(server.address):
        (session,) = eventually(lambda: server.sessions)
        session.post(STALLING)
        wait_until_stalled(session)
        waiting = session.pending_bytes
        with ScriptedServer() as scripted:
            settings: dict[str, Any] = {"heartbeat": (20, lambda _session: canary.append(1))}
            with PsClient(PsCallback(), *scripted.address, **settings):
                eventually(lambda: len(canary) > 5)
        assert session.pending_bytes <= waiting


@pytest.mark.parametrize("use_function", [False, True])
def test_none_is_sent_after_send_eof(
    use_function: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    asked: list[PsSession] = []

    def ping(session: PsSession) -> bytes:
        asked.append(session)
        return b"ping"

    callback = RecordingCallback()
    server = ps_server(callback, heartbeat=(20, ping if use_function else b"ping"))
    client, other = ps_client(server), ps_client(server)
    client.expect("pingping")
    session = callback.wait_for("on_open", 2)[0].session
    assert session is not None
    session.send_eof()
    so_far = asked.count(session)
    assert client.receive_until_eof().replace(b"ping", b"") == b""
    other.receive(5 * len(b"ping"))
    other.receive(5 * len(b"ping"))
    assert session.is_open
    assert asked.count(session) == so_far


def test_none_is_sent_before_the_session_opens(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    settings: dict[str, Any] = {"heartbeat": (10, b"ping"), "handshake_timeout": 0.3}
    client = ps_client(ps_server(callback, ssl_context=context, **settings))
    client.expect_eof()
    assert not callback.named("on_open")


def test_none_is_sent_before_on_open_of_many_that_come_at_once(ps_server: ServerFactory) -> None:
    class Slow(PsCallback):
        def on_open(self, session: PsSession) -> None:
            block(0.01)
            session.send("first")

    block = monkey.get_original("time", "sleep")

    server = ps_server(Slow(), heartbeat=(1, b"h"))
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(gevent.socket.socket()) for _ in range(100)]
        for sock in sockets:  # with no turn of the hub in between
            sock.setblocking(False)
            sock.connect_ex(server.address)
        clients = [ScriptedClient.from_socket(sock, timeout=20) for sock in sockets]
        assert {client.receive(5) for client in clients} == {b"first"}


def test_sessions_that_have_ended_leave_nothing(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback(), heartbeat=(20, b"ping"))
    for _ in range(3):
        with ps_client(server) as client:
            client.expect("ping")
    eventually(lambda: server.get_session_count() == 0)
    manager = server._manager
    assert manager is not None
    assert manager._heartbeats is not None
    assert not manager._heartbeats._quiet
    ps_client(server).expect("pingping")  # it begins again


def test_a_thousand_quiet_sessions_all_get_theirs(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(PsCallback(), heartbeat=(100, b"b"))
    with PsMultiClient(callback) as bundle:
        sessions = [bundle.connect(*server.address).session for _ in range(1_000)]
        eventually(lambda: all(s.bytes_received >= 2 for s in sessions), timeout=30)
