"""TLS: everything holds as on plain connections, and what goes wrong is told apart."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes.util
import datetime
import gc
import logging
import socket
import ssl
import subprocess
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.ssl
import gevent.subprocess
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from acting import sending
from helpers import TINY_BUFFER, NativeThread, close_reasons, python_process, takes
from marks import needs_ipv6, sync_and_async
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsMultiClientError,
    PsOverflow,
    PsRequester,
    PsRequestTimeoutError,
    PsSendError,
    PsServer,
    PsServerError,
    PsSession,
    PsSocketAddressFamily,
    PsTlsError,
    PsTlsInfo,
    await_greenlet,
    run_coroutine,
)
from psofa_gevent.framing import LengthPrefix, Line
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually
from psofa_gevent.tls import socket as tls_socket
from psofa_gevent.tls.client_hello import server_name
from psofa_gevent.tls.socket import TlsSocket

trustme = pytest.importorskip("trustme")

BIG = 8 * 1024 * 1024
"""Bytes: more than the buffers of a connection take."""
CA = trustme.CA()
CERTIFICATE = CA.issue_cert("localhost", "127.0.0.1")
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def server_context(certificate: Any = CERTIFICATE) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def client_context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    CA.configure_trust(context)
    # Early 3.11s set it, and let a stream that was cut off pass for one that ended.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


class TlsPeer(ScriptedClient):
    """A scripted client over TLS, by the standard library, whose wire can be cut."""

    def __init__(self, address: tuple[Any, ...], context: ssl.SSLContext, **kwargs: Any) -> None:
        super().__init__(address, **kwargs)
        self.go_over(context)

    def go_over(self, context: ssl.SSLContext) -> None:
        """Shake hands."""
        self.plain = self.socket
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self._until_done(self.tls.do_handshake)

    def _until_done(self, step: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                result = step(*args)
            except ssl.SSLWantReadError:
                self._flush()
                data = self.plain.recv(65536)
                if data:
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if self.outgoing.pending:
            self.plain.sendall(self.outgoing.read())

    def say(self, data: bytes) -> None:
        """Send as many records as it takes."""
        view = memoryview(data)
        while view:
            view = view[self._until_done(self.tls.write, view) :]

    def hear(self, count: int) -> bytes:
        """Read so many bytes, or less: up to the clean end."""
        received = b""
        while len(received) < count:
            try:
                data = self._until_done(self.tls.read, count - len(received))
            except ssl.SSLZeroReturnError:  # it has said close_notify itself
                break
            if not data:
                break
            received += data
        return received

    def close_notify(self) -> None:
        """Say that this is the end."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self._flush()


class Echo(RecordingCallback):
    def on_message(self, session: PsSession[Any], message: Any) -> None:
        super().on_message(session, message)
        session.send(message)


