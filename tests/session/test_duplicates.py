"""The peer sees the end of its connection while another descriptor of the same socket is open.

A child process has one that a C extension has forked, and any child in the moment after its fork.
Here the tests hold it themselves, which makes no difference to the kernel.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from typing import Any

import gevent.socket
import pytest

from helpers import LOOPBACK, ScriptedServer, accepts_connections, local_server, stalled_peer
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsMultiClient,
    PsSendError,
    PsSession,
)
from psofa_gevent.listening.listener import Listener
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually, serving

BIG = 16 * 1024 * 1024
"""Bytes: more than the buffers of a connection take."""


class Duplicates:
    """Duplicates of descriptors, held open."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def add(self, descriptor: int) -> None:
        self._descriptors.append(os.dup(descriptor))

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


@pytest.fixture
def duplicates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Duplicates]:
    """One of every connection that a server accepts, made in the moment in which it does."""
    held = Duplicates()
    accept = Listener._accept

    def accept_and_duplicate(self: Listener) -> Any:
        accepted = accept(self)
        if accepted is not None:
            held.add(accepted[0].fileno())
        return accepted

    monkeypatch.setattr(Listener, "_accept", accept_and_duplicate)
    yield held
    held.close()


def opened(callback: RecordingCallback) -> PsSession:
    """The session that opens."""
    session = callback.wait_for("on_open")[0].session
    assert session is not None
    return session


@pytest.mark.usefixtures("duplicates")
@pytest.mark.parametrize("state", ["open", "after send_eof", "after the peer's FIN"])
def test_an_abort_resets(state: str) -> None:
    callback = RecordingCallback()
    with (
        serving(callback, allow_half_open=True) as server,
        ScriptedClient(server.address) as peer,
    ):
        session = opened(callback)
        if state == "after send_eof":
            session.send_eof()
            peer.expect_eof()
        elif state == "after the peer's FIN":
            peer.eof()
            callback.wait_for("on_eof")
        session.abort()
        if state == "after send_eof":
            # What comes now has nobody to read it.
            with pytest.raises(ConnectionError):
                eventually(lambda: peer.send("x"))
        else:
            peer.expect_reset()
        callback.wait_for("on_close")


@pytest.mark.usefixtures("duplicates")
def test_an_abort_resets_a_connection_that_is_full() -> None:
    callback = RecordingCallback()
    with serving(callback) as server, stalled_peer(server.address) as peer:
        session = opened(callback)
        session.post(bytes(BIG))
        session.abort()
        peer.expect_reset()


