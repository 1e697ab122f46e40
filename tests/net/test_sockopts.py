"""The options of the kernel's TCP that are settings: on both ends, and what they do."""

from __future__ import annotations

import contextlib
import errno
import ftplib
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import pytest

from acting import sending
from helpers import NativeThread, ScriptedServer, close_reasons, stalled_peer
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsMultiClient,
    PsMultiClientError,
    PsOverflow,
    PsServer,
    PsSession,
)
from psofa_gevent.framing import Line
from psofa_gevent.net import sockopts
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    connected_session,
    eventually,
)

trustme = pytest.importorskip("trustme")
CA = trustme.CA()


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("localhost").configure_cert(context)
    return context


def client_context() -> gevent.ssl.SSLContext:
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    CA.configure_trust(context)
    return context


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


# What the kernel keeps for a slow reader

needs_low_water = pytest.mark.skipif(
    sockopts.UNSENT_LOW_WATER is None, reason="this system has no TCP_NOTSENT_LOWAT"
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="how Linux counts")
SIZE = 30_000
"""Bytes of a buffer: less than any system takes by itself."""


def send_buffer(sock: Any) -> int:
    """SO_SNDBUF as it was asked for."""
    size: int = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return size // 2 if sys.platform == "linux" else size


def low_water(sock: Any) -> int:
    assert sockopts.UNSENT_LOW_WATER is not None
    size: int = sock.getsockopt(socket.IPPROTO_TCP, sockopts.UNSENT_LOW_WATER)
    return size


