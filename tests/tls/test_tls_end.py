"""The end of a stream over TLS: a clean one, one that was cut off, and bad records."""

from __future__ import annotations

import contextlib
import ctypes.util
import logging
import socket
import ssl
import textwrap
from collections.abc import Iterator
from typing import Any

import gevent
import pytest

from helpers import python_process, takes
from psofa_gevent import PsCallback, PsCloseReason, PsSendError, PsSession, PsTlsInfo
from psofa_gevent.testing import RecordingCallback, ServerFactory, eventually
from psofa_gevent.tls import socket as tls_socket
from psofa_gevent.tls.socket import TlsSocket
from tls_peers import BIG, CA, Echo, MakePeer, TlsPeer, client_context, server_context


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
