"""The options of the kernel's TCP that are settings: on both ends, and what they do."""

from __future__ import annotations

import contextlib
import errno
import ftplib
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import NativeThread, ScriptedServer, close_reasons, stalled_peer
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsMultiClient,
    PsMultiClientError,
    PsServer,
    PsSession,
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

needs_user_timeout = pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT"
)


def options(session: PsSession[Any]) -> dict[str, int]:
    names = ["TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"]
    sock = session._sock
    found = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names}
    return {**found, "on": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0}


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="named otherwise here")
def test_keep_alive_is_set_on_accepted_and_on_connected_sockets(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback(), keep_alive=30)
    wanted = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "on": True}
    with PsClient(PsCallback(), *server.address[:2], keep_alive=30) as client:
        (session,) = eventually(lambda: server.sessions)
        assert options(session) == wanted
        assert client.session is not None
        assert options(client.session) == wanted
        with PsMultiClient(PsCallback(), keep_alive=0.5) as bundle:
            quick = options(bundle.connect(*server.address[:2]).session)
            assert quick == {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "on": True}
        with PsMultiClient(PsCallback()) as bundle:
            assert not options(bundle.connect(*server.address[:2]).session)["on"]


@needs_user_timeout
def test_user_timeout_is_set_on_accepted_and_on_connected_sockets(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback(), user_timeout=2.5)
    with PsClient(PsCallback(), *server.address[:2], user_timeout=1) as client:
        (session,) = eventually(lambda: server.sessions)
        option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
        assert session._sock.getsockopt(*option) == 2_500
        assert client.session is not None
        assert client.session._sock.getsockopt(*option) == 1_000


@needs_user_timeout
def test_a_peer_that_the_kernel_gives_up_closes_with_failed(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, user_timeout=0.5, high_water=2**30)
    with stalled_peer(server.address):
        (session,) = eventually(lambda: server.sessions)
        session.post(bytes(16 * 1024 * 1024))
        callback.wait_for("on_close", timeout=20)
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    assert isinstance(session.close_cause, OSError)
    assert session.close_cause.errno == errno.ETIMEDOUT


def test_they_do_not_matter_where_there_is_no_tcp() -> None:
    settings: dict[str, Any] = {"keep_alive": 5}
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        settings["user_timeout"] = 5
    callback = RecordingCallback(lambda message: message)
    with connected_session(callback, **settings) as both:
        both.peer.send("x")
        both.peer.expect("x")


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.5 is nobody's address here")
def test_clients_connect_from_where_they_are_told(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback())
    address = server.address[:2]
    source = ("127.0.0.5", 0)  # all of 127.0.0.0/8 is this machine, on Linux
    with PsClient(PsCallback(), *address, source_address=source) as client:
        assert client.session is not None
        assert client.session.local_endpoint is not None
        assert client.session.local_endpoint[0] == "127.0.0.5"
        (session,) = eventually(lambda: server.sessions)
        assert session.remote_endpoint == client.session.local_endpoint
    with PsMultiClient(PsCallback()) as bundle:
        session = bundle.connect(*address, source_address=source).session
        assert session.local_endpoint is not None
        assert session.local_endpoint[0] == "127.0.0.5"
        with pytest.raises(PsMultiClientError, match="Cannot assign requested address"):
            bundle.connect(*address, source_address=("192.0.2.7", 0))


@pytest.mark.parametrize(
    ("source_address", "error"),
    [
        ("127.0.0.1", TypeError),
        (("127.0.0.1",), TypeError),
        ((5, 0), TypeError),
        (("127.0.0.1", "0"), TypeError),
        (("", 0), ValueError),
        (("127.0.0.1", 70_000), ValueError),
        (("unix:/tmp/x", 0), ValueError),
    ],
)
def test_a_source_address_that_is_none_is_refused(
    source_address: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"source_address|host|port"):
        PsClient(PsCallback(), "localhost", 1, source_address=source_address)


# Urgent data


@contextlib.contextmanager
def own_listener(callback: PsCallback) -> Iterator[ScriptedClient]:
    with (
        PsServer(callback, host="127.0.0.1", port=0) as server,
        ScriptedClient(server.address) as peer,
    ):
        yield peer


@contextlib.contextmanager
def inherited_listener(callback: PsCallback) -> Iterator[ScriptedClient]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ScriptedClient(listener.getsockname()) as peer,  # before anything could be set
        PsServer(callback, listener=listener),
    ):
        yield peer


@contextlib.contextmanager
def client(callback: PsCallback) -> Iterator[ScriptedClient]:
    with ScriptedServer() as server, PsClient(callback, *server.address):
        yield server.accept()


@contextlib.contextmanager
def multi_client(callback: PsCallback) -> Iterator[ScriptedClient]:
    with ScriptedServer() as server, PsMultiClient(callback) as bundle:
        bundle.connect(*server.address)
        yield server.accept()


@pytest.mark.parametrize("connected", [own_listener, inherited_listener, client, multi_client])
def test_urgent_data_comes_in_its_place_in_the_stream(
    connected: Callable[[PsCallback], contextlib.AbstractContextManager[ScriptedClient]],
) -> None:
    callback = RecordingCallback()
    with connected(callback) as peer:
        peer.send("before")
        peer.socket.send(b"urgent", socket.MSG_OOB)
        peer.send("after")
        peer.socket.send(b"!", socket.MSG_OOB)
        peer.send("end")
        eventually(lambda: callback.received().endswith(b"end"))
    assert callback.received() == b"beforeurgentafter!end"


def test_sockets_that_know_no_urgent_data_are_left_alone(tmp_path: Path) -> None:
    callback = RecordingCallback()
    with (
        PsServer(callback, host=f"unix:{tmp_path}/socket") as server,
        PsClient(PsCallback(), *server.address) as client,
    ):
        assert client.session is not None
        client.session.send("hello")
        callback.wait_for("on_message")


def test_ftplib_can_abort(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    class Ftp(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            session.send("220 hello")

        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            session.send("226 done")

    def abort_and_go_on(host: str, port: int) -> list[str]:
        ftp = ftplib.FTP()
        ftp.connect(host, port, timeout=5)
        with contextlib.closing(ftp):
            return [ftp.abort(), ftp.voidcmd("NOOP")]

    callback = Ftp()
    server = ps_server(callback, framing=Line(newline=b"\r\n"))
    assert NativeThread(abort_and_go_on, *server.address[:2]).wait() == ["226 done"] * 2
    assert [event.value for event in callback.named("on_message")] == [b"ABOR", b"NOOP"]