def test_send_buffer_size_is_set_on_accepted_and_on_connected_sockets(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(PsCallback(), send_buffer_size=SIZE)
    with (
        PsClient(PsCallback(), *server.address[:2], send_buffer_size=SIZE + 1) as client,
        PsMultiClient(PsCallback(), send_buffer_size=SIZE + 2) as bundle,
    ):
        assert client.session is not None
        assert send_buffer(client.session._sock) == SIZE + 1
        assert send_buffer(bundle.connect(*server.address[:2]).session._sock) == SIZE + 2
        eventually(lambda: len(server.sessions) == 2)
        assert {send_buffer(session._sock) for session in server.sessions} == {SIZE}


@pytest.mark.parametrize("is_inherited", [False, True])
def test_send_buffer_size_is_set_on_unix_sockets(is_inherited: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "app.sock")
    with contextlib.ExitStack() as stack:
        listener: Any = f"unix:{path}"
        if is_inherited:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen()
        server = PsServer(PsCallback(), listener=listener, send_buffer_size=SIZE)
        stack.enter_context(server)
        client = PsClient(PsCallback(), f"unix:{path}", 0, send_buffer_size=SIZE + 1)
        stack.enter_context(client)
        (session,) = eventually(lambda: server.sessions)
        assert client.session is not None
        assert send_buffer(session._sock) == SIZE
        assert send_buffer(client.session._sock) == SIZE + 1


@needs_low_water
def test_unsent_low_water_is_set_on_accepted_and_on_connected_sockets(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(PsCallback(), unsent_low_water=5_000)
    with (
        PsClient(PsCallback(), *server.address[:2], unsent_low_water=6_000) as client,
        PsMultiClient(PsCallback(), unsent_low_water=7_000) as bundle,
    ):
        assert client.session is not None
        assert low_water(client.session._sock) == 6_000
        assert low_water(bundle.connect(*server.address[:2]).session._sock) == 7_000
        eventually(lambda: len(server.sessions) == 2)
        assert {low_water(session._sock) for session in server.sessions} == {5_000}


@needs_linux
@pytest.mark.parametrize(
    ("high_water", "expected"),
    [(1, 65_536), (65_536, 262_144), (1_000_000, 4_000_000), (1_048_576, 0), (2**40, 0)],
)
def test_how_much_the_kernel_keeps_unsent_goes_by_how_much_may_wait_here(
    high_water: int, expected: int, ps_server: ServerFactory
) -> None:
    server = ps_server(PsCallback(), high_water=high_water)
    with PsClient(PsCallback(), *server.address[:2], high_water=high_water) as client:
        (session,) = eventually(lambda: server.sessions)
        assert client.session is not None
        assert low_water(session._sock) == low_water(client.session._sock) == expected


@needs_linux
def test_what_was_set_on_an_inherited_socket_gives_way_to_the_settings() -> None:
    own: list[dict[str, Any]] = [
        {},
        {"send_buffer_size": SIZE, "unsent_low_water": 5_000},
        {"high_water": 100_000},
    ]
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SIZE * 20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 9)
        for settings in own:
            server = PsServer(PsCallback(), listener=sock, **settings)
            with server, ScriptedClient(server.address):
                (session,) = eventually(lambda: server.sessions)  # noqa: B023 - called at once
                found = session._sock
                unsent = 4 * settings.get("high_water", 0)
                assert low_water(found) == settings.get("unsent_low_water", unsent)
                if "send_buffer_size" in settings:
                    assert send_buffer(found) == SIZE
                elif has_buffer_locks(found):
                    assert send_buffer(found) < SIZE * 20
                    # SO_BUF_LOCK: the kernel tunes it again.
                    assert not found.getsockopt(socket.SOL_SOCKET, 72) & 1
        assert send_buffer(sock) == SIZE * 20  # its owner's


def has_buffer_locks(sock: Any) -> bool:
    """Whether the kernel is one of 5.15 or later."""
    try:
        sock.getsockopt(socket.SOL_SOCKET, 72)
    except OSError:
        return False
    return True


def posted_before_the_first_drop(session: PsSession[Any], most: int) -> int:
    """Bytes that are taken for a peer that reads nothing, up to `most`, here and in the kernel."""
    posted = 0
    while not session.messages_dropped and posted < most:
        session.post(b"x" * 1_000)
        posted += 1_000
        gevent.sleep(0)
    return posted


@needs_linux
@pytest.mark.parametrize(
    "settings",
    [{}, {"unsent_low_water": 16_384}, {"send_buffer_size": 32_768}],
    ids=["default", "unsent_low_water", "send_buffer_size"],
)
@pytest.mark.parametrize("tls", [False, True])
def test_a_peer_that_does_not_read_costs_little_before_a_post_is_dropped(
    settings: dict[str, Any], tls: bool, ps_server: ServerFactory
) -> None:
    high_water = 65_536
    context = server_context() if tls else None
    settings = {**settings, "high_water": high_water, "overflow": PsOverflow.DROP_OLDEST}
    server = ps_server(PsCallback(), ssl_context=context, **settings)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(gevent.socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, high_water)
        sock.connect(server.address)
        if tls:
            stack.enter_context(client_context().wrap_socket(sock, server_hostname="localhost"))
        (session,) = eventually(
            lambda: [session for session in server.sessions if not session._is_opening]
        )
        assert posted_before_the_first_drop(session, 8_000_000) <= 8 * high_water


SMALL: list[dict[str, Any]] = [{"send_buffer_size": 1}, {"send_buffer_size": SIZE}]
if sockopts.UNSENT_LOW_WATER is not None:
    SMALL += [
        {"unsent_low_water": 1},
        {"unsent_low_water": 1, "send_buffer_size": 1},
        {"unsent_low_water": 5_000},
    ]


@pytest.mark.parametrize("settings", SMALL, ids=str)
@pytest.mark.parametrize("tls", [False, True])
def test_with_small_values_everything_arrives(
    settings: dict[str, Any], tls: bool, ps_server: ServerFactory, tmp_path: Path
) -> None:
    part = bytes(range(256)) * 1_024
    (tmp_path / "file").write_bytes(part)

    class Everything(PsCallback):
        use_async_callback = True

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            session.post(part)
            await session.send_async(part)
            await session.send_file_async(tmp_path / "file")
            for _ in range(1_000):
                session.post(part[:256])
            session.spawn(session.send, part)

    context = server_context() if tls else None
    server = ps_server(Everything(), ssl_context=context, send_timeout=30, **settings)
    asking = RecordingCallback()
    trust = client_context() if tls else None
    address = ("localhost", server.address[1])
    with PsClient(asking, *address, ssl_context=trust, **settings) as client:
        assert client.session is not None
        client.session.send("all")
        expected = part * 3 + part[:256] * 1_000 + part
        eventually(lambda: len(asking.received()) >= len(expected), timeout=30)
        assert asking.received() == expected


@pytest.mark.parametrize("settings", [SMALL[0], SMALL[-2]], ids=str)
@pytest.mark.parametrize("tls", [False, True])
def test_with_small_values_a_peer_that_reads_slowly_makes_progress_and_one_that_does_not_none(
    settings: dict[str, Any], tls: bool, ps_server: ServerFactory
) -> None:
    callback = RecordingCallback()
    context = server_context() if tls else None
    server = ps_server(callback, ssl_context=context, **settings)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(gevent.socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sock.connect(server.address)
        peer: Any = sock
        if tls:
            peer = stack.enter_context(
                client_context().wrap_socket(sock, server_hostname="localhost")
            )
        session = callback.wait_for("on_open")[0].session
        assert session is not None
        sender = sending(session, bytes(2_000_000), 1.0)
        began = monotonic()
        while monotonic() - began < 2.5:  # longer than the timeout
            peer.recv(2_048)
            gevent.sleep(0.01)
            assert not sender.ready()
        error = sender.get(timeout=20)
        assert "accepted no data for 1 s" in str(error)
        callback.wait_for("on_close")
        assert close_reasons(callback) == [PsCloseReason.FAILED]


def test_they_do_not_matter_where_there_is_no_tcp() -> None:
    settings: dict[str, Any] = {"keep_alive": 5, "send_buffer_size": SIZE}
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        settings["user_timeout"] = 5
    if sockopts.UNSENT_LOW_WATER is not None:
        settings["unsent_low_water"] = 5_000
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
