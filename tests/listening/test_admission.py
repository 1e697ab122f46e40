"""Who is let in: refused connections cost little, are counted, and no callback hears of them."""

from __future__ import annotations

import _socket
import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.event import Event
from hypothesis import given
from hypothesis import strategies as st

from helpers import LOOPBACK, NativeThread, close_reasons, echo, local_server, takes
from marks import needs_ipv6, needs_libev_to_destroy, sync_and_async
from proxy_headers import LOCAL, v1, v2
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsRefusal,
    PsServer,
    PsSession,
    PsSocketAddressFamily,
)
from psofa_gevent.listening import farewell as farewell_module
from psofa_gevent.listening.networks import Networks, peer_address
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually

ELSEWHERE = ["192.0.2.0/24"]
"""No client of these tests is there."""
HERE = ["127.0.0.0/8"]


def is_closed(client: ScriptedClient) -> bool:
    """Whether the server closes the connection, by FIN or RST, without a byte."""
    client.socket.settimeout(5)
    try:
        return client.socket.recv(100) == b""
    except ConnectionResetError:
        return True


def refusals(server: PsServer) -> dict[PsRefusal, int]:
    """How often it refused, without the reasons that did not come up."""
    return {reason: count for reason, count in server.refused.items() if count}


def counted_peers(server: PsServer) -> dict[bytes, int]:
    """What the server keeps for max_sessions_per_peer."""
    admission = server._admission
    assert sum(admission._counts.values()) == len(admission._keys)
    return dict(admission._counts)


def ask(client: ScriptedClient) -> None:
    client.send("x")
    client.expect("x")


# Networks


def contains(networks: list[str], address: str) -> bool:
    packed = peer_address((address, 1))
    assert packed is not None
    return packed in Networks("networks", networks)


@pytest.mark.parametrize(
    ("networks", "inside", "outside"),
    [
        (["192.0.2.7"], ["192.0.2.7", "::ffff:192.0.2.7"], ["192.0.2.6", "192.0.2.8", "::1"]),
        (["10.0.0.0/8"], ["10.0.0.0", "10.255.255.255", "::ffff:a01:203"], ["9.255.255.255"]),
        (["0.0.0.0/0"], ["0.0.0.0", "255.255.255.255", "::ffff:1.2.3.4"], ["::1", "::"]),
        (["::/0"], ["::1", "2001:db8::"], ["127.0.0.1", "::ffff:127.0.0.1"]),
        (["::ffff:10.0.0.0/104"], ["10.1.1.1", "::ffff:10.1.1.1"], ["11.0.0.0", "::1"]),
        (["2001:db8::/33"], ["2001:db8:7fff::1"], ["2001:db8:8000::", "2001:db9::"]),
        (["fe80::/10"], ["fe80::1%eth0", "febf::"], ["fec0::", "fe7f::1"]),
        (["10.0.0.0/9", "10.255.0.0/16"], ["10.1.1.1", "10.255.0.1"], ["10.128.0.0"]),
        ([], [], ["127.0.0.1", "::1"]),
    ],
    ids=str,
)  # fmt: skip
def test_networks_contain_their_addresses_and_no_others(
    networks: list[str], inside: list[str], outside: list[str]
) -> None:
    assert [address for address in inside if not contains(networks, address)] == []
    assert [address for address in outside if contains(networks, address)] == []


@given(
    st.one_of(
        st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4), st.integers(0, 32)),
        st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6), st.integers(0, 128)),
    )
)
def test_networks_agree_with_the_standard_library(case: tuple[Any, Any, int]) -> None:
    base, address, bits = case
    network = ipaddress.ip_network((base, bits), strict=False)
    for each in (address, base, network.broadcast_address):
        if getattr(each, "ipv4_mapped", None) is None:
            assert contains([str(network)], str(each)) == (each in network)


def test_a_peer_on_a_unix_socket_has_no_address() -> None:
    for name in ("/run/client", "::1", "@abstract", "\udcff", "x" * 108):
        assert peer_address((f"unix:{name}", 0)) is None
    assert peer_address(None) is None


