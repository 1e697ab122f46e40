"""Where a server listens: sockets of others, several listeners for one server, and shared ports."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import socket
import ssl
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.server import StreamServer

from helpers import (
    NativeThread,
    accepts_connections,
    close_reasons,
    echo,
    free_port,
    python_process,
    run_python,
)
from marks import needs_ipv6
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsServer,
    PsServerError,
    PsSession,
    PsSocketAddressFamily,
)
from psofa_gevent.framing import Line
from psofa_gevent.net.addresses import TcpAddress
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually

LOOPBACK = "127.0.0.1"
_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")
needs_reuse_port = pytest.mark.skipif(
    not hasattr(socket, "SO_REUSEPORT"), reason="this system has no SO_REUSEPORT"
)


@contextlib.contextmanager
def listening(
    address: Any = (LOOPBACK, 0), family: int = socket.AF_INET, kind: type = _SystemSocket
) -> Iterator[socket.socket]:
    """A listening socket that belongs to the test."""
    with kind(family, socket.SOCK_STREAM) as sock:
        sock.bind(address)
        sock.listen(16)
        yield sock


def connect(address: tuple[Any, ...]) -> ScriptedClient:
    """A client of whatever a server's address may be."""
    host = str(address[0])
    if not host.startswith("unix:"):
        return ScriptedClient(address)
    sock = gevent.socket.socket(socket.AF_UNIX)
    sock.connect(host.removeprefix("unix:"))
    return ScriptedClient.from_socket(sock)


def assert_echoes(address: tuple[Any, ...], text: str = "hello") -> None:
    with connect(address) as client:
        client.send(text)
        client.expect(text)


def is_open(sock: socket.socket) -> bool:
    return sock.fileno() >= 0 and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


# Inherited sockets


@pytest.mark.parametrize("kind", [_SystemSocket, gevent.socket.socket], ids=["stdlib", "gevent"])
@pytest.mark.parametrize("as_number", [False, True], ids=["socket", "descriptor"])
def test_a_server_accepts_from_a_socket_that_listens_already(kind: type, as_number: bool) -> None:
    with listening(kind=kind) as sock:
        given = sock.fileno() if as_number else sock
        server = PsServer(echo(), listener=given)
        assert server.address == sock.getsockname()
        with server:
            assert server.address == sock.getsockname()
            assert server.addresses == [sock.getsockname()]
            with connect(server.address) as client:
                client.send("hello")
                client.expect("hello")
                (session,) = server.sessions
                assert session.local_endpoint == sock.getsockname()
        assert is_open(sock)


def test_a_client_of_between_two_starts_is_served_by_the_second() -> None:
    with listening() as sock:
        server = PsServer(echo(), listener=sock)
        with server:
            assert_echoes(server.address)
        with connect(server.address) as waiting:
            waiting.send("still there?")
            waiting.expect_nothing(0.1)
            with server:
                waiting.expect("still there?")


def test_a_server_goes_on_when_its_socket_is_closed_elsewhere() -> None:
    with listening() as sock:
        server = PsServer(echo(), listener=sock)
        server.start()
        address = sock.getsockname()
    assert_echoes(address)
    server.shutdown()
    assert not accepts_connections(address)
    assert server.address == address
    with pytest.raises(PsServerError, match=r"cannot listen on .*\(inherited\).*closed"):
        server.start()
    assert not server.started


def test_a_descriptor_that_is_gone_at_the_start_is_told() -> None:
    with listening() as sock:
        server = PsServer(echo(), listener=sock.fileno())
    with pytest.raises(PsServerError, match=r"cannot listen on 127.0.0.1:\d+ \(inherited\)"):
        server.start()


