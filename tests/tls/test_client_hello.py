"""The name that a client asks for, as its first message has it."""

from __future__ import annotations

import contextlib
import ssl

import gevent
import gevent.ssl
import pytest

from psofa_gevent import PsCallback, PsMultiClient
from psofa_gevent.testing import ServerFactory, eventually
from psofa_gevent.tls.client_hello import server_name
from tls_peers import CERTIFICATE, VERSIONS, client_context


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
