"""TLS: everything holds as on plain connections.

Handshakes, what is sent and how a stream ends are in the files beside this one, and STARTTLS is in
tests/session/test_starttls.py.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import subprocess
import weakref
from pathlib import Path
from typing import Any

import gevent
import gevent.subprocess
import pytest

from helpers import NativeThread, close_reasons
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsServer,
    PsServerError,
    PsSession,
)
from psofa_gevent.framing import LengthPrefix, Line
from psofa_gevent.testing import RecordingCallback, ServerFactory, eventually
from tls_peers import BIG, CA, CERTIFICATE, VERSIONS, Echo, MakePeer, client_context, server_context

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