@needs_ipv6
def test_sessions_from_an_inherited_wildcard_know_their_own_address() -> None:
    with listening(("::", 0), socket.AF_INET6) as sock, PsServer(echo(), listener=sock) as server:
        port = server.address[1]
        for host, local in (("::1", "::1"), (LOOPBACK, f"::ffff:{LOOPBACK}")):
            with ScriptedClient((host, port)) as client:
                client.send("x")
                client.expect("x")
                (session,) = server.sessions
                assert session.local_endpoint is not None
                assert session.local_endpoint[:2] == (local, port)
            eventually(lambda: server.get_session_count() == 0)


def test_the_file_of_an_inherited_unix_socket_is_left(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    with listening(str(path), socket.AF_UNIX) as sock:
        server = PsServer(echo(), listener=sock, keep_alive=30)
        for _ in range(2):
            with server:
                assert server.address == (f"unix:{path}", 0)
                assert_echoes(server.address)
        assert path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a namespace of Linux's")
def test_an_inherited_socket_may_be_in_the_abstract_namespace() -> None:
    name = f"psofa-test-{os.getpid()}"
    with (
        listening(f"\0{name}", socket.AF_UNIX) as sock,
        PsServer(echo(), listener=sock) as server,
    ):
        assert server.address == (f"unix:@{name}", 0)
        client = gevent.socket.socket(socket.AF_UNIX)
        client.connect(f"\0{name}")
        with ScriptedClient.from_socket(client) as script:
            script.send("x")
            script.expect("x")


def options_of(session: PsSession[Any]) -> list[bool | int]:
    sock = session._sock
    found: list[bool | int] = [
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0,
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0,
    ]
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        found.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    return found


@pytest.mark.parametrize("set_before", [False, True])
@pytest.mark.parametrize(
    ("family", "host"),
    [(socket.AF_INET, LOOPBACK), pytest.param(socket.AF_INET6, "::1", marks=needs_ipv6)],
)
def test_settings_hold_for_sessions_from_an_inherited_socket(
    family: int, host: str, set_before: bool
) -> None:
    with listening((host, 0), family) as sock:
        has_user_timeout = hasattr(socket, "TCP_USER_TIMEOUT")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, set_before)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, set_before)
        if has_user_timeout:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 7_000 * set_before)
        on = {"no_delay": True, "keep_alive": 30}
        cases: list[tuple[dict[str, Any], list[bool | int]]] = [
            ({"no_delay": False}, [False, False, 0]),
            (on, [True, True, 0]),
        ]
        if has_user_timeout:
            cases.append(({**on, "user_timeout": 2.5}, [True, True, 2_500]))
        for settings, expected in cases:
            server = PsServer(PsCallback(), listener=sock, **settings)
            with server, ScriptedClient(sock.getsockname()):
                (session,) = eventually(lambda: server.sessions)  # noqa: B023 - called at once
                assert options_of(session) == expected[: 2 + has_user_timeout]
        assert (sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0) is set_before


def test_a_socket_that_others_make_blocking_again_blocks_nothing() -> None:
    program = """
        import socket
        from psofa_gevent import PsServer
        from psofa_gevent.testing import RecordingCallback, ScriptedClient

        listening = socket.create_server(("127.0.0.1", 0))
        with PsServer(RecordingCallback(bytes.upper), listener=listening) as server:
            for _ in range(3):
                listening.setblocking(True)
                with ScriptedClient(server.address) as client:
                    client.send("x")
                    client.expect("X")
        print("served")
    """
    result = run_python(program, timeout=10.0)
    assert (result.stdout, result.stderr) == ("served\n", "")


