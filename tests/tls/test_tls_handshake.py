"""Handshakes: those that fail, what they say of both ends, and certificates."""

from __future__ import annotations

import datetime
import logging
import socket
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from helpers import takes
from marks import needs_ipv6
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsMultiClientError,
    PsSocketAddressFamily,
)
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually
from tls_peers import CA, CERTIFICATE, VERSIONS, Echo, MakePeer, client_context, server_context

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