@pytest.fixture
def peer() -> Iterator[Callable[..., TlsPeer]]:
    """Makes TLS peers of a server, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(
            server: PsServer[Any], context: ssl.SSLContext | None = None, **kwargs: Any
        ) -> TlsPeer:
            made = TlsPeer(server.address, context or client_context(), **kwargs)
            return stack.enter_context(made)

        yield make


MakePeer = Callable[..., TlsPeer]


# As on a plain connection


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_echoes_over_tls(
    version: ssl.TLSVersion, ps_server: ServerFactory, peer: MakePeer
) -> None:
    callback = Echo()
    client = peer(ps_server(callback, ssl_context=server_context()), client_context(version))
    for size in (1, 5_000, 16_384, 16_385, 300_000):
        data = bytes(range(256)) * (size // 256 + 1)
        client.say(data)
        assert client.hear(len(data)) == data
    client.close_notify()
    client.close()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("framing", [None, LengthPrefix(max_size=2**30)], ids=["raw", "framed"])
def test_our_clients_and_servers_talk(
    version: ssl.TLSVersion, framing: LengthPrefix | None, ps_server: ServerFactory
) -> None:
    server = ps_server(Echo(), ssl_context=server_context(), framing=framing)
    host, port = server.address[:2]
    callback = RecordingCallback()
    context = client_context(version)
    with PsClient(callback, host, port, ssl_context=context, framing=framing) as client:
        assert client.session is not None
        client.session.send(bytes(BIG))
        eventually(lambda: len(callback.received()) == BIG, 20)
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]
    callback = RecordingCallback()
    with PsMultiClient(callback, ssl_context=context, framing=framing) as bundle:
        for _ in range(3):
            bundle.connect("localhost", port).session.send("x")
        callback.wait_for("on_message", 3)


def test_async_callbacks_handlers_and_threads_work_over_tls(ps_server: ServerFactory) -> None:
    class Async(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            await session.send_async(message * 1_000)

    server = ps_server(Async(), ssl_context=server_context(), framing=Line())
    came: list[int] = []

    def talk(session: PsSession[bytes]) -> None:
        NativeThread(session.send, b"y" * 1_000).wait()
        came.append(len(session.receive(timeout=5)))
        session.post(b"z" * 1_000)
        came.append(len(session.receive(timeout=5)))

    with PsMultiClient(PsHandler(talk), ssl_context=client_context(), framing=Line()) as bundle:
        bundle.connect(*server.address[:2])
        eventually(lambda: came == [1_000_000, 1_000_000], 10)


@pytest.mark.parametrize("size", [1, 100, 16_384])
def test_a_record_larger_than_read_buffer_size_is_handed_over_in_pieces(
    size: int, ps_server: ServerFactory, peer: MakePeer
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, ssl_context=server_context(), read_buffer_size=size)
    client = peer(server)
    data = bytes(range(256)) * (8 if size == 1 else 256)
    client.say(data)
    eventually(lambda: callback.received() == data, 10)
    assert max(len(event.value) for event in callback.named("on_message")) <= size  # type: ignore[arg-type]
    client.say(b"and on")
    eventually(lambda: callback.received() == data + b"and on")


def test_a_callback_that_waits_loses_none_of_what_is_decrypted(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    class Slow(Echo):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            gevent.sleep(0.001)
            super().on_message(session, message)

    client = peer(ps_server(Slow(), ssl_context=server_context(), read_buffer_size=500))
    client.say(bytes(50_000))
    assert client.hear(50_000) == bytes(50_000)


def test_1000_sessions_talk_over_tls(ps_server: ServerFactory) -> None:
    server = ps_server(Echo(), ssl_context=server_context())
    callback = RecordingCallback()
    with PsMultiClient(callback, ssl_context=client_context()) as bundle:
        for _ in range(1_000):
            bundle.connect(*server.address[:2], timeout=30)
        bundle.broadcast("hello")
        callback.wait_for("on_message", 1_000, timeout=30)
    assert {event.value for event in callback.named("on_message")} == {b"hello"}


# Sending


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


# The end of the stream


@pytest.mark.hub_errors
def test_a_message_that_broke_off_is_no_clean_end(ps_server: ServerFactory, peer: MakePeer) -> None:
    server = ps_server(PsCallback(), ssl_context=server_context(), linger_timeout=2.0)
    client = peer(server)
    (session,) = eventually(lambda: server.sessions)
    sender = gevent.spawn(session.send, bytes(BIG * 2), None)
    eventually(lambda: session._send_queue is not None)
    reading = gevent.spawn(read_all, client)
    session.close()
    with pytest.raises(PsSendError):
        sender.get(timeout=5)
    error = reading.get(timeout=5)
    assert isinstance(error, ssl.SSLError)  # in early 3.11s no SSLEOFError
    assert "eof" in str(error).lower()


def read_all(client: TlsPeer) -> BaseException | None:
    try:
        while client.hear(65_536):
            pass
    except OSError as error:
        return error
    return None


def test_what_came_before_a_bad_record_is_handed_over(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    callback = RecordingCallback()
    client = peer(ps_server(callback, ssl_context=server_context()))
    client.tls.write(b"hello")
    client.plain.sendall(client.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
    (closed,) = callback.wait_for("on_close")
    assert callback.received() == b"hello"
    assert closed.value is PsCloseReason.FAILED


def test_what_tls_says_is_known_also_when_a_bad_record_follows(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    seen: list[PsTlsInfo | None] = []

    class Asking(RecordingCallback):
        def on_message(self, session: PsSession[Any], message: Any) -> None:
            super().on_message(session, message)
            seen.append(session.tls)

    server_side = server_context()
    server_side.verify_mode = ssl.CERT_REQUIRED
    CA.configure_trust(server_side)
    client_side = client_context()
    CA.issue_cert("device@example.org").configure_cert(client_side)
    callback = Asking()
    client = peer(ps_server(callback, ssl_context=server_side), client_side)
    (opened,) = callback.wait_for("on_open")
    session = opened.session
    assert session is not None
    before = session.tls
    assert before is not None
    assert before.peer_certificate is not None
    client.tls.write(b"hello")
    client.plain.sendall(client.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
    callback.wait_for("on_close")
    assert isinstance(session.close_cause, ssl.SSLError)
    assert [*seen, session.tls] == [before, before]


def test_bytes_of_a_record_that_is_not_whole_are_no_idleness(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    callback = RecordingCallback()
    client = peer(ps_server(callback, ssl_context=server_context(), idle_milliseconds=1_100))
    client.tls.write(bytes(16_000))
    record = client.outgoing.read()
    for at in range(0, len(record), 2_000):
        client.plain.sendall(record[at : at + 2_000])
        gevent.sleep(0.3)
    eventually(lambda: callback.received() == bytes(16_000))
    assert not callback.named("on_close")


def test_the_idle_time_is_no_longer_than_on_plain_connections(
    ps_server: ServerFactory, peer: MakePeer
) -> None:
    callback = RecordingCallback()
    client = peer(ps_server(callback, ssl_context=server_context(), idle_milliseconds=3_000))
    with takes(3.0, most=3.9):
        client.say(b"hello")
        callback.wait_for("on_message")
        (closed,) = callback.wait_for("on_close", timeout=10)
    assert closed.value is PsCloseReason.TIMEOUT


KEY_UPDATES = """
    import ctypes, ctypes.util, socket, sys

    class Ssl:
        def __getattr__(self, name):
            function = getattr(library, name)
            if name.endswith(("_new", "_method")):
                function.restype = ctypes.c_void_p
            return lambda *args: function(*(ctypes.c_void_p(arg) for arg in args))

    library = ctypes.CDLL(ctypes.util.find_library("ssl"))
    openssl = Ssl()
    data = ctypes.create_string_buffer(16_000)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(sys.argv[1])))
        ssl = openssl.SSL_new(openssl.SSL_CTX_new(openssl.TLS_client_method()))
        openssl.SSL_set_fd(ssl, sock.fileno())
        assert openssl.SSL_connect(ssl) == 1
        while openssl.SSL_key_update(ssl, 1) == 1 and openssl.SSL_do_handshake(ssl) == 1:
            if sys.argv[2] == "between data":
                openssl.SSL_write(ssl, ctypes.addressof(data), 16_000)