PREFORK = """
    import logging, os, signal, socket, sys

    logging.basicConfig(level=logging.DEBUG)
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            from psofa_gevent import PsCallback, PsServer

            class Who(PsCallback):
                def on_message(self, session, message):
                    session.send(f"{os.getpid():9}")

            PsServer(Who(), listener=listening, max_sessions=20).serve_forever()
            sys.exit(7)
        children.append(child)
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(child, signal.SIGTERM) for child in children])
    print("port", listening.getsockname()[1], flush=True)
    print("codes", *[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_forked_workers_share_a_listening_socket(tmp_path: Path) -> None:
    program = tmp_path / "prefork.py"
    program.write_text(textwrap.dedent(PREFORK))
    with python_process(str(program)) as process, contextlib.ExitStack() as open_ones:
        port = int(process.expect_line("port ").split()[1])
        served: list[bytes] = []
        for _ in range(40):
            client = open_ones.enter_context(ScriptedClient((LOOPBACK, port), timeout=20))
            client.send("who?")
            served.append(client.receive(9))
        assert sorted(served.count(pid) for pid in set(served)) == [20, 20]
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert process.lines[-1] == "codes 7 7"
    text = "\n".join(process.lines)
    for bad in ("Traceback", "ERROR", "WARNING", "cannot accept", "Error"):
        assert bad not in text


def test_a_server_made_before_the_fork_is_started_in_the_child() -> None:
    program = """
        import os, socket, sys
        from psofa_gevent import PsCallback, PsServer

        listening = socket.create_server(("127.0.0.1", 0))
        server = PsServer(PsCallback(), listener=listening)
        child = os.fork()
        if child == 0:
            with server:
                os._exit(0 if server.address == listening.getsockname() else 1)
        print(os.waitpid(child, 0)[1])
    """
    result = run_python(program)
    assert result.stdout.split() == ["0"], result.stderr


# What can't be listened on


def not_listening() -> socket.socket:
    sock = _SystemSocket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind((LOOPBACK, 0))
    return sock


def datagrams() -> socket.socket:
    sock = _SystemSocket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((LOOPBACK, 0))
    return sock


def closed() -> socket.socket:
    sock = not_listening()
    sock.close()
    return sock


def with_tls() -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return context.wrap_socket(not_listening(), server_side=True)


def connected() -> socket.socket:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (not_listening, ValueError, "listen already"),
        (datagrams, ValueError, "stream socket"),
        (closed, ValueError, "closed"),
        (with_tls, TypeError, "ssl_context"),
        (connected, ValueError, "listen already"),
        (Path(os.devnull).open, ValueError, "listening socket"),
        (io.BytesIO, ValueError, "socket that is open"),
    ],
)
def test_what_can_not_be_accepted_from_is_refused_at_once(
    make: Callable[[], Any], error: type[Exception], says: str
) -> None:
    with contextlib.closing(make()) as given:
        with pytest.raises(error, match=says) as refused:
            PsServer(PsCallback(), listener=given)
        assert "listener must" in str(refused.value)
        assert repr(given) in str(refused.value)
        if error is ValueError and not isinstance(given, io.BytesIO) and given.fileno() >= 0:
            with pytest.raises(ValueError, match=f"listener must.*{given.fileno()}"):
                PsServer(PsCallback(), listener=given.fileno())


def test_refused_sockets_stay_open() -> None:
    with not_listening() as sock:
        with pytest.raises(ValueError, match="listener must"):
            PsServer(PsCallback(), listener=[sock])
        sock.listen()
        with PsServer(echo(), listener=[sock]) as server:
            assert_echoes(server.address)


@pytest.mark.parametrize(
    "twice",
    [
        [(LOOPBACK, 8710), (LOOPBACK, 8710)],
        [("::", 8710), ("::", 8710)],
        ["unix:/tmp/a.sock", "unix:/tmp/../tmp/a.sock"],
        ["unix:/tmp/a.sock", ("unix:/tmp/a.sock", 0)],
    ],
    ids=str,
)
def test_the_same_place_twice_is_refused(twice: list[Any]) -> None:
    with pytest.raises(ValueError, match="same twice") as refused:
        PsServer(PsCallback(), listener=twice)
    assert repr(twice[1]) in str(refused.value)


def test_the_same_socket_twice_is_refused_by_whichever_descriptor() -> None:
    with listening() as sock, sock.dup() as copy:
        for second in (sock, sock.fileno(), copy, copy.fileno()):
            with pytest.raises(ValueError, match="same twice"):
                PsServer(PsCallback(), listener=[sock, second])


@pytest.mark.parametrize("given", [{"port": 1}, {"host": LOOPBACK}, {"host": "unix:/tmp/x"}])
def test_a_listener_besides_host_or_port_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="listener must not be given besides a host or a port"):
        PsServer(PsCallback(), listener=("::1", 0), **given)


# Several listeners


@pytest.fixture
def several(tmp_path: Path) -> Iterator[list[Any]]:
    """A listener of each kind: TCP, Unix, inherited."""
    with listening() as sock:
        sock.listen(256)
        yield [(LOOPBACK, 0), f"unix:{tmp_path}/app.sock", sock]


def test_a_server_listens_in_several_places(several: list[Any]) -> None:
    callback = echo()
    server = PsServer(callback, listener=several)
    before = server.addresses
    assert before == [(LOOPBACK, 0), (several[1], 0), several[2].getsockname()]
    for _ in range(2):
        with server:
            assert server.address == server.addresses[0]
            assert server.addresses[0][1] != 0
            assert server.addresses[1:] == before[1:]
            assert repr(server) == (f"<PsServer 127.0.0.1:{server.address[1]} and 2 more started>")
            for address in server.addresses:
                with connect(address) as client:
                    client.send("x")
                    client.expect("x")
                    (session,) = server.sessions
                    assert session.local_endpoint == address
                eventually(lambda: server.get_session_count() == 0)
        assert server.addresses == before
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE] * 6


def test_port_0_may_be_asked_for_several_times() -> None:
    with PsServer(echo(), listener=((LOOPBACK, 0), (LOOPBACK, 0), (LOOPBACK, 0))) as server:
        ports = [address[1] for address in server.addresses]
        assert len(set(ports)) == 3
        for address in server.addresses:
            assert_echoes(address)


def test_one_address_needs_no_list(tmp_path: Path) -> None:
    for one in ((LOOPBACK, 0), f"unix:{tmp_path}/a.sock", (f"unix:{tmp_path}/a.sock", 0)):
        with PsServer(echo(), listener=one) as server:
            assert len(server.addresses) == 1
            assert_echoes(server.address)


@needs_ipv6
def test_ipv6_and_ipv4_addresses_go_together() -> None:
    with PsServer(echo(), listener=[("::1", 0), (LOOPBACK, 0)]) as server:
        assert [address[0] for address in server.addresses] == ["::1", LOOPBACK]
        for address in server.addresses:
            assert_echoes(address[:2])
    with PsServer(
        echo(), listener=[(LOOPBACK, 0)], socket_address_family=PsSocketAddressFamily.IPV6
    ) as server:
        assert server.address[0] == f"::ffff:{LOOPBACK}"


def test_tls_is_for_all_listeners(several: list[Any]) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(ours)
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(theirs)
    callback = RecordingCallback()
    with PsServer(echo(), listener=several, ssl_context=ours) as server:
        for count, address in enumerate(server.addresses, 1):
            host, port = address[:2]
            with PsClient(
                callback, host, port, ssl_context=theirs, server_hostname="localhost"
            ) as client:
                assert client.session is not None
                assert client.session.tls is not None
                client.session.send("x")
                callback.wait_for("on_message", count)


def test_the_cap_is_for_all_listeners_together(several: list[Any]) -> None:
    with (
        PsServer(echo(), listener=several, max_sessions=2) as server,
        connect(server.addresses[0]) as first,
        connect(server.addresses[1]) as second,
    ):
        eventually(lambda: len(server.sessions) == 2)
        with connect(server.addresses[0]) as third:
            third.send("x")
            third.expect_nothing(0.05)
            fourth = connect(server.addresses[2])
            fourth.send("x")
            fourth.expect_nothing(0.05)
            first.close()
            third.expect("x")
            fourth.expect_nothing(0.05)
            second.close()
            fourth.expect("x")
            fourth.close()


def test_no_listener_starves_another_while_all_places_are_taken() -> None:
    """The loop would call the same one first each time, and that would take every free place."""
    order: list[int] = []

    class Brief(PsCallback):
        def on_open(self, session: PsSession) -> None:
            assert session.local_endpoint is not None
            order.append(session.local_endpoint[1])

        def on_message(self, session: PsSession, message: bytes) -> None:
            session.close()

    places = [(LOOPBACK, 0)] * 3
    with (
        PsServer(Brief(), listener=places, max_sessions=1) as server,
        contextlib.ExitStack() as clients,
        ScriptedClient(server.address) as first,
    ):
        eventually(lambda: order)
        crowded, *others = server.addresses
        for address in [crowded] * 30 + others * 5:
            clients.enter_context(ScriptedClient(address)).send("x")
        first.send("x")
        eventually(lambda: len(order) == 41)
    del order[0]
    for address in others:
        served = [index for index, port in enumerate(order) if port == address[1]]
        assert served[-1] < 15, order


def test_many_clients_of_several_listeners_share_few_places(several: list[Any]) -> None:
    most = 0
    answered: list[bytes] = []

    class Counting(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            nonlocal most
            most = max(most, server.get_session_count())
            gevent.sleep(0)

        def on_message(self, session: PsSession, message: bytes) -> None:
            session.send(message)
            session.close()

    def talk(session: PsSession) -> None:
        session.send("x")
        answered.append(session.receive(timeout=20))

    server = PsServer(Counting(), listener=several, max_sessions=3, framing=Line())
    with server, PsMultiClient(PsHandler(talk), framing=Line()) as bundle:
        for _ in range(100):
            for host, port in [address[:2] for address in server.addresses]:
                bundle.connect(host, port)
        eventually(lambda: len(answered) == 300, 30)
        eventually(lambda: server.get_session_count() == 0)
        for address in server.addresses:
            with connect(address) as client:
                client.send("again\n")
                client.expect("again\n")
    assert most == 3


def test_a_client_that_left_while_it_waited_gives_its_turn_away() -> None:
    with (
        PsServer(echo(), listener=[(LOOPBACK, 0)] * 2, max_sessions=1) as server,
        connect(server.addresses[0]) as first,
    ):
        eventually(lambda: len(server.sessions) == 1)
        gone = connect(server.addresses[0])
        gevent.sleep(0.02)
        gone.reset()
        with connect(server.addresses[1]) as waiting:
            waiting.send("x")
            waiting.expect_nothing(0.05)
            first.close()
            waiting.expect("x")
        for address in server.addresses:
            assert_echoes(address)


def in_a_thread(call: Callable[[], None]) -> None:
    NativeThread(call).join()


def test_stop_and_resume_accepting_are_for_all_listeners(several: list[Any]) -> None:
    with PsServer(echo(), listener=several) as server, contextlib.ExitStack() as clients:
        calls = [server.stop_accepting, server.resume_accepting]
        by_threads = [partial(in_a_thread, call) for call in calls]
        for pause, resume in (calls, by_threads):
            pause()
            waiting = [clients.enter_context(connect(address)) for address in server.addresses]
            for client in waiting:
                client.send("x")
            for client in waiting:
                client.expect_nothing(0.05)
            resume()
            for client in waiting:
                client.expect("x")


def test_a_pause_while_all_places_are_taken_holds_when_one_is_free() -> None:
    with (
        PsServer(echo(), listener=[(LOOPBACK, 0)] * 2, max_sessions=1) as server,
        connect(server.addresses[0]) as first,
    ):
        eventually(lambda: len(server.sessions) == 1)
        with connect(server.addresses[1]) as waiting:
            waiting.send("x")
            waiting.expect_nothing(0.05)
            server.stop_accepting()
            first.close()
            waiting.expect_nothing(0.05)
            assert server.get_session_count() == 0
            server.resume_accepting()
            waiting.expect("x")


@pytest.mark.logs_errors
@pytest.mark.parametrize("when", ["while it accepts", "while it waits for a place"])
def test_a_listener_that_its_owner_shuts_down_is_told_and_costs_the_others_nothing(
    when: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        listening() as sock,
        PsServer(echo(), listener=[sock, (LOOPBACK, 0), (LOOPBACK, 0)], max_sessions=1) as server,
        contextlib.ExitStack() as clients,
    ):
        gone, *others = server.addresses
        if when == "while it waits for a place":
            clients.enter_context(connect(others[0]))
            eventually(lambda: server.sessions)
            clients.enter_context(connect(gone)).expect_nothing(0.02)
        sock.shutdown(socket.SHUT_RDWR)
        clients.close()
        eventually(lambda: f"the listener {LOOPBACK}:{gone[1]} is gone: " in caplog.text)
        for address in others:
            assert_echoes(address)


@pytest.mark.logs_errors
def test_a_listener_that_can_not_be_watched_any_more_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a stranger has closed its descriptor."""

    def refuse(_listener: StreamServer) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with PsServer(echo(), listener=(LOOPBACK, 0)) as server:
        monkeypatch.setattr(StreamServer, "start_accepting", refuse)
        server.resume_accepting()
        eventually(lambda: f"{server.address[1]} is gone: Bad file descriptor" in caplog.text)