@pytest.mark.usefixtures("duplicates")
def test_the_end_of_a_send_that_timed_out_reaches_the_peer() -> None:
    class Sends(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            with pytest.raises(PsSendError):
                session.send(bytes(BIG), timeout=0.2)

    callback = Sends()
    with serving(callback) as server, stalled_peer(server.address) as peer:
        assert callback.wait_for("on_close")[0].value is PsCloseReason.FAILED
        received = peer.receive_until_eof()
        assert 0 < len(received) < BIG


@pytest.mark.usefixtures("duplicates")
@pytest.mark.parametrize("how", ["close", "shutdown", "FAILED", "idle"])
def test_a_session_that_ends_ends_for_the_peer_in_both_directions(how: str) -> None:
    class Fails(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            if how == "FAILED":
                session._request_close(PsCloseReason.FAILED, linger=False)
            session.close()

    callback = Fails()
    idle = 50 if how == "idle" else None
    with (
        serving(callback, linger_timeout=0.1, idle_milliseconds=idle) as server,
        ScriptedClient(server.address) as peer,
    ):
        callback.wait_for("on_open")
        if how == "shutdown":
            server.shutdown()
        elif how != "idle":
            peer.send("x")
        peer.expect_eof()
        callback.wait_for("on_close")
        # Nobody reads what comes now, and the peer is told so.
        with pytest.raises(ConnectionError):
            eventually(lambda: peer.send("more"))


@pytest.mark.usefixtures("duplicates")
def test_a_session_whose_peer_has_closed_closes_too() -> None:
    callback = RecordingCallback()
    with serving(callback) as server, ScriptedClient(server.address) as peer:
        callback.wait_for("on_open")
        peer.eof()
        peer.expect_eof()
        assert callback.wait_for("on_close")[0].value is PsCloseReason.PEER_CLOSE


class Refuses(PsCallback):
    def on_accept(self, peer: object) -> bool:
        return False


REFUSALS: dict[str, tuple[PsCallback, dict[str, Any]]] = {
    "on_accept": (Refuses(), {}),
    "denied_networks": (PsCallback(), {"denied_networks": ["127.0.0.0/8"]}),
    "no trusted proxy": (PsCallback(), {"proxy_protocol": True, "trusted_proxies": []}),
    "no PROXY header": (PsCallback(), {"proxy_protocol": True, "handshake_timeout": 0.1}),
    "no PROXY header in it": (PsCallback(), {"proxy_protocol": True}),
}


@pytest.mark.usefixtures("duplicates")
@pytest.mark.parametrize("why", REFUSALS)
def test_a_connection_that_is_not_let_in_ends(why: str) -> None:
    callback, settings = REFUSALS[why]
    with serving(callback, **settings) as server, ScriptedClient(server.address) as peer:
        if why == "no PROXY header in it":
            peer.send("GET / HTTP/1.0\r\n\r\n")
        assert peer.receive_until_eof() == b""


@pytest.mark.usefixtures("duplicates")
@pytest.mark.parametrize("clients", [1, 40], ids=["one", "more than get a moment"])
def test_a_connection_ends_after_its_farewell(clients: int) -> None:
    settings: dict[str, Any] = {"max_sessions_per_peer": 1, "farewell": "full"}
    callback = RecordingCallback()
    with serving(callback, **settings) as server, ScriptedClient(server.address):
        callback.wait_for("on_open")
        refused = [ScriptedClient(server.address) for _ in range(clients)]
        for peer in refused:
            with peer:
                assert peer.receive_until_eof() == b"full"
                peer.eof()
        # Then in the other direction too: the server has closed it.
        eventually(lambda: not server._admission._farewells._leaving)


def test_a_server_that_has_shut_down_accepts_nobody_and_leaves_its_port() -> None:
    held = Duplicates()
    try:
        server = local_server()
        server.start()
        address = server.address
        assert server._listeners is not None
        held.add(server._listeners._all[0].socket.fileno())
        assert accepts_connections(address)
        server.shutdown()
        assert not accepts_connections(address)
        # A socket of a restarted server: with SO_REUSEADDR, as ours have it.
        with serving(PsCallback(), host=LOOPBACK, port=address[1]):
            assert accepts_connections(address)
    finally:
        held.close()


def test_an_inherited_socket_goes_on_to_listen_for_others() -> None:
    with gevent.socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        listening.listen(5)
        with serving(PsCallback(), listener=listening):
            pass
        with ScriptedClient(listening.getsockname()):
            pass


@pytest.mark.parametrize("how", ["abort", "close"])
def test_a_client_ends_its_connection(how: str) -> None:
    held = Duplicates()
    try:
        with ScriptedServer() as scripted:
            client = PsClient(PsCallback(), LOOPBACK, scripted.port)
            session = client.connect()
            held.add(session._sock.fileno())
            peer = scripted.accept()
            if how == "abort":
                session.abort()
                peer.expect_reset()
            else:
                client.disconnect()
                peer.expect_eof()
            client.disconnect()
    finally:
        held.close()


def test_a_handshake_that_fails_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Duplicates()
    connect = gevent.socket.socket.connect

    def connect_and_duplicate(self: gevent.socket.socket, address: Any) -> None:
        connect(self, address)
        held.add(self.fileno())

    try:
        with (
            ScriptedServer() as scripted,
            PsMultiClient(PsCallback(), ssl_context=ssl.create_default_context()) as bundle,
            monkeypatch.context() as patch,
        ):
            patch.setattr(gevent.socket.socket, "connect", connect_and_duplicate)
            with pytest.raises(PsClientError.__mro__[1], match="timed out"):
                bundle.connect(LOOPBACK, scripted.port, timeout=0.3)
            peer = scripted.accept()
            assert peer.receive_until_eof()  # the client's hello
    finally:
        held.close()
