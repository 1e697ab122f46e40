"""Addresses: a literal one needs no resolver, wherever it is given; only names do."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.threadpool import ThreadPool

from helpers import LOOPBACK, run_python
from marks import needs_ipv6
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsMultiClient,
    PsReconnect,
    PsServer,
    PsServerError,
    PsSocketAddressFamily,
)
from psofa_gevent.net.addresses import TcpAddress, without_zone
from psofa_gevent.testing import RecordingCallback, ScriptedClient

IPV4 = PsSocketAddressFamily.IPV4
IPV6 = PsSocketAddressFamily.IPV6


@pytest.fixture
def no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that never answers, as one whose threads are all busy."""

    def never(*_args: object) -> None:
        raise AssertionError("a literal address went to the resolver")

    monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", never)
    monkeypatch.setattr(gevent.get_hub(), "resolver", None)


@pytest.fixture
def busy_pool() -> Iterator[ThreadPool]:
    """The pool in which gevent's default resolver works, with no thread that is free."""
    allocate_lock = monkey.get_original("_thread", "allocate_lock")
    blocking = allocate_lock()
    blocking.acquire()

    def block() -> None:
        with blocking:
            pass

    pool = gevent.get_hub().threadpool
    working = [pool.spawn(block) for _ in range(pool.maxsize)]
    try:
        yield pool
    finally:
        blocking.release()
        for each in working:
            each.get(timeout=10)


def link_local_addresses() -> list[str]:
    """Those of this machine, with their zones."""
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as table:
            rows = [line.split() for line in table]
    except OSError:
        return []
    return [
        f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0]))}%{row[5]}"
        for row in rows
        if row[0].startswith("fe80")
    ]


needs_link_local = pytest.mark.skipif(
    not link_local_addresses(), reason="no interface here has a link-local address"
)


def test_a_server_and_its_clients_need_no_thread_of_the_pool(busy_pool: ThreadPool) -> None:
    callback = RecordingCallback()
    with gevent.Timeout(5), PsServer(callback, host=LOOPBACK, port=0) as server:
        port = server.address[1]
        with PsClient(PsCallback(), LOOPBACK, port, source_address=(LOOPBACK, 0)):
            callback.wait_for("on_open")
        with PsMultiClient(PsCallback()) as bundle:
            bundle.connect(LOOPBACK, port)
            callback.wait_for("on_open", 2)
        staying = PsReconnect(first_delay=0.01, jitter=0)
        silent = gevent.socket.socket()
        silent.bind((LOOPBACK, 0))  # nobody listens there
        with (
            silent,
            PsClient(
                PsCallback(),
                *silent.getsockname(),
                endpoints=[(LOOPBACK, port)],
                reconnect=staying,
            ),
        ):
            callback.wait_for("on_open", 3)
        with (
            PsServer(PsCallback(), listener=[(LOOPBACK, 0)]) as another,
            ScriptedClient(another.address),
        ):
            pass


@needs_ipv6
@pytest.mark.usefixtures("no_resolver")
@pytest.mark.parametrize("host", ["::1", "::ffff:127.0.0.1", "127.0.0.1", "0.0.0.0", "::"])
def test_no_address_of_a_dual_stack_socket_goes_to_the_resolver(host: str) -> None:
    with (
        PsServer(PsCallback(), host=host, port=0, socket_address_family=IPV6) as server,
        PsClient(PsCallback(), host, server.address[1], socket_address_family=IPV6) as client,
    ):
        assert client.session is not None
        assert client.session.is_open