def test_a_shutdown_closes_all_listeners(several: list[Any], tmp_path: Path) -> None:
    server = PsServer(echo(), listener=several, max_sessions=1)
    with server:
        tcp = server.address
        first, second = connect(tcp), connect(tcp)  # so that all of them wait for a place
        eventually(lambda: len(server.sessions) == 1)
    assert not accepts_connections(tcp)
    assert os.listdir(tmp_path) == []
    assert is_open(several[2])
    first.close()
    second.close()


def test_a_start_that_on_start_fails_closes_all_listeners(
    several: list[Any], tmp_path: Path
) -> None:
    bound: list[tuple[Any, ...]] = []

    class Fails(PsCallback):
        def on_start(self, owner: Any) -> None:
            bound.extend(owner.addresses)
            raise RuntimeError("no")

    server = PsServer(Fails(), listener=several)
    with pytest.raises(RuntimeError, match="no"):
        server.start()
    assert not accepts_connections(bound[0])
    assert os.listdir(tmp_path) == []
    assert is_open(several[2])


def test_a_start_that_fails_in_one_place_listens_in_none(tmp_path: Path) -> None:
    free = free_port()
    with listening() as taken:
        address = taken.getsockname()
        server = PsServer(echo(), listener=[(LOOPBACK, free), f"unix:{tmp_path}/app.sock", address])
        with pytest.raises(PsServerError, match=rf"cannot listen on 127.0.0.1:{address[1]}: .*use"):
            server.start()
        assert not server.started
        assert not accepts_connections((LOOPBACK, free))
        assert os.listdir(tmp_path) == []
    with server:
        for each in server.addresses:
            assert_echoes(each)