ODD_NAMES = {
    "no UTF-8": b"%s/\xff",
    "a new line": b"%s/\nERROR all is lost",
    "longest": b"\0" + b"x" * 107,
}
"""What a Unix socket may be called; in the first two, ``%s`` is a directory."""


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
@pytest.mark.parametrize("proxy_protocol", [False, True], ids=["direct", "proxied"])
def test_whatever_a_unix_peer_is_called_it_is_served_and_told_in_one_line(
    ps_server: ServerFactory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: bytes,
    proxy_protocol: bool,
) -> None:
    caplog.set_level(logging.DEBUG, "psofa_gevent")
    if name.startswith(b"\0") and sys.platform != "linux":
        pytest.skip("the abstract namespace is Linux's")
    server = ps_server(
        echo(),
        host=f"unix:{tmp_path}/s",
        denied_networks=ELSEWHERE,
        max_sessions_per_peer=1,
        proxy_protocol=proxy_protocol,
    )
    name = name.replace(b"%s", os.fsencode(tmp_path))
    with gevent.socket.socket(socket.AF_UNIX) as sock:
        if not proxy_protocol:
            sock.bind(name)
        sock.connect(f"{tmp_path}/s")
        client = ScriptedClient.from_socket(sock)
        client.send(v2(name, b"/s") if proxy_protocol else b"")
        ask(client)
        (session,) = server.sessions
        assert str(session.remote_endpoint[0]).startswith("unix:")  # type: ignore[index]
        texts = [repr(session), *(record.getMessage() for record in caplog.records)]
    assert [text for text in texts if not text.isprintable()] == []


def test_a_unix_peer_that_is_refused_is_told_in_one_line(
    ps_server: ServerFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = Door(lambda _peer: False)
    server = ps_server(callback, host=f"unix:{tmp_path}/s")
    with gevent.socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{tmp_path}/\n\udcff")
        sock.connect(f"{tmp_path}/s")
        assert is_closed(ScriptedClient.from_socket(sock))
    eventually(lambda: caplog.records)
    assert server.refused[PsRefusal.CALLBACK] == 1
    assert callback.peers == [(f"unix:{tmp_path}/\n\udcff", 0)]
    assert [
        each.getMessage() for each in caplog.records if not each.getMessage().isprintable()
    ] == []


def test_a_unix_peer_that_is_gone_before_it_began_is_told_in_one_line(
    ps_server: ServerFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "psofa_gevent")
    server = ps_server(PsCallback(), host=f"unix:{tmp_path}/s")
    assert server._listeners is not None
    (listener,) = server._listeners._all
    ours, theirs = socket.socketpair()
    ours.close()
    gone = _socket.socket(fileno=theirs.detach())
    gone.close()
    listener.do_handle(gone, "/run/\nclient")
    (text,) = eventually(
        lambda: [
            each.getMessage()
            for each in caplog.records
            if "connection lost before" in each.getMessage()
        ]
    )
    assert text.isprintable()


@pytest.mark.parametrize("reason", ["rules", "on_accept"])
def test_a_connection_without_an_address_is_nobody_s(ps_server: ServerFactory, reason: str) -> None:
    """A system such as macOS accepts one that was reset, and does not say whose it was."""
    callback = Door(lambda _peer: None)
    rules: dict[str, Any] = {"allowed_networks": ELSEWHERE} if reason == "rules" else {}
    server = ps_server(callback, **rules)
    assert server._listeners is not None
    (listener,) = server._listeners._all
    ours, theirs = socket.socketpair()
    with ours:
        accepted = _socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, theirs.detach())
        listener.do_handle(accepted, None)
        ours.settimeout(5)
        assert ours.recv(1) == b""
    assert callback.peers == []
    assert server.get_session_count() == 0


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({"allowed_networks": HERE}, False),
        ({"allowed_networks": ELSEWHERE}, True),
        ({"allowed_networks": [*ELSEWHERE, "127.0.0.1"]}, False),
        ({"allowed_networks": []}, True),
        ({"denied_networks": HERE}, True),
        ({"denied_networks": ELSEWHERE}, False),
        ({"allowed_networks": HERE, "denied_networks": ["127.0.0.1"]}, True),  # denied wins
        ({"allowed_networks": ["0.0.0.0/0"], "denied_networks": ELSEWHERE}, False),
    ],
    ids=str,
)
def test_networks_say_who_is_let_in(
    ps_server: ServerFactory, settings: dict[str, Any], is_refused: bool
) -> None:
    callback = echo()
    server = ps_server(callback, **settings)
    with ScriptedClient(server.address) as client:
        if is_refused:
            assert is_closed(client)
        else:
            ask(client)
    assert refusals(server) == ({PsRefusal.NETWORK: 1} if is_refused else {})
    assert bool(callback.named("on_open")) is not is_refused