"""


@pytest.mark.skipif(ctypes.util.find_library("ssl") is None, reason="needs libssl")
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("at once", "the peer sent too many TLS key updates"),
        ("between data", "the peer sends TLS key updates but does not read the replies"),
    ],
)
def test_a_peer_that_asks_for_key_updates_and_takes_none_fails_and_holds_up_nobody(
    how: str,
    error: str,
    ps_server: ServerFactory,
    peer: MakePeer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tls_socket, "MOST_UNTAKEN", 4_096)

    class Callback(RecordingCallback):
        def on_open(self, session: PsSession[Any]) -> None:
            super().on_open(session)
            session._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    callback, echo = Callback(), Echo()
    server = ps_server(callback, ssl_context=server_context(), linger_timeout=0.0)
    other = peer(ps_server(echo, ssl_context=server_context()))
    source = textwrap.dedent(KEY_UPDATES)
    with python_process("-c", source, str(server.address[1]), how) as process:
        callback.wait_for("on_open", timeout=10)
        while not callback.named("on_close"):
            other.say(b"hello")
            assert other.hear(5) == b"hello"
        assert process.wait() == 0
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert str(closed.session.close_cause) == error


@contextlib.contextmanager
def tls_pair() -> Iterator[tuple[TlsSocket, ssl.SSLObject, ssl.MemoryBIO]]:
    """Our end of a connection; the other, by the standard library; and what that has to send."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = TlsSocket(ours, server_context(), server_side=True)
        client = client_context().wrap_bio(
            incoming := ssl.MemoryBIO(), outgoing := ssl.MemoryBIO(), server_hostname="localhost"
        )
        ours.setblocking(False)
        theirs.setblocking(False)
        done = False
        while not done:
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            theirs.sendall(outgoing.read())
            with contextlib.suppress(BlockingIOError):
                connection.shake_hands()
                done = True
            with contextlib.suppress(BlockingIOError):
                incoming.write(theirs.recv(65536))
        yield connection, client, outgoing