def test_a_server_that_is_shut_down_in_on_start_leaves_no_file(tmp_path: Path) -> None:
    class Stops(PsCallback):
        def on_start(self, owner: Any) -> None:
            owner.shutdown()

    with pytest.raises(PsServerError, match="shut down while it started"):
        PsServer(Stops(), listener=[(LOOPBACK, 0), f"unix:{tmp_path}/app.sock"]).start()
    assert os.listdir(tmp_path) == []


def test_a_server_that_is_shut_down_while_it_binds_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = TcpAddress.resolve

    def resolve_late(address: TcpAddress) -> Any:
        server.shutdown()
        return resolve(address)

    monkeypatch.setattr(TcpAddress, "resolve", resolve_late)
    server = PsServer(PsCallback(), listener=[f"unix:{tmp_path}/app.sock", (LOOPBACK, 0)])
    with pytest.raises(PsServerError, match="shut down while it started"):
        server.start()
    assert os.listdir(tmp_path) == []
    assert not server.started


def test_listeners_of_a_stopped_server_go_without_the_garbage_collector(
    several: list[Any],
) -> None:
    """Also when they waited for a place at the end, and so were in a list of the pool's."""
    server = PsServer(echo(), listener=several, max_sessions=1)
    gc.disable()
    try:
        with server, connect(server.address), connect(server.address) as second:
            eventually(lambda: len(server.sessions) == 1)
            second.expect_nothing(0.02)
            listeners = server._listeners
            assert listeners is not None
            alive = [weakref.ref(each) for each in (*listeners._all, listeners._all[0]._queue)]
            del listeners
        eventually(lambda: [each() for each in alive] == [None] * 4)
    finally:
        gc.enable()