@needs_ipv6
def test_an_ipv4_client_of_a_dual_stack_server_counts_as_ipv4(ps_server: ServerFactory) -> None:
    server = ps_server(
        echo(),
        host="::",
        socket_address_family=PsSocketAddressFamily.IPV6,
        denied_networks=["127.0.0.0/8"],
        max_sessions_per_peer=1,
    )
    with ScriptedClient((LOOPBACK, server.address[1])) as over_ipv4:
        assert is_closed(over_ipv4)
    with ScriptedClient(("::1", server.address[1])) as over_ipv6:
        ask(over_ipv6)
        assert list(counted_peers(server)) == [socket.inet_pton(socket.AF_INET6, "::1")]
    assert refusals(server) == {PsRefusal.NETWORK: 1}


def test_peers_on_unix_sockets_pass_all_rules(ps_server: ServerFactory, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server = ps_server(
        echo(),
        host=f"unix:{path}",
        allowed_networks=[],
        denied_networks=["0.0.0.0/0", "::/0"],
        max_sessions_per_peer=1,
    )
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(gevent.socket.socket(socket.AF_UNIX))
            sock.connect(path)
            ask(ScriptedClient.from_socket(sock))
        assert server.get_session_count() == 3
        assert counted_peers(server) == {}
    assert refusals(server) == {}


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


# Farewell


@pytest.mark.parametrize("farewell", ["too many\r\n", b"\xff\0", "ü" * 2_048], ids=len)
@pytest.mark.parametrize("says", [0, 1, 50_000])
@pytest.mark.parametrize("rule", ["refuse_when_full", "max_sessions_per_peer"])
def test_a_farewell_reaches_who_is_refused_even_one_that_talks(
    ps_server: ServerFactory, farewell: Any, says: int, rule: str
) -> None:
    settings: dict[str, Any] = {"max_sessions_per_peer": 1}
    if rule == "refuse_when_full":
        settings = {"max_sessions": 1, "refuse_when_full": True}
    server = ps_server(echo(), farewell=farewell, **settings)
    with ScriptedClient(server.address) as first:
        ask(first)
        with ScriptedClient(server.address) as second:
            second.send(bytes(says))
            gevent.sleep(0.02)
            second.send(bytes(says))
            expected = farewell.encode() if isinstance(farewell, str) else farewell
            assert second.receive_until_eof() == expected
        ask(first)
    eventually(lambda: not server._admission._farewells._leaving)


def test_who_does_not_leave_after_a_farewell_is_closed_soon(
    ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert farewell_module.LONGEST_FAREWELL_TIME == 1.0
    monkeypatch.setattr(farewell_module, "LONGEST_FAREWELL_TIME", 0.2)
    server = ps_server(echo(), max_sessions=1, refuse_when_full=True, farewell="full")
    with ScriptedClient(server.address) as first, ScriptedClient(server.address) as second:
        ask(first)
        second.expect("full")
        second.expect_eof()
        with takes(0.1, most=0.3):
            eventually(lambda: not server._admission._farewells._leaving)
        ask(first)


def test_who_talks_on_after_a_farewell_is_cut_off(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), max_sessions=1, refuse_when_full=True, farewell="full")
    with ScriptedClient(server.address) as first, ScriptedClient(server.address) as second:
        ask(first)
        with takes(most=0.9), pytest.raises(ConnectionError):
            second.send(bytes(64_000_000))


def test_farewells_are_bounded_in_number_and_accepting_goes_on(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), max_sessions=1, refuse_when_full=True, farewell="full")
    most = farewell_module.MOST_AT_A_TIME
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(ScriptedClient(server.address))
        ask(first)
        for _ in range(most + 20):
            client = stack.enter_context(ScriptedClient(server.address))
            client.expect("full")
            assert len(server._admission._farewells._leaving) <= most
        ask(first)
    assert refusals(server) == {PsRefusal.FULL: most + 20}


