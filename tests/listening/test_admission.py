"""Who is let in: refused connections cost little, are counted, and no callback hears of them."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.event import Event

from admitting import HERE, Door, ask, counted_peers, is_closed, refusals
from helpers import LOOPBACK, NativeThread, echo, local_server
from proxy_headers import LOCAL, v1, v2
from psofa_gevent import PsCallback, PsRefusal, PsServer, PsSession
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually


def test_a_refused_connection_makes_no_session_and_no_greenlet(ps_server: ServerFactory) -> None:
    spawned: list[object] = []
    server = ps_server(echo(), denied_networks=HERE)
    logging.getLogger("psofa_gevent").setLevel(logging.ERROR)
    gevent.Greenlet.add_spawn_callback(spawned.append)
    try:
        for _ in range(50):
            with ScriptedClient(server.address) as client:
                assert is_closed(client)
    finally:
        gevent.Greenlet.remove_spawn_callback(spawned.append)
        logging.getLogger("psofa_gevent").setLevel(logging.NOTSET)
    assert refusals(server) == {PsRefusal.NETWORK: 50}
    assert spawned == []
    assert server.get_session_count() == 0


def test_a_flood_is_counted_and_warned_of_once(
    ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "psofa_gevent")

    def of_level(level: int) -> list[str]:
        return [
            each.getMessage()
            for each in caplog.records
            if each.levelno == level and "refused" in each.getMessage()
        ]

    def connect(times: int) -> None:
        for _ in range(times):
            with ScriptedClient(server.address) as client:
                assert is_closed(client)

    server = ps_server(echo(), denied_networks=HERE)
    connect(10)
    (first,) = eventually(lambda: of_level(logging.WARNING))
    assert "its address is not allowed" in first
    eventually(lambda: len(of_level(logging.DEBUG)) == 9)
    assert of_level(logging.WARNING) == [first]
    server.shutdown()
    (count,) = of_level(logging.INFO)
    assert "9 more in the last" in count
    assert "refused: its address is not allowed" in count


def test_what_was_refused_is_counted_since_the_server_was_made() -> None:
    server = local_server(denied_networks=HERE)
    assert server.refused == dict.fromkeys(PsRefusal, 0)
    for _ in range(2):
        with server, ScriptedClient(server.address) as client:
            assert is_closed(client)
    assert server.refused[PsRefusal.NETWORK] == 2
    assert NativeThread(lambda: server.refused[PsRefusal.NETWORK]).wait() == 2
    server.refused.clear()  # a copy
    assert server.refused[PsRefusal.NETWORK] == 2


def test_without_rules_nothing_is_asked_or_counted(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    assert server._manager is not None
    assert server._manager.counter is None
    assert server._manager.preamble is None
    assert server._manager.callbacks.on_accept is None
    assert server.refused == dict.fromkeys(PsRefusal, 0)


# Sessions per peer


def test_a_peer_has_no_more_than_its_number_and_others_have_theirs(
    ps_server: ServerFactory,
) -> None:
    callback = echo()
    server = ps_server(callback, max_sessions_per_peer=2)
    with contextlib.ExitStack() as stack:
        first, second = [stack.enter_context(ScriptedClient(server.address)) for _ in range(2)]
        ask(first)
        ask(second)
        with ScriptedClient(server.address) as third:
            assert is_closed(third)
        with client_from("127.0.0.2", server) as other:
            ask(other)
        eventually(lambda: server.get_session_count() == 2)
        first.close()
        eventually(lambda: server.get_session_count() == 1)
        ask(stack.enter_context(ScriptedClient(server.address)))
        assert counted_peers(server) == {b"\x7f\0\0\x01": 2}
    eventually(lambda: not server.get_session_count())
    assert counted_peers(server) == {}
    assert refusals(server) == {PsRefusal.PEER: 1}
    assert len(callback.named("on_open")) == 4


def client_from(host: str, server: PsServer) -> ScriptedClient:
    """A client with another address of this machine."""
    sock = gevent.socket.socket()
    try:
        sock.bind((host, 0))
    except OSError:  # macOS has 127.0.0.1 only
        sock.close()
        pytest.skip(f"{host} is no address of this machine")
    sock.connect(server.address)
    return ScriptedClient.from_socket(sock)


def by_fin(client: ScriptedClient, _session: PsSession) -> None:
    client.close()


def by_reset(client: ScriptedClient, _session: PsSession) -> None:
    client.reset()


def by_close(_client: ScriptedClient, session: PsSession) -> None:
    session.close()


def by_abort(_client: ScriptedClient, session: PsSession) -> None:
    session.abort()


def by_abort_in_a_thread(_client: ScriptedClient, session: PsSession) -> None:
    NativeThread(session.abort).wait()


def by_idleness(_client: ScriptedClient, session: PsSession) -> None:
    session.change_idle_milliseconds(1)
    gevent.sleep(0.005)
    assert session._slice is not None
    session._slice.look()  # as the idle timer does, once a second


def by_kill(_client: ScriptedClient, session: PsSession) -> None:
    assert session.greenlet is not None
    session.greenlet.kill(block=False)


def by_error(client: ScriptedClient, _session: PsSession) -> None:
    client.send("fail")


def by_shutdown(_client: ScriptedClient, session: PsSession) -> None:
    assert isinstance(session.owner, PsServer)
    session.owner.shutdown()


class Failing(RecordingCallback):
    def on_message(self, session: PsSession, message: bytes) -> None:
        if message == b"fail":
            raise ZeroDivisionError
        session.send(message)


WAYS = [
    *(by_fin, by_reset, by_close, by_abort, by_abort_in_a_thread, by_idleness),
    *(by_kill, by_error, by_shutdown),
]


@pytest.mark.logs_errors
@pytest.mark.parametrize("proxy_protocol", [False, True], ids=["direct", "proxied"])
@pytest.mark.parametrize("leave", WAYS, ids=lambda way: way.__name__)
def test_whichever_way_a_session_ends_its_peer_has_room_again(
    ps_server: ServerFactory,
    leave: Callable[[ScriptedClient, PsSession], None],
    proxy_protocol: bool,
) -> None:
    callback = Failing()
    server = ps_server(callback, max_sessions_per_peer=1, proxy_protocol=proxy_protocol)
    header = v1() if proxy_protocol else b""
    for number in range(1, 4):
        if not server.started:
            server.start()
        with ScriptedClient(server.address) as client:
            client.send(header + b"x")
            client.expect(b"x")
            assert list(counted_peers(server).values()) == [1]
            leave(client, callback.wait_for("on_open", number)[-1].session)  # type: ignore[arg-type]
            eventually(lambda: not server.get_session_count())
            assert counted_peers(server) == {}
    assert refusals(server) == {}


def test_a_session_that_never_started_leaves_no_trace(ps_server: ServerFactory) -> None:
    """Killed, or dropped by a shutdown, before its greenlet ran."""
    callback = RecordingCallback()
    server = ps_server(callback, max_sessions_per_peer=1)
    manager = server._manager
    assert manager is not None
    for end in ("kill", "drop"):
        ours, theirs = socket.socketpair()
        with ours:
            sock = socket.socket(fileno=theirs.detach())
            session: PsSession = manager.open(sock, (LOOPBACK, 1), None)
            assert counted_peers(server) == {b"\x7f\0\0\x01": 1}
            if end == "kill":
                assert session.greenlet is not None
                session.greenlet.kill(block=False)
            else:
                manager.drop_unstarted()
            eventually(lambda: not server.get_session_count())
        assert counted_peers(server) == {}
    assert not callback.named("on_open")


def test_connections_that_are_gone_at_once_leave_no_trace(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback(), max_sessions_per_peer=5)
    for _ in range(100):
        ScriptedClient(server.address).reset()
    eventually(lambda: not server.get_session_count() and not counted_peers(server))


@pytest.mark.logs_errors
def test_a_session_left_behind_by_a_shutdown_does_not_count_ever_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stuck(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            while not go_on.is_set():
                with contextlib.suppress(BaseException):
                    go_on.wait()

    monkeypatch.setattr("psofa_gevent.owner.shutdown.LEAST_SECOND_BOUND", 0.1)
    go_on = Event()
    server = local_server(Stuck(), max_sessions_per_peer=1)
    server.start()
    with ScriptedClient(server.address) as client:
        client.send("x")
        eventually(lambda: server.sessions and server.sessions[0].messages_received)
        server.shutdown(timeout=0.01)
    assert counted_peers(server) == {}
    with server, ScriptedClient(server.address) as client:
        eventually(lambda: server.sessions)
        go_on.set()  # the old one ends now
        gevent.sleep(0.02)
        assert counted_peers(server) == {b"\x7f\0\0\x01": 1}


def test_a_start_counts_anew() -> None:
    """The sessions of a hub that was destroyed have left without a word."""
    server = local_server(echo(), max_sessions_per_peer=1)
    server._admission._counts[b"\x7f\0\0\x01"] = 1
    with server, ScriptedClient(server.address) as client:
        ask(client)
    assert counted_peers(server) == {}


def test_many_peers_that_come_and_go_are_counted_exactly(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), max_sessions_per_peer=3, proxy_protocol=True)

    def visit(number: int) -> bool:
        with ScriptedClient(server.address) as client:
            client.send(v1((f"10.0.0.{number % 7}", 1)) + b"x")
            try:
                client.expect("x")
            except (AssertionError, ConnectionError):
                return False
            assert max(counted_peers(server).values()) <= 3
            if number % 3 == 0:
                client.reset()
        return True

    visits = [gevent.spawn(visit, number) for number in range(200)]
    served = [visit.get() for visit in visits].count(True)
    eventually(lambda: not server.get_session_count())
    assert counted_peers(server) == {}
    assert server.refused[PsRefusal.PEER] == 200 - served
    assert served >= 7 * 3


# Full


def test_a_full_server_refuses_and_serves_again_when_one_leaves(ps_server: ServerFactory) -> None:
    callback = echo()
    server = ps_server(callback, max_sessions=2, refuse_when_full=True)
    with contextlib.ExitStack() as stack:
        first, second = [stack.enter_context(ScriptedClient(server.address)) for _ in range(2)]
        ask(first)
        ask(second)
        for _ in range(5):
            with ScriptedClient(server.address) as third:
                assert is_closed(third)
        assert refusals(server) == {PsRefusal.FULL: 5}
        assert server.get_session_count() == 2
        first.close()
        eventually(lambda: server.get_session_count() == 1)
        ask(stack.enter_context(ScriptedClient(server.address)))
        ask(second)
    assert len(callback.named("on_open")) == 3


def test_a_burst_fills_a_server_to_its_number_and_no_further(ps_server: ServerFactory) -> None:
    callback = echo()
    server = ps_server(callback, max_sessions=10, refuse_when_full=True)
    with contextlib.ExitStack() as stack:
        clients = [gevent.socket.socket() for _ in range(60)]
        for client in map(stack.enter_context, clients):
            client.setblocking(False)
            client.connect_ex(server.address)
        eventually(lambda: server.refused[PsRefusal.FULL] == 50)
        assert server.get_session_count() == 10
    callback.wait_for("on_close", 10)
    assert len(callback.named("on_open")) == 10


def test_a_full_server_that_pauses_accepts_nobody(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), max_sessions=1, refuse_when_full=True)
    with ScriptedClient(server.address) as first:
        ask(first)
        server.stop_accepting()
        with ScriptedClient(server.address) as second:
            second.expect_nothing(0.1)
            assert refusals(server) == {}
            server.resume_accepting()
            assert is_closed(second)
    assert refusals(server) == {PsRefusal.FULL: 1}


def test_an_address_that_is_not_allowed_does_not_learn_that_the_server_is_full(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(
        echo(),
        max_sessions=1,
        refuse_when_full=True,
        farewell="full",
        denied_networks=["127.0.0.2"],
    )
    with ScriptedClient(server.address) as first:
        ask(first)
        with client_from("127.0.0.2", server) as denied:
            assert is_closed(denied)
        with ScriptedClient(server.address) as second:
            second.expect("full")
    assert refusals(server) == {PsRefusal.NETWORK: 1, PsRefusal.FULL: 1}


@pytest.mark.parametrize("proxy_protocol", [False, True], ids=["direct", "proxied"])
def test_the_first_rule_that_refuses_counts(ps_server: ServerFactory, proxy_protocol: bool) -> None:
    """Networks, the peer's number, and the server's; whose client it is comes after a header."""
    server = ps_server(
        Door(lambda _peer: not is_closed_door.is_set()),
        denied_networks=["127.0.0.2"],
        max_sessions_per_peer=1,
        max_sessions=2,
        refuse_when_full=True,
        proxy_protocol=proxy_protocol,
        trusted_proxies=["127.0.0.1", "127.0.0.2"],
    )
    is_closed_door = Event()
    header = LOCAL if proxy_protocol else b""

    def refused_for(host: str) -> PsRefusal:
        before = server.refused
        with client_from(host, server) as client:
            with contextlib.suppress(ConnectionError):
                client.send(header)
            assert is_closed(client)
        (reason,) = [each for each in PsRefusal if server.refused[each] > before[each]]
        return reason

    second_host, second_header = ("127.0.0.1", v1()) if proxy_protocol else ("127.0.0.3", b"")
    with client_from("127.0.0.1", server) as first:
        first.send(header)
        ask(first)
        assert refused_for("127.0.0.1") is PsRefusal.PEER
        assert refused_for("127.0.0.2") is PsRefusal.NETWORK
        with client_from(second_host, server) as second:
            second.send(second_header)
            ask(second)
            reasons = [refused_for(f"127.0.0.{host}") for host in (1, 2, 4)]
    if proxy_protocol:
        assert reasons == [PsRefusal.FULL, PsRefusal.FULL, PsRefusal.PROXY]
    else:
        assert reasons == [PsRefusal.PEER, PsRefusal.NETWORK, PsRefusal.FULL]
    eventually(lambda: not server.get_session_count())
    is_closed_door.set()
    assert refused_for("127.0.0.2") is PsRefusal.NETWORK
    assert refused_for("127.0.0.1") is PsRefusal.CALLBACK


# Several listeners


@pytest.fixture
def several(tmp_path: Path) -> Iterator[list[Any]]:
    """A listener of each kind: TCP, Unix, inherited."""
    with monkey.get_original("socket", "socket")() as sock:
        sock.bind((LOOPBACK, 0))
        sock.listen(100)
        yield [(LOOPBACK, 0), f"unix:{tmp_path}/s", sock]


def connect(address: tuple[Any, ...]) -> ScriptedClient:
    """A client of any of them."""
    host = str(address[0])
    if not host.startswith("unix:"):
        return ScriptedClient(address)
    sock = gevent.socket.socket(socket.AF_UNIX)
    sock.connect(host.removeprefix("unix:"))
    return ScriptedClient.from_socket(sock)


def test_when_all_listeners_together_are_full_each_of_them_refuses(several: list[Any]) -> None:
    settings: dict[str, Any] = {"max_sessions": 2, "refuse_when_full": True, "farewell": "full"}
    with PsServer(echo(), listener=several, **settings) as server:
        for _ in range(3):
            with connect(server.addresses[0]) as first, connect(server.addresses[1]) as second:
                ask(first)
                ask(second)
                for address in server.addresses:
                    with connect(address) as third:
                        assert third.receive_until_eof() == b"full"
                second.close()
                eventually(lambda: server.get_session_count() == 1)
                with connect(server.addresses[2]) as in_its_place:
                    ask(in_its_place)
            eventually(lambda: not server.get_session_count())
        assert refusals(server) == {PsRefusal.FULL: 9}


def test_a_peer_s_sessions_of_all_listeners_are_counted_together(several: list[Any]) -> None:
    with PsServer(echo(), listener=several, max_sessions_per_peer=2) as server:
        tcp, unix, inherited = server.addresses
        with connect(tcp) as first, connect(inherited) as second, connect(unix) as without_address:
            for client in (first, second, without_address):
                ask(client)
            assert counted_peers(server) == {b"\x7f\0\0\x01": 2}
            for address in (tcp, inherited):
                with connect(address) as third:
                    assert is_closed(third)
            first.close()
            eventually(lambda: server.get_session_count() == 2)
            with connect(inherited) as third:
                ask(third)
        eventually(lambda: not server.get_session_count())
        assert counted_peers(server) == {}
        assert refusals(server) == {PsRefusal.PEER: 2}


def test_networks_are_for_all_listeners_and_no_turn_is_lost_on_who_is_refused(
    several: list[Any],
) -> None:
    """While the server is full they wait; a free place goes to the first who is let in."""
    with PsServer(echo(), listener=several, max_sessions=1, denied_networks=HERE) as server:
        tcp, unix, inherited = server.addresses
        with contextlib.ExitStack() as stack:
            first = connect(unix)
            ask(first)
            waiting = [
                stack.enter_context(connect(address)) for address in [tcp, inherited] * 3 + [unix]
            ]
            waiting[-1].send("x")
            waiting[-1].expect_nothing(0.05)
            assert refusals(server) == {}
            first.close()
            waiting[-1].expect("x")
            waiting[-1].close()
            assert all(map(is_closed, waiting[:-1]))
        with connect(unix) as client:
            ask(client)
        assert refusals(server) == {PsRefusal.NETWORK: 6}


def test_a_header_is_due_on_all_listeners(several: list[Any]) -> None:
    callback = echo()
    with PsServer(
        callback, listener=several, proxy_protocol=True, max_sessions_per_peer=3
    ) as server:
        for address in server.addresses:
            with connect(address) as honest, connect(address) as silent:
                honest.send(v1())
                ask(honest)
                assert list(counted_peers(server)) == [bytes([203, 0, 113, 7])]
                silent.send("x")
                assert is_closed(silent)
            eventually(lambda: not server.get_session_count())
    assert len(callback.named("on_open")) == 3


# Behind a balancer


def test_behind_a_balancer_the_rules_are_about_its_clients(ps_server: ServerFactory) -> None:
    callback = echo()
    server = ps_server(
        callback,
        proxy_protocol=True,
        allowed_networks=["203.0.113.0/24", "2001:db8::/32", *HERE],
        denied_networks=["203.0.113.66"],
        max_sessions_per_peer=1,
    )
    with contextlib.ExitStack() as stack:

        def arrive(header: bytes) -> ScriptedClient:
            client = stack.enter_context(ScriptedClient(server.address))
            client.send(header + b"x")
            return client

        for header in (v1(), v2(("2001:db8::7", 1), ("::1", 2)), LOCAL):
            arrive(header).expect(b"x")
        for header in (
            v1(("198.51.100.1", 1)),
            v1(("203.0.113.66", 1)),
            v2(("2001:db9::", 1), ("::1", 2)),
        ):
            assert is_closed(arrive(header))
        for header in (v2(), LOCAL):
            assert is_closed(arrive(header))
        assert refusals(server) == {PsRefusal.NETWORK: 3, PsRefusal.PEER: 2}
        assert server.get_session_count() == 3
    eventually(lambda: not server.get_session_count())
    assert counted_peers(server) == {}
    assert len(callback.named("on_open")) == len(callback.wait_for("on_close", 3))  # fmt: skip