# A shared port


def shared_out(address: tuple[Any, ...], answers: Callable[[], bool]) -> None:
    """Connect until both servers of a port have got some."""
    with contextlib.ExitStack() as clients:
        for _ in range(200):
            client = clients.enter_context(ScriptedClient(address))
            client.send("x")
            client.expect("x")
            if answers():
                return
    raise AssertionError("one of the two got nothing")


@needs_reuse_port
def test_two_servers_of_a_process_share_a_port() -> None:
    with (
        PsServer(echo(), host=LOOPBACK, port=0, reuse_port=True) as first,
        PsServer(echo(), listener=[first.address, (LOOPBACK, 0)], reuse_port=True) as second,
    ):
        shared_out(
            first.address,
            lambda: first.get_session_count() > 0 and second.get_session_count() > 0,
        )
        with pytest.raises(PsServerError, match="in use"):
            PsServer(echo(), host=LOOPBACK, port=first.address[1]).start()


@needs_reuse_port
def test_two_processes_share_a_port() -> None:
    with PsServer(echo(), host=LOOPBACK, port=0, reuse_port=True) as server:
        port = str(server.address[1])
        arguments = ("--port", port, "--reuse-port", "--log-level", "debug")
        with python_process("-m", "psofa_gevent", "serve", *arguments) as other:
            other.expect_line(f"Listening on 127.0.0.1:{port}")
            made = 0

            def both() -> bool:
                nonlocal made
                made += 1
                return 0 < server.get_session_count() < made

            shared_out(server.address, both)
            other.send_signal(signal.SIGTERM)
            assert other.wait() == 0
        assert_echoes(server.address)