def test_a_shutdown_does_not_wait_for_farewells(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), max_sessions=1, refuse_when_full=True, farewell="full")
    with ScriptedClient(server.address) as first, ScriptedClient(server.address) as second:
        ask(first)
        second.expect("full")
        with takes(most=0.5):
            server.shutdown()
        assert not server._admission._farewells._leaving


@needs_libev_to_destroy
def test_farewells_end_with_their_hub() -> None:
    """The next start does not find them, and counts anew."""

    def serve_until_somebody_is_refused() -> None:
        server.start()
        eventually(lambda: leaving and not server.get_session_count())
        gevent.get_hub().destroy(destroy_loop=True)

    server = local_server(echo(), max_sessions=1, refuse_when_full=True, farewell="full")
    leaving = server._admission._farewells._leaving
    thread = NativeThread(serve_until_somebody_is_refused)
    eventually(lambda: server.address[1])
    with ScriptedClient(server.address) as first, ScriptedClient(server.address) as second:
        ask(first)
        second.expect("full")
        first.close()
        thread.wait()
        assert leaving
        with server, ScriptedClient(server.address) as third:
            assert not leaving
            ask(third)


@pytest.mark.parametrize("says", [b"", b"hello"])
def test_a_balancer_s_client_gets_the_farewell_too(ps_server: ServerFactory, says: bytes) -> None:
    server = ps_server(echo(), proxy_protocol=True, max_sessions_per_peer=1, farewell="full")
    with ScriptedClient(server.address) as first, ScriptedClient(server.address) as second:
        first.send(v1() + b"x")
        first.expect(b"x")
        second.send(v2() + says)
        assert second.receive_until_eof() == b"full"
    assert refusals(server) == {PsRefusal.PEER: 1}


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


# on_accept


class Door(RecordingCallback):
    """Sync or async, asks `answer` about each peer."""

    def __init__(self, answer: Callable[[Any], Any], *, use_async_callback: bool = False) -> None:
        super().__init__(lambda message: message)
        self.use_async_callback = use_async_callback
        self.answer = answer
        self.peers: list[Any] = []

    def on_accept(self, peer: Any) -> Any:
        self.peers.append(peer)
        return self.answer(peer)

    async def on_accept_async(self, peer: Any) -> Any:
        self.peers.append(peer)
        answer = self.answer(peer)
        return await answer if hasattr(answer, "__await__") else answer


@sync_and_async
@pytest.mark.parametrize("answer", [False, True, None, 0, "", "no"])
def test_on_accept_refuses_with_false_and_with_nothing_else(
    ps_server: ServerFactory, answer: Any, use_async_callback: bool
) -> None:
    callback = Door(lambda _peer: answer, use_async_callback=use_async_callback)
    server = ps_server(callback)
    with ScriptedClient(server.address) as client:
        if answer is False:
            assert is_closed(client)
        else:
            ask(client)
        assert callback.peers == [client.local_endpoint]
    assert refusals(server) == ({PsRefusal.CALLBACK: 1} if answer is False else {})
    if answer is False:
        eventually(lambda: not server.get_session_count())
        assert [event.name for event in callback.events] == ["on_start"]


@sync_and_async
def test_while_on_accept_waits_others_are_accepted_and_nobody_sees_a_session(
    ps_server: ServerFactory, use_async_callback: bool
) -> None:
    def answer(peer: Any) -> Any:
        if len(callback.peers) > 1:
            return None
        return asyncio.sleep(0.3) if use_async_callback else go_on.wait()

    go_on = Event()
    callback = Door(answer, use_async_callback=use_async_callback)
    server = ps_server(callback)
    with ScriptedClient(server.address) as first:
        first.send("x")
        eventually(lambda: callback.peers)
        with ScriptedClient(server.address) as second:
            ask(second)
            assert len(server.sessions) == 1
            server.broadcast("y")
            second.expect("y")
            go_on.set()
            first.expect("x")
            assert len(server.sessions) == 2


def test_on_accept_comes_after_the_header_and_before_tls(ps_server: ServerFactory) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    callback = Door(lambda _peer: False)
    server = ps_server(callback, proxy_protocol=True, ssl_context=context)
    with ScriptedClient(server.address) as client:
        client.send(v1())
        assert is_closed(client)
    assert callback.peers == [("203.0.113.7", 50_123)]
    assert refusals(server) == {PsRefusal.CALLBACK: 1}
    assert not callback.named("on_close")


