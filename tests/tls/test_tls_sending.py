"""What is sent over TLS: whole, in order, and nothing behind what was refused."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Any

import gevent
import pytest

from helpers import TINY_BUFFER, NativeThread, close_reasons, takes
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsOverflow,
    PsRequester,
    PsRequestTimeoutError,
    PsSendError,
    PsSession,
    run_coroutine,
)
from psofa_gevent.framing import LengthPrefix
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually
from tls_peers import BIG, VERSIONS, MakePeer, client_context, server_context


def test_what_was_sent_before_a_close_arrives_and_the_end_is_a_clean_one(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    class Bye(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            session.send(bytes(BIG), timeout=20)
            session.close()

    client = peer(ps_server(Bye(), ssl_context=server_context(), linger_timeout=5.0))
    client.say(b"x")
    gevent.sleep(0.1)
    assert client.hear(BIG + 1) == bytes(BIG)  # and then close_notify


def test_posts_to_a_slow_peer_leave_in_order_whatever_is_dropped(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    server = ps_server(
        PsCallback(),
        ssl_context=server_context(),
        framing=LengthPrefix(),
        high_water=500_000,
        overflow=PsOverflow.DROP_OLDEST,
        linger_timeout=5.0,
    )
    client = peer(server)
    (session,) = eventually(lambda: server.sessions)
    for number in range(4_000):
        session.post(b"%07d|" % number * 500)
        if number % 100 == 0:
            gevent.sleep(0)
    assert session.messages_dropped > 0
    session.close()
    decoder = LengthPrefix().decoder()
    numbers = []
    for message in decoder.feed(client.hear(BIG * 4)):
        numbers.append(int(message[:7]))
        assert message == message[:8] * 500
    assert decoder.kept == 0
    assert numbers == sorted(numbers)
    assert numbers[-1] == 3_999
    assert len(numbers) == 4_000 - session.messages_dropped


def test_a_send_that_is_killed_half_way_fails_the_session(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, ssl_context=server_context(), linger_timeout=0.1)
    client = peer(server)
    (session,) = eventually(lambda: server.sessions)
    sender = gevent.spawn(session.send, bytes(BIG), timeout=None)
    eventually(lambda: session._send_queue is not None)
    sender.kill()
    session.post("must not follow")
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    with contextlib.suppress(ssl.SSLError):
        assert set(client.hear(BIG)) == {0}


@pytest.mark.parametrize("how", ["timeout", "request", "coroutine"])
def test_one_who_waits_behind_a_half_sent_message_has_not_begun(
    how: str, ps_server: ServerFactory, peer: MakePeer
) -> None:
    much = BIG // 8
    server = ps_server(PsCallback(), ssl_context=server_context(), send_timeout=None)
    # Both buffers together take half of what is encrypted at a time, so that is half sent. (Larger
    # ones may take just all of it, and then have no room for more.)
    client = peer(server, receive_buffer_size=TINY_BUFFER, timeout=30.0)
    (session,) = eventually(lambda: server.sessions)
    session._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
    in_front = gevent.spawn(session.send, bytes(much))
    eventually(lambda: session._half_sent)

    async def send() -> None:
        session.send(b"x")

    if how == "timeout":
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
            session.send(b"x")
    elif how == "request":
        with pytest.raises(PsRequestTimeoutError):
            PsRequester[bytes]().request(session, b"x", timeout=0.05)
    else:
        with pytest.raises(PsSendError, match="send_async"):
            run_coroutine(send())
    assert session.is_open
    assert client.hear(much) == bytes(much)
    in_front.get(timeout=5)
    session.send("and on")
    assert client.hear(6) == b"and on"


def test_senders_wait_their_turn_and_mix_nothing(ps_server: ServerFactory, peer: MakePeer) -> None:
    server = ps_server(PsCallback(), ssl_context=server_context(), framing=LengthPrefix())
    client = peer(server)
    (session,) = eventually(lambda: server.sessions)

    def send_some(letter: bytes) -> None:
        for _ in range(20):
            session.send(letter * 100_000, timeout=None)

    senders = [gevent.spawn(send_some, letter) for letter in (b"a", b"b")]
    threads = [NativeThread(send_some, letter) for letter in (b"c", b"d")]
    count = 80 * 100_004
    messages = list(LengthPrefix().decoder().feed(client.hear(count)))
    assert sorted(message[:1] for message in messages) == sorted([b"a", b"b", b"c", b"d"] * 20)
    assert all(len(set(message)) == 1 and len(message) == 100_000 for message in messages)
    gevent.joinall(senders, timeout=5, raise_error=True)
    for thread in threads:
        thread.wait()


def test_a_peer_that_takes_nothing_fails_a_send_after_its_timeout(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, ssl_context=server_context())
    peer(server)
    (session,) = eventually(lambda: server.sessions)
    with takes(0.3, most=2.0), pytest.raises(PsSendError, match="accepted no data"):
        session.send(bytes(BIG * 2), timeout=0.3)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]


@pytest.mark.parametrize("version", VERSIONS)
def test_each_direction_closes_by_itself(
    version: ssl.TLSVersion, ps_server: ServerFactory, peer: MakePeer
) -> None:
    class Reply(PsCallback):
        def on_eof(self, session: PsSession) -> None:
            session.send("you have closed")
            session.send_eof()

    callback = Reply()
    server = ps_server(callback, ssl_context=server_context(), allow_half_open=True)
    client = peer(server, client_context(version))
    client.close_notify()
    client.eof()
    assert client.hear(100) == b"you have closed"


@pytest.mark.parametrize("end", ["close", "send_eof"])
def test_what_has_come_and_is_not_read_yet_does_not_disturb_the_end(
    end: str, ps_server: ServerFactory, peer: MakePeer
) -> None:
    class Ending(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            super().on_message(session, message)
            if session.messages_received == 1:
                session.send(bytes(400_000))
                getattr(session, end)()

    callback = Ending()
    settings: dict[str, Any] = {"read_buffer_size": 1_000, "linger_timeout": 5.0}
    client = peer(ps_server(callback, ssl_context=server_context(), **settings))
    client.say(bytes(100_000))
    assert client.hear(400_001) == bytes(400_000)
    client.close_notify()
    callback.wait_for("on_close")
    if end == "send_eof":
        assert callback.received() == bytes(100_000)
        assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


def test_a_slow_peer_that_takes_something_all_the_time_is_not_failed(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    server = ps_server(PsCallback(), ssl_context=server_context(), linger_timeout=0.0)
    client = peer(server, receive_buffer_size=32_768)
    (session,) = eventually(lambda: server.sessions)
    sender = gevent.spawn(session.send, bytes(BIG), 1.5)
    for _ in range(50):
        client.hear(7_500)
        gevent.sleep(0.05)
        assert session.is_open
    sender.kill()


@pytest.mark.logs_errors
@pytest.mark.parametrize("ssl_context", [None, server_context()], ids=["plain", "tls"])
def test_nothing_follows_a_send_that_was_refused_half_way(
    ssl_context: ssl.SSLContext | None, ps_server: ServerFactory, peer: MakePeer
) -> None:
    refused: list[str] = []

    class Careless(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            while session.is_open:
                await asyncio.sleep(0.01)
            for data in (b"A" * BIG * 2, b"B" * 1_000):
                try:
                    await session.send_async(data, 2.0) if refused else session.send(data)
                except PsSendError as error:
                    refused.append(str(error))

    server = ps_server(Careless(), ssl_context=ssl_context)
    client: Any = peer(server) if ssl_context else ScriptedClient(server.address)
    (client.say if ssl_context else client.send)(b"x")
    (session,) = eventually(lambda: server.sessions)
    eventually(lambda: session.messages_received)
    stopping = gevent.spawn(server.shutdown)
    eventually(lambda: len(refused) == 2)
    received = b""
    with contextlib.suppress(OSError):
        while data := client.hear(65_536) if ssl_context else client.socket.recv(65_536):
            received += data
    assert set(received) <= {ord("A")}
    stopping.get(timeout=5)
    client.close()