def test_reuse_port_is_for_hosts_and_ports(tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/app.sock"
    with listening() as sock:
        for given in ({"listener": sock}, {"listener": [path, sock]}, {"host": path}):
            with pytest.raises(ValueError, match="reuse_port must not be True"):
                PsServer(PsCallback(), reuse_port=True, **given)


def test_reuse_port_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psofa_gevent.listening.binds.REUSE_PORT", None)
    with pytest.raises(ValueError, match="this system has no SO_REUSEPORT"):
        PsServer(PsCallback(), reuse_port=True)


def test_without_reuse_port_a_port_has_one_server(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback())
    with pytest.raises(PsServerError, match="in use"):
        PsServer(
            PsCallback(), listener=server.address, reuse_port=hasattr(socket, "SO_REUSEPORT")
        ).start()


# Restarts


def test_a_restart_on_an_inherited_socket_loses_no_connection() -> None:
    answered = 0
    stop = False

    def keep_asking(address: tuple[Any, ...]) -> None:
        nonlocal answered
        while not stop:
            assert_echoes(address)
            answered += 1

    with listening() as sock:
        sock.listen(256)
        old = PsServer(echo(), listener=sock)
        old.start()
        asking = [gevent.spawn(keep_asking, sock.getsockname()) for _ in range(10)]
        for _ in range(5):
            seen = answered
            eventually(lambda: answered > seen + 20)  # noqa: B023 - called at once
            new = PsServer(echo(), listener=sock)
            new.start()
            old.shutdown(drain=30)
            old = new
        stop = True
        for each in gevent.joinall(asking, raise_error=True):
            each.get()
        old.shutdown()