def test_rules_come_before_on_accept(ps_server: ServerFactory) -> None:
    callback = Door(lambda _peer: None)
    server = ps_server(callback, denied_networks=HERE)
    with ScriptedClient(server.address) as client:
        assert is_closed(client)
    assert callback.peers == []


@sync_and_async
@pytest.mark.logs_errors
def test_on_accept_that_raises_is_logged_and_refuses(
    ps_server: ServerFactory, caplog: pytest.LogCaptureFixture, use_async_callback: bool
) -> None:
    def answer(_peer: Any) -> Any:
        raise ZeroDivisionError

    callback = Door(answer, use_async_callback=use_async_callback)
    server = ps_server(callback)
    for _ in range(2):
        with ScriptedClient(server.address) as client:
            assert is_closed(client)
    eventually(lambda: not server.get_session_count())
    assert refusals(server) == {PsRefusal.CALLBACK: 2}
    assert [event.name for event in callback.events] == ["on_start"]
    errors = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert [each.exc_info and each.exc_info[0] for each in errors] == [ZeroDivisionError] * 2
    assert "on_accept failed" in errors[0].getMessage()


@sync_and_async
@pytest.mark.logs_errors
@pytest.mark.parametrize("swallows", [False, True])
def test_on_accept_that_takes_too_long_is_ended_and_refuses(
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
    use_async_callback: bool,
    swallows: bool,
) -> None:
    async def wait() -> bool:
        with contextlib.suppress(*([BaseException] if swallows else [])):
            await asyncio.sleep(30)
        return True

    def answer(_peer: Any) -> Any:
        if use_async_callback:
            return wait()
        with contextlib.suppress(*([TimeoutError] if swallows else [])):
            gevent.sleep(30)
        return True

    callback = Door(answer, use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=0.1)
    with ScriptedClient(server.address) as client, takes(0.1, most=0.3):
        assert is_closed(client)
    eventually(lambda: not server.get_session_count())
    assert refusals(server) == {PsRefusal.CALLBACK: 1}
    assert not callback.named("on_close")
    (error,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "on_accept ran longer than callback_timeout=0.1 s" in error.getMessage()


@pytest.mark.parametrize("timeout", [0.0, 5.0], ids=["killed", "waited for"])
def test_a_shutdown_ends_on_accept_and_no_callback_hears_of_it(
    ps_server: ServerFactory, timeout: float
) -> None:
    go_on = Event()
    callback = Door(lambda _peer: go_on.wait())
    server = ps_server(callback, max_sessions_per_peer=1)
    with ScriptedClient(server.address):
        eventually(lambda: callback.peers)
        if timeout:
            gevent.spawn_later(0.1, go_on.set)
        server.shutdown(timeout)
    assert counted_peers(server) == {}
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]
    assert refusals(server) == {}


def test_the_time_of_on_accept_is_not_the_peer_s(ps_server: ServerFactory) -> None:
    callback = Door(lambda _peer: gevent.sleep(0.4))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server = ps_server(callback, ssl_context=context, handshake_timeout=0.3)
    with ScriptedClient(server.address) as client, takes(0.65, most=0.9):
        client.send(b"\x16")
        client.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]


def test_clients_do_not_ask_on_accept(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    callback = Door(lambda _peer: False)
    with PsClient(callback, *server.address) as client:
        assert client.session is not None
        client.session.send("x")
        callback.wait_for("on_message")
    with PsMultiClient(callback) as bundle:
        bundle.connect(*server.address).session.send("x")
        callback.wait_for("on_message", 2)
    assert callback.peers == []


def test_a_handler_may_have_a_door(ps_server: ServerFactory) -> None:
    class Guarded(PsHandler[bytes]):
        def on_accept(self, peer: Any) -> bool:
            peers.append(peer)
            return len(peers) > 1

        def handle(self, session: PsSession) -> None:
            session.send("welcome")

    peers: list[Any] = []
    server = ps_server(Guarded())
    with ScriptedClient(server.address) as first:
        assert is_closed(first)
    with ScriptedClient(server.address) as second:
        second.expect("welcome")


def test_a_peer_without_a_name_is_none(ps_server: ServerFactory, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    callback = Door(lambda _peer: None)
    ps_server(callback, host=f"unix:{path}")
    with gevent.socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        ask(ScriptedClient.from_socket(sock))
    assert callback.peers == [None]