class Pieces:
    """A socket that has these bytes, and gives so many of them at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self.left = [data[at : at + size] for at in range(0, len(data), size)]
        self.reads = 0

    def recv(self, _size: int) -> bytes:
        self.reads += 1
        if not self.left:
            raise BlockingIOError
        return self.left.pop(0)


def test_a_look_at_a_socket_that_has_no_whole_record_reads_it_once() -> None:
    with tls_pair() as (connection, client, outgoing):
        client.write(bytes(16_000))
        connection._sock = pieces = Pieces(outgoing.read(), 1)  # type: ignore[assignment]
        with pytest.raises(BlockingIOError):
            connection.recv(65536)
        assert pieces.reads == 1
        assert connection.has_progress


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_the_end_of_a_stream_stays_its_end(size: int) -> None:
    with tls_pair() as (connection, client, outgoing):
        client.write(b"all of it")
        with contextlib.suppress(ssl.SSLWantReadError):
            client.unwrap()
        connection._sock = Pieces(outgoing.read(), size)  # type: ignore[assignment]
        received: list[bytes] = []
        while not received or received[-1]:
            with contextlib.suppress(BlockingIOError):
                received.append(connection.recv(4))
        assert b"".join(received) == b"all of it"
        assert [connection.recv(4) for _ in range(2)] == [b"", b""]


def test_a_stream_that_is_cut_off_is_no_clean_end(
    ps_server: ServerFactory, peer: MakePeer, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RecordingCallback()
    client = peer(ps_server(callback, ssl_context=server_context()))
    client.say(b"all of")
    client.close()  # without close_notify
    (closed,) = callback.wait_for("on_close")
    assert callback.received() == b"all of"
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, ssl.SSLEOFError)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_failed_session_does_not_end_cleanly(ps_server: ServerFactory, peer: MakePeer) -> None:
    server = ps_server(PsCallback(), ssl_context=server_context(), linger_timeout=0.0)
    client = peer(server)
    (session,) = eventually(lambda: server.sessions)
    with pytest.raises(PsSendError):
        session.send(bytes(BIG * 2), timeout=0.1)
    with pytest.raises(OSError):  # noqa: PT011 - cut off, or reset
        client.hear(BIG * 2)


def test_abort_resets(ps_server: ServerFactory, peer: MakePeer) -> None:
    server = ps_server(PsCallback(), ssl_context=server_context())
    client = peer(server)
    (session,) = eventually(lambda: server.sessions)
    session.abort()
    with pytest.raises(ConnectionResetError):
        client.hear(1)


# A handshake that fails


def one_warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = eventually(
        lambda: [each for each in caplog.records if each.levelno >= logging.WARNING]
    )
    assert record.exc_info is None
    return record.getMessage()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03", b"x" * 70_000])
def test_plain_bytes_fail_the_handshake(
    data: bytes, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, ssl_context=server_context())
    with ScriptedClient(server.address) as client:
        client.send(data)
        client.eof()
        (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert not callback.named("on_open")
    assert "the TLS handshake failed" in one_warning(caplog)


def test_a_silent_client_holds_up_nobody_and_is_closed_in_time(
    ps_server: ServerFactory, peer: MakePeer, caplog: pytest.LogCaptureFixture
) -> None:
    callback = Echo()
    server = ps_server(callback, ssl_context=server_context(), handshake_timeout=1.5)
    with ScriptedClient(server.address) as silent:
        client = peer(server)
        client.say(b"x")
        assert client.hear(1) == b"x"
        assert len(server.sessions) == 1  # one that has not opened is none yet
        server.broadcast("hello")
        assert client.hear(5) == b"hello"
        silent.expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, TimeoutError)
    assert "not complete in time" in one_warning(caplog)


@pytest.mark.parametrize("end", ["FIN", "RST"])
def test_a_client_that_goes_in_the_handshake(
    end: str, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, ssl_context=server_context())
    with ScriptedClient(server.address) as client:
        client.send(b"\x16")
        eventually(lambda: server.get_session_count() == 1)
        client.eof() if end == "FIN" else client.reset()
        (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    one_warning(caplog)


@pytest.mark.parametrize("end", ["FIN", "RST", "RST at once"])
def test_a_client_that_only_looks_whether_somebody_is_there_is_no_failure(
    end: str, ps_server: ServerFactory, peer: MakePeer, caplog: pytest.LogCaptureFixture
) -> None:
    callback = Echo()
    server = ps_server(callback, ssl_context=server_context())
    with ScriptedClient(server.address) as client:
        if end != "RST at once":
            eventually(lambda: server.get_session_count() == 1)
        client.eof() if end == "FIN" else client.reset()
        if end == "FIN":
            client.expect_eof()
    client = peer(server)
    client.say(b"x")
    assert client.hear(1) == b"x"
    assert len(callback.named("on_open")) == 1
    eventually(lambda: server.get_session_count() == 1)
    assert not callback.named("on_close")
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_shutdown_ends_handshakes_at_once_and_no_callback_hears_of_them(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, ssl_context=server_context(), handshake_timeout=None)
    with ScriptedClient(server.address), ScriptedClient(server.address) as other:
        other.send(b"\x16")
        eventually(lambda: server.get_session_count() == 2)
        with takes(most=0.5):
            server.shutdown()
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]


def test_the_client_verifies_the_server(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback(), ssl_context=server_context())
    host, port = server.address[:2]
    with pytest.raises(PsClientError, match=r"TLS: .*certificate verify failed"):
        PsClient(PsCallback(), host, port, ssl_context=True).connect()
    trusting = client_context()
    with pytest.raises(PsClientError, match="Hostname mismatch"):
        PsClient(
            PsCallback(), host, port, ssl_context=trusting, server_hostname="example.org"
        ).connect()
    with PsMultiClient(PsCallback(), ssl_context=client_context()) as bundle:
        bundle.connect(host, port, server_hostname="localhost")
        with pytest.raises(PsMultiClientError, match="Hostname mismatch"):
            bundle.connect(host, port, server_hostname="example.org")


@needs_ipv6
def test_an_address_with_a_zone_is_verified_without_it(ps_server: ServerFactory) -> None:
    """A certificate is for an address, whatever its interface is called here (RFC 4007)."""
    loopback = next(number for number, name in socket.if_nameindex() if name.startswith("lo"))
    host = f"::1%{loopback}"
    family = PsSocketAddressFamily.IPV6
    callback = RecordingCallback()
    for certificate, verifies in ((CA.issue_cert("::1"), True), (CERTIFICATE, False)):
        context = server_context(certificate)
        server = ps_server(callback, ssl_context=context, socket_address_family=family)
        client = PsClient(
            PsCallback(),
            host,
            server.address[1],
            socket_address_family=family,
            ssl_context=client_context(),
        )
        if verifies:
            with client:
                (opened,) = callback.wait_for("on_open")
                assert opened.session is not None
                assert opened.session.tls is not None
                assert opened.session.tls.server_name is None
        else:
            with pytest.raises(PsClientError, match="IP address mismatch"):
                client.connect()


def test_a_client_tells_when_the_server_speaks_no_tls(ps_server: ServerFactory) -> None:
    talking = ps_server(PsHandler(lambda session: session.send("220 ready\r\n" * 100)))
    with pytest.raises(PsClientError, match=r"cannot connect to .*: TLS:"):
        PsClient(PsCallback(), *talking.address[:2], ssl_context=client_context()).connect()
    silent = ps_server(PsCallback())
    client = PsClient(PsCallback(), *silent.address[:2], ssl_context=client_context())
    with takes(0.3, most=1.0), pytest.raises(PsClientError, match="timed out"):
        client.connect(timeout=0.3)
    eventually(lambda: not silent.get_session_count())


# What TLS says, and what it is told


def test_certificates_and_protocols_are_on_the_session(
    ps_server: ServerFactory,
) -> None:
    server_side, client_side = server_context(), client_context()
    server_side.verify_mode = ssl.CERT_REQUIRED
    CA.configure_trust(server_side)
    CA.issue_cert("device@example.org").configure_cert(client_side)
    for context in (server_side, client_side):
        context.set_alpn_protocols(["psofa/1"])
    server = ps_server(RecordingCallback(), ssl_context=server_side)
    with PsClient(PsCallback(), "localhost", server.address[1], ssl_context=client_side) as client:
        (session,) = eventually(lambda: server.sessions)
        seen = session.tls
        assert seen is not None
        assert seen.version == "TLSv1.3"
        assert seen.alpn_protocol == "psofa/1"
        assert seen.cipher is not None
        assert ("email", "device@example.org") in seen.peer["subjectAltName"]
        assert seen.peer_certificate is not None
        assert client.session is not None
        assert client.session.tls is not None
        assert client.session.tls.peer["subjectAltName"]
    eventually(lambda: not server.get_session_count())
    assert session.tls is not None  # also after the close


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["cut off", "a bad record", "reset", "aborted", "closed"])
def test_what_tls_says_is_known_however_the_session_ends(
    way: str, version: ssl.TLSVersion, ps_server: ServerFactory, peer: MakePeer
) -> None:
    """OpenSSL itself forgets it after an error: it takes the handshake for one to be done."""
    callback = Echo()
    server = ps_server(callback, ssl_context=server_context())
    client = peer(server, client_context(version))
    client.say(b"hello")
    assert client.hear(5) == b"hello"
    (session,) = server.sessions
    seen = session.tls
    assert seen is not None
    assert (seen.version, seen.server_name) == (client.tls.version(), "localhost")
    if way == "cut off":
        client.close()  # without close_notify
    elif way == "a bad record":
        client.plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
    elif way == "reset":
        client.reset()
    elif way == "aborted":
        session.abort()
    else:
        session.close()
    callback.wait_for("on_close")
    assert session.tls == seen


def test_a_certificate_that_python_cannot_read_disturbs_nobody(
    ps_server: ServerFactory, tmp_path: Path
) -> None:
    """Its second name is no UTF-8, at which `getpeercert` raises; OpenSSL has verified it."""
    names = b"\x30\x0f\x82\x09localhost\x82\x02\xff\xfe"
    oid = x509.oid.ExtensionOID.SUBJECT_ALTERNATIVE_NAME
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "odd")])
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.UnrecognizedExtension(oid, names), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = tmp_path / "odd.pem"
    path.write_bytes(certificate + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server = ps_server(PsCallback(), ssl_context=context)
    trusting = ssl.create_default_context(cadata=certificate.decode())
    with PsClient(PsCallback(), "localhost", server.address[1], ssl_context=trusting) as client:
        assert client.session is not None
        assert client.session.tls is not None
        assert client.session.tls.peer_certificate == ssl.PEM_cert_to_DER_cert(certificate.decode())
        assert client.session.tls.peer == {}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [ssl.SSLContext, gevent.ssl.SSLContext], ids=["ssl", "gevent"])
def test_the_server_sees_which_name_the_client_asked_for(
    kind: type[ssl.SSLContext], version: ssl.TLSVersion, ps_server: ServerFactory
) -> None:
    asked: list[str | None] = []
    context = kind(ssl.PROTOCOL_TLS_SERVER)
    CERTIFICATE.configure_cert(context)
    context.sni_callback = lambda _ssl_object, name, _context: asked.append(name)
    server = ps_server(PsCallback(), ssl_context=context)
    port = server.address[1]
    with PsMultiClient(PsCallback(), ssl_context=client_context(version)) as bundle:
        for host, name in (("localhost", "localhost"), ("127.0.0.1", None)):
            ours = bundle.connect(host, port).session
            (session,) = eventually(lambda: server.sessions)
            for each in (ours, session):
                assert each.tls is not None
                assert each.tls.server_name == name
            ours.close()
            eventually(lambda: not server.get_session_count())
    assert asked == ["localhost", None]  # the application's own callback is called as ever


def client_hello(name: str) -> bytes:
    outgoing = ssl.MemoryBIO()
    client = client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("size", [1, 7, 100, 16_384])
def test_the_name_is_found_however_the_client_cuts_its_first_message(size: int) -> None:
    message = client_hello("example.org")[5:]
    records = [message[at : at + size] for at in range(0, len(message), size)]
    hello = b"".join(b"\x16\3\1" + len(each).to_bytes(2) + each for each in records)
    assert server_name(hello + b"\x14\3\3\0\1\1") == "example.org"


def test_bytes_that_ask_for_no_name_are_no_error() -> None:
    hello = client_hello("example.org")
    for size in range(len(hello)):
        assert server_name(hello[:size]) is None
    for at in range(len(hello)):
        for value in (0, 1, 127, 128, 255):
            server_name(hello[:at] + bytes((value,)) + hello[at + 1 :])
    assert server_name(client_hello("127.0.0.1")) is None


def test_a_plain_session_has_no_tls(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback())
    with ScriptedClient(server.address):
        (session,) = eventually(lambda: server.sessions)
        assert session.tls is None


def test_a_client_without_the_certificate_that_is_asked_for_is_refused(
    ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    context = server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    callback = RecordingCallback()
    server = ps_server(callback, ssl_context=context)
    address = server.address[:2]
    tls12 = client_context(ssl.TLSVersion.TLSv1_2)
    with pytest.raises(PsClientError):
        PsClient(PsCallback(), *address, ssl_context=tls12).connect()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert "peer did not return a certificate" in one_warning(caplog)


def test_new_certificates_serve_new_connections(ps_server: ServerFactory, peer: MakePeer) -> None:
    server = ps_server(Echo(), ssl_context=server_context())
    old = peer(server)
    other = CA.issue_cert("localhost")
    server.reload_tls(server_context(other))
    new = peer(server)
    for client, certificate in ((old, CERTIFICATE), (new, other)):
        client.say(b"x")
        assert client.hear(1) == b"x"
        shown = client.tls.getpeercert(binary_form=True)
        assert shown is not None
        pem = ssl.DER_cert_to_PEM_cert(shown)
        assert pem.encode().split() == certificate.cert_chain_pems[0].bytes().split()


# STARTTLS


class StartTls(RecordingCallback):
    """A server that goes over to TLS when asked."""

    timeout: float | None = 2.0

    def __init__(self, *, use_async_callback: bool = False) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self.errors: list[BaseException] = []

    def on_message(self, session: PsSession[Any], message: bytes) -> None:
        super().on_message(session, message)
        if not message.startswith(b"STARTTLS"):
            session.send(message)
            return
        session.send("go ahead")
        with self.noting_errors():
            session.start_tls(server_context(), server_side=True, timeout=self.timeout)

    async def on_message_async(self, session: PsSession[Any], message: bytes) -> None:
        await super().on_message_async(session, message)
        if not message.startswith(b"STARTTLS"):
            await session.send_async(message)
            return
        await session.send_async("go ahead")
        with self.noting_errors():
            await session.start_tls_async(server_context(), server_side=True, timeout=self.timeout)

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.errors.append(error)
            raise


@contextlib.contextmanager
def asking_for_tls(server: PsServer[Any]) -> Iterator[TlsPeer]:
    """A client that has been told to go ahead, and speaks no TLS yet."""
    client = TlsPeer.__new__(TlsPeer)
    ScriptedClient.__init__(client, server.address)
    with client:
        client.send("STARTTLS\n")
        client.expect("go ahead\n")
        yield client


@sync_and_async
@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_goes_over_to_tls(
    version: ssl.TLSVersion, use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    server = ps_server(callback, framing=Line())
    came: list[bytes] = []

    def talk(session: PsSession[bytes]) -> None:
        session.send("plain")
        came.append(session.receive(timeout=5))
        session.send("STARTTLS")
        came.append(session.receive(timeout=5))
        context = client_context(version)
        session.start_tls(context, server_side=False, server_hostname="localhost")
        assert session.tls is not None
        for _ in range(3):
            session.send("secret")
            came.append(session.receive(timeout=5))

    with PsMultiClient(PsHandler(talk), framing=Line()) as bundle:
        bundle.connect(*server.address[:2])
        eventually(lambda: len(came) == 5)
    assert came == [b"plain", b"go ahead", b"secret", b"secret", b"secret"]
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


@pytest.mark.logs_errors
@sync_and_async
@pytest.mark.parametrize("framing", [Line(), None], ids=["lines", "raw"])
def test_plaintext_before_the_handshake_is_refused(
    framing: Line | None, use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    server = ps_server(callback, framing=framing)
    with ScriptedClient(server.address) as client:
        client.send(b"STARTTLS\nINJECTED\n" if framing else b"STARTTLS")
        client.receive(len("go ahead"))
        if framing is None:
            client.send(b"INJECTED\n")
        (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, PsTlsError)
    why = "bytes came before" if framing else "WRONG_VERSION_NUMBER"
    assert why in str(closed.session.close_cause)
    assert callback.received() == b"STARTTLS"


@sync_and_async
def test_what_was_sent_before_leaves_unencrypted_before_the_handshake(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    context = client_context()

    class Much(StartTls):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            session.post(bytes(BIG), raw=True)
            session.post("go ahead")
            # As the client, which speaks first.
            session.start_tls(context, server_side=False, server_hostname="localhost")

        async def on_message_async(self, session: PsSession[Any], message: bytes) -> None:
            session.post(bytes(BIG), raw=True)
            session.post("go ahead")
            await session.start_tls_async(context, server_side=False, server_hostname="localhost")

    callback = Much(use_async_callback=use_async_callback)
    server = ps_server(callback, framing=Line(), high_water=2 * BIG)
    with ScriptedClient(server.address) as client:
        client.send("x\n")
        assert client.receive(BIG) == bytes(BIG)
        client.expect(b"go ahead\n\x16\x03")


@sync_and_async
def test_what_others_send_in_the_handshake_leaves_encrypted_after_it(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    server = ps_server(StartTls(use_async_callback=use_async_callback), framing=Line())
    with asking_for_tls(server) as client:
        (session,) = server.sessions
        server.broadcast("posted")
        sender = gevent.spawn(session.send, "sent")
        client.expect_nothing()
        client.go_over(client_context())
        assert client.hear(12) == b"posted\nsent\n"
        sender.get(timeout=5)


@sync_and_async
def test_who_waits_for_a_handshake_is_not_timed_out(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    server = ps_server(StartTls(use_async_callback=use_async_callback), framing=Line())
    with asking_for_tls(server) as client:
        (session,) = server.sessions
        sender = sending(session, b"sent", timeout=0.2)
        client.expect_nothing(0.6)
        client.go_over(client_context())
        assert client.hear(5) == b"sent\n"
        assert sender.get(timeout=5) is None


def test_bytes_before_starttls_do_not_hide_what_the_peer_takes_after_it(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(StartTls(), framing=Line(max_size=BIG), linger_timeout=0.0)
    client = TlsPeer.__new__(TlsPeer)
    ScriptedClient.__init__(client, server.address, receive_buffer_size=32_768)
    with client:
        (session,) = eventually(lambda: server.sessions)
        plain = sending(session, bytes(BIG))
        client.expect(bytes(BIG) + b"\n")
        assert plain.get(timeout=5) is None
        client.send("STARTTLS\n")
        client.expect("go ahead\n")
        sender = sending(session, bytes(BIG), timeout=1.0)
        client.expect_nothing()
        client.go_over(client_context())
        for _ in range(30):
            client.hear(7_500)
            gevent.sleep(0.05)
            assert session.is_open
        sender.kill()


@sync_and_async
@pytest.mark.parametrize("end", ["timeout", "close", "shutdown", "garbage"])
def test_what_others_send_in_a_handshake_that_fails_never_leaves(
    end: str, use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    callback.timeout = 0.3 if end == "timeout" else None
    server = ps_server(callback, framing=Line(), linger_timeout=1.0)
    with asking_for_tls(server) as client:
        (session,) = server.sessions
        server.broadcast("SECRET")
        sender = sending(session, b"SECRET")
        client.expect_nothing(0.05)
        if end == "garbage":
            client.send("no record\n")
        elif end != "timeout":
            server.shutdown() if end == "shutdown" else session.close()
        assert isinstance(sender.get(timeout=5), PsSendError)
        received = b""
        with contextlib.suppress(OSError):
            while data := client.socket.recv(65_536):
                received += data
        assert b"SECRET" not in received
    assert [type(error) for error in callback.errors] == [PsTlsError]


@sync_and_async
@pytest.mark.parametrize("end", ["timeout", "close", "abort", "shutdown", "thread", "FIN", "RST"])
def test_a_session_that_does_not_get_over_to_tls_fails_without_noise(
    end: str,
    use_async_callback: bool,
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    callback.timeout = 0.3 if end == "timeout" else None
    server = ps_server(callback, framing=Line())
    with asking_for_tls(server) as client:
        (session,) = server.sessions
        ends: dict[str, Callable[[], object]] = {
            "timeout": lambda: None,
            "close": session.close,
            "abort": session.abort,
            "shutdown": server.shutdown,
            "thread": lambda: NativeThread(session.close).wait(),
            "FIN": client.close,
            "RST": client.reset,
        }
        with takes(most=1.5):
            ends[end]()
            (closed,) = callback.wait_for("on_close")
    assert [type(error) for error in callback.errors] == [PsTlsError]
    levels = [record.levelno for record in caplog.records if record.levelno >= logging.WARNING]
    is_failure = end in ("timeout", "FIN", "RST")
    assert levels == ([logging.WARNING] if is_failure else [])
    expected = PsCloseReason.SHUTDOWN if end == "shutdown" else PsCloseReason.SELF_CLOSE
    assert closed.value is (PsCloseReason.FAILED if is_failure else expected)
    if is_failure:
        assert isinstance(session.close_cause, PsTlsError)


@sync_and_async
def test_a_handshake_that_is_broken_off_closes_the_session(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    class Impatient(StartTls):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.2):
                super().on_message(session, message)
            is_open.append(session.is_open)

        async def on_message_async(self, session: PsSession[Any], message: bytes) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await super().on_message_async(session, message)
            is_open.append(session.is_open)

    is_open: list[bool] = []
    callback = Impatient(use_async_callback=use_async_callback)
    server = ps_server(callback, framing=Line())
    with asking_for_tls(server) as client:
        server.broadcast("SECRET")
        client.expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert is_open == [False]
    assert closed.value is PsCloseReason.FAILED
    assert len(callback.errors) == 1


@pytest.mark.logs_errors
@sync_and_async
def test_callback_timeout_ends_a_handshake(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    callback.timeout = None
    server = ps_server(callback, framing=Line(), callback_timeout=0.2)
    with asking_for_tls(server) as client:
        client.expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert "callback_timeout" in str(closed.session.close_cause)


def test_start_tls_async_does_not_hold_up_the_loop(ps_server: ServerFactory) -> None:
    callback = StartTls(use_async_callback=True)
    server = ps_server(callback, framing=Line())
    with asking_for_tls(server), asking_for_tls(server) as other:
        with ScriptedClient(server.address) as client:
            client.send("hello\n")
            client.expect("hello\n")
        other.go_over(client_context())
        other.say(b"hello\n")
        assert other.hear(6) == b"hello\n"
    eventually(lambda: not server.get_session_count())


def test_starttls_is_for_callbacks_and_for_once(ps_server: ServerFactory, peer: MakePeer) -> None:
    errors: list[str] = []

    class Twice(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            with pytest.raises(RuntimeError, match="has TLS already") as caught:
                session.start_tls(server_context(), server_side=True)
            errors.append(str(caught.value))

    server = ps_server(Twice(), ssl_context=server_context())
    client = peer(server)
    (session,) = eventually(lambda: server.sessions)
    with pytest.raises(RuntimeError, match="sync callback"):
        session.start_tls(server_context(), server_side=True)
    client.say(b"x")
    eventually(lambda: errors)


def test_start_tls_async_is_for_async_callbacks_of_the_session_itself_and_for_once(
    ps_server: ServerFactory,
) -> None:
    refused: list[str] = []

    async def start(session: PsSession[Any]) -> None:
        with pytest.raises(RuntimeError) as caught:
            await session.start_tls_async(server_context(), server_side=True)
        refused.append(str(caught.value))

    class Everywhere(PsCallback[bytes]):
        use_async_callback = True

        async def on_message_async(self, session: PsSession[bytes], message: bytes) -> None:
            with pytest.raises(RuntimeError, match="sync callback"):
                session.start_tls(server_context(), server_side=True)
            await asyncio.create_task(start(session))
            for other in server.sessions:
                if other is not session:
                    await start(other)
            await await_greenlet(session.spawn(start, session))
            await session.send_async("go ahead")
            await session.start_tls_async(server_context(), server_side=True)
            with pytest.raises(RuntimeError, match="has TLS already"):
                await session.start_tls_async(server_context(), server_side=True)
            refused.append("the last")

    server = ps_server(Everywhere(), framing=Line())
    with ScriptedClient(server.address):
        eventually(lambda: len(server.sessions) == 1)
        with asking_for_tls(server) as client:
            run_coroutine(start(server.sessions[0]))
            client.go_over(client_context())
            eventually(lambda: "the last" in refused)
    assert len(refused) == 5
    assert all("async callback of the session" in each for each in refused[:-1])


def test_start_tls_async_works_in_a_coroutine_that_a_handler_runs(
    ps_server: ServerFactory,
) -> None:
    def handle(session: PsSession[bytes]) -> None:
        for message in session:
            if message == b"STARTTLS":
                session.send("go ahead")
                run_coroutine(session.start_tls_async(server_context(), server_side=True))
            else:
                session.send(message)

    server = ps_server(PsHandler(handle), framing=Line())
    with asking_for_tls(server) as client:
        client.go_over(client_context())
        client.say(b"hello\n")
        assert client.hear(6) == b"hello\n"


# What makes no sense


def test_a_context_for_the_other_side_is_refused() -> None:
    with pytest.raises(ValueError, match="ssl_context must be made with"):
        PsServer(PsCallback(), ssl_context=client_context())
    with pytest.raises(ValueError, match="ssl_context must be made with"):
        PsClient(PsCallback(), "localhost", 1, ssl_context=server_context())
    with pytest.raises(TypeError, match="ssl_context must be an"):
        PsServer(PsCallback(), ssl_context=True)  # type: ignore[call-overload]  # the point
    with pytest.raises(TypeError, match="ssl_context must be an"):
        PsMultiClient(PsCallback(), ssl_context=False)
    with pytest.raises(ValueError, match="server_hostname='x' is for TLS"):
        PsClient(PsCallback(), "localhost", 1, server_hostname="x")
    for name in (".example", "x" * 300, "a\0b"):
        with pytest.raises(ValueError, match="server_hostname must be a name"):
            PsClient(PsCallback(), "localhost", 1, ssl_context=True, server_hostname=name)
    with pytest.raises(PsServerError, match="has no TLS"):
        PsServer(PsCallback()).reload_tls(server_context())


# What is left


@pytest.mark.parametrize("end", ["close_notify", "FIN", "RST", "close", "abort", "shutdown"])
def test_a_session_over_tls_goes_at_once_without_the_garbage_collector(
    end: str, ps_server: ServerFactory, peer: MakePeer
) -> None:
    class Forgetful(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            assert session._tls is not None
            references.extend((weakref.ref(session), weakref.ref(session._tls.ssl_object)))
            session.send(message)

    references: list[weakref.ref[object]] = []
    server = ps_server(Forgetful(), ssl_context=server_context(), linger_timeout=0.1)
    client = peer(server)
    gc.collect()
    gc.disable()
    try:
        client.say(b"x")
        client.hear(1)
        if end in ("close", "abort"):
            for session in server.sessions:
                session.close() if end == "close" else session.abort()
            del session
        else:
            {
                "close_notify": client.close_notify,
                "FIN": client.eof,
                "RST": client.reset,
                "shutdown": server.shutdown,
            }[end]()
        eventually(lambda: all(reference() is None for reference in references))
    finally:
        gc.enable()


@pytest.mark.parametrize("end", ["close", "abort", "send_eof"])
def test_a_bad_record_that_nobody_has_come_to_keeps_no_session(
    end: str, ps_server: ServerFactory, peer: MakePeer
) -> None:
    class Ending(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            references.append(weakref.ref(session))
            getattr(session, end)()

    references: list[weakref.ref[object]] = []
    client = peer(ps_server(Ending(), ssl_context=server_context(), linger_timeout=0.1))
    gc.collect()
    gc.disable()
    try:
        client.tls.write(b"x")
        client.plain.sendall(client.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        eventually(lambda: references and references[0]() is None)
    finally:
        gc.enable()


# OpenSSL's own


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    path = tmp_path / "server.pem"
    CERTIFICATE.private_key_and_cert_chain_pem.write_to_path(str(path))
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return path


def openssl(*arguments: str, **kwargs: Any) -> gevent.subprocess.Popen[bytes]:
    try:
        return gevent.subprocess.Popen(["openssl", *arguments], **kwargs)
    except FileNotFoundError:
        pytest.skip("there is no openssl")


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_s_client_talks_to_us(version: str, ps_server: ServerFactory, pem: Path) -> None:
    callback = Echo()
    server = ps_server(callback, ssl_context=server_context())
    where = f"127.0.0.1:{server.address[1]}"
    ca = str(pem.parent / "ca.pem")
    process = openssl(
        *("s_client", "-connect", where, version, "-quiet", "-verify_return_error", "-CAfile", ca),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"hello\n"
        server.sessions[0].close()
        assert process.stdout.read() == b""
        assert process.wait(timeout=5) == 0  # it takes a stream that is cut off for an error
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_we_talk_to_s_server(version: str, pem: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    process = openssl(
        *("s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(pem), "-rev", version),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        callback = RecordingCallback()
        client = PsClient(callback, "127.0.0.1", port, ssl_context=client_context(), framing=Line())

        def connected() -> bool:
            with contextlib.suppress(PsClientError):
                client.connect()
            return client.session is not None

        eventually(connected, 10)
        assert client.session is not None
        client.session.send("hello")
        (message,) = callback.wait_for("on_message")
        assert message.value == b"olleh"
        client.disconnect()
    finally:
        process.kill()
        process.wait()
