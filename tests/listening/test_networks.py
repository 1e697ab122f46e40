"""Networks: which addresses are in them, and who is refused or let in by them."""

from __future__ import annotations

import _socket
import contextlib
import ipaddress
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from hypothesis import given
from hypothesis import strategies as st

from admitting import ELSEWHERE, HERE, Door, ask, counted_peers, is_closed, refusals
from helpers import LOOPBACK, echo
from marks import needs_ipv6
from proxy_headers import v2
from psofa_gevent import PsCallback, PsRefusal, PsSocketAddressFamily
from psofa_gevent.listening.networks import Networks, peer_address
from psofa_gevent.testing import ScriptedClient, ServerFactory, eventually


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