@needs_link_local
@pytest.mark.usefixtures("no_resolver")
@pytest.mark.parametrize("is_number", [False, True], ids=["name", "number"])
def test_an_address_with_a_zone_goes_to_no_resolver(is_number: bool) -> None:
    address, _, zone = link_local_addresses()[0].partition("%")
    host = f"{address}%{socket.if_nametoindex(zone)}" if is_number else f"{address}%{zone}"
    with (
        PsServer(PsCallback(), host=host, port=0, socket_address_family=IPV6) as server,
        PsClient(
            PsCallback(),
            host,
            server.address[1],
            socket_address_family=IPV6,
            source_address=(host, 0),
        ) as client,
    ):
        assert client.session is not None
        assert client.session.remote_endpoint == server.address
        assert server.address[3] == socket.if_nametoindex(zone)


@pytest.mark.usefixtures("no_resolver")
@pytest.mark.parametrize(
    ("host", "meant"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("1.2", "1.0.0.2"),
        ("010.0.0.1", "8.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("\N{FULLWIDTH DIGIT ONE}27.0.0.1", "127.0.0.1"),  # as for names (RFC 3490)
    ],
)
def test_an_address_means_what_it_means_to_the_c_library(host: str, meant: str) -> None:
    assert TcpAddress(host, 7, IPV4).resolve() == [(meant, 7)]
    assert TcpAddress(host, 7, IPV6).resolve() == [(f"::ffff:{meant}", 7, 0, 0)]


@pytest.mark.parametrize("host", ["127.0.0.1 x", "1.2.3.4.5", "256.0.0.1", "localhost"])
def test_what_is_no_address_is_a_name(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def look_up(name: str, *_args: object) -> list[Any]:
        asked.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 7))]

    monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", look_up)
    assert TcpAddress(host, 7, IPV4).resolve() == [("192.0.2.7", 7)]
    assert asked == [host]


@pytest.mark.usefixtures("no_resolver")
def test_a_zone_that_is_none_here_is_named_at_once() -> None:
    server = PsServer(PsCallback(), host="fe80::1%no-such-zone", port=0, socket_address_family=IPV6)
    with pytest.raises(PsServerError, match="no interface 'no-such-zone'"):
        server.start()
    client = PsClient(PsCallback(), "fe80::1%no-such-zone", 7, socket_address_family=IPV6)
    with pytest.raises(PsClientError, match="no interface 'no-such-zone'"):
        client.connect()
    wrong = PsClient(PsCallback(), "fe80::g", 7, socket_address_family=IPV6)
    with pytest.raises(PsClientError, match="not an IPv6 address"):
        wrong.connect()


@pytest.mark.parametrize("resolver", ["thread", "ares", "dnspython", "block"])
def test_every_address_can_be_bound_and_connected_with_each_resolver(resolver: str) -> None:
    if resolver == "dnspython":
        pytest.importorskip("dns")
    if resolver == "ares":
        pytest.importorskip("gevent.resolver.ares")
    outcome = run_python(
        """
        import sys

        from marks import has_ipv6
        from psofa_gevent import PsCallback, PsClient, PsServer, PsSocketAddressFamily

        V4, V6 = PsSocketAddressFamily.IPV4, PsSocketAddressFamily.IPV6
        hosts = [("0.0.0.0", V4), ("127.0.0.1", V4), ("127.1", V4)]
        if has_ipv6():
            hosts += [("::", V6), ("::1", V6), ("0.0.0.0", V6), ("127.0.0.1", V6)]
        for host, family in hosts:
            with (
                PsServer(PsCallback(), host=host, port=0, socket_address_family=family) as server,
                PsClient(
                    PsCallback(), host, server.address[1], socket_address_family=family
                ) as client,
            ):
                assert client.session is not None
        print("all of them")
        """,
        environment={"GEVENT_RESOLVER": resolver},
    )
    assert outcome.stdout == "all of them\n", outcome.stderr


@pytest.mark.parametrize(
    ("host", "without"),
    [
        ("fe80::1%eth0", "fe80::1"),
        ("::1%2", "::1"),
        ("::1", "::1"),
        ("100%.example", "100%.example"),
        ("example.org", "example.org"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_a_zone_is_no_part_of_an_address_for_others(host: str, without: str) -> None:
    assert without_zone(host) == without
