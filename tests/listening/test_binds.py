"""Where a server listens: ports, hosts, families; and what `start` refuses."""

from __future__ import annotations

import errno
import logging
import os
import socket
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.event import Event

import psofa_gevent.listening.sockets
from helpers import LOOPBACK, echo, local_server, run_python
from marks import needs_ipv6
from psofa_gevent import PsCallback, PsServer, PsServerError, PsSocketAddressFamily
from psofa_gevent.testing import (
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)
from reachable import assert_serves, listening, native_clients

IPV6 = PsSocketAddressFamily.IPV6
NOT_OURS = "203.0.113.7"
"""RFC 5737: an address for documentation, which no machine has."""

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")


# Where it listens


def test_port_0_listens_on_a_free_port_which_address_tells(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    host, port = server.address
    assert host == LOOPBACK
    assert port != 0
    assert_serves(server)


def test_address_is_what_was_asked_for_while_stopped() -> None:
    server = local_server()
    assert server.address == (LOOPBACK, 0)
    with server:
        assert server.address[1] != 0
    assert server.address == (LOOPBACK, 0)


def test_two_servers_in_one_process_do_not_mix(ps_server: ServerFactory) -> None:
    callbacks = [RecordingCallback(lambda _message: b"0"), RecordingCallback(lambda _message: b"1")]
    servers = [ps_server(callback) for callback in callbacks]
    assert servers[0].address != servers[1].address
    for number, server in enumerate(servers):
        with ScriptedClient(server.address) as client:
            client.send("which?")
            client.expect(str(number))
    for callback in callbacks:
        callback.wait_for("on_close")
        assert len(callback.named("on_open")) == 1


def test_one_callback_object_serves_two_servers(ps_server: ServerFactory) -> None:
    callback = echo()
    first, second = ps_server(callback), ps_server(callback)
    assert_serves(first)
    assert_serves(second)
    callback.wait_for("on_close", 2)
    assert [event.session.owner for event in callback.named("on_open") if event.session] == [
        first,
        second,
    ]


def test_host_may_be_a_name(ps_server: ServerFactory) -> None:
    assert_serves(ps_server(echo(), host="localhost"))


def test_server_can_be_reached_when_start_returns() -> None:
    """The kernel answers, before the hub has run once more."""
    server = local_server(echo())
    server.start()
    try:
        with native_clients(server.address, 1) as [client]:
            client.sendall(b"early")
            gevent.sleep(0)
            eventually(lambda: server.get_session_count() == 1)
            gevent.socket.wait_read(client.fileno(), timeout=5.0)
            assert client.recv(100) == b"early"
    finally:
        server.shutdown()


# What start refuses


def test_port_in_use_is_an_error_that_names_it() -> None:
    with listening() as (host, port):
        server = PsServer(PsCallback(), host=host, port=port)
        with pytest.raises(PsServerError, match=rf"{host}:{port}.*in use") as refused:
            server.start()
    cause = refused.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.EADDRINUSE
    assert not server.started


def test_start_works_once_the_port_is_free() -> None:
    with listening() as (host, port):
        server = PsServer(echo(), host=host, port=port)
        with pytest.raises(PsServerError):
            server.start()
    with server:
        assert server.address == (host, port)
        assert_serves(server)


def test_port_of_another_server_of_ours_is_in_use(ps_server: ServerFactory) -> None:
    first = ps_server(echo())
    second = PsServer(PsCallback(), host=LOOPBACK, port=first.address[1])
    with pytest.raises(PsServerError, match="in use"):
        second.start()
    assert_serves(first)


def test_host_that_is_not_ours_is_an_error_that_names_it() -> None:
    server = PsServer(PsCallback(), host=NOT_OURS, port=0)
    with pytest.raises(PsServerError, match=rf"{NOT_OURS}.*not an address of this machine"):
        server.start()
    assert not server.started


def test_unknown_host_name_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def know_nothing(*_args: object) -> None:
        raise gevent.socket.gaierror(gevent.socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", know_nothing)
    server = PsServer(PsCallback(), host="no-such-host.example", port=0)
    with pytest.raises(PsServerError, match=r"no-such-host\.example.*not known"):
        server.start()
    assert not server.started


@pytest.mark.parametrize(
    "host",
    ["a" * 300, "a..b", "\udcff", "\N{SNOWMAN}" * 80],
    ids=["long label", "empty label", "surrogate", "long IDNA label"],
)
def test_host_that_cannot_be_a_name_is_an_error_and_prints_nothing(host: str) -> None:
    server = PsServer(PsCallback(), host=host, port=0)
    with pytest.raises(PsServerError, match="cannot listen on"):
        server.start()


def test_ipv6_host_on_the_ipv4_family_is_an_error_that_names_it() -> None:
    server = PsServer(PsCallback(), host="::1", port=0)
    with pytest.raises(PsServerError, match=r"\[::1\]:0"):
        server.start()


def ports_are_privileged() -> bool:
    first_free = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return not first_free.exists() or int(first_free.read_text()) > 1


@pytest.mark.skipif(not ports_are_privileged(), reason="every user may listen on port 1 here")
def test_privileged_port_is_an_error_that_names_it() -> None:
    outcome = run_python(
        """
        import os
        from psofa_gevent import PsCallback, PsServer, PsServerError

        # What gevent imports on first use may be in folders of root's.
        with PsServer(PsCallback(), host="127.0.0.1", port=0):
            pass
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            PsServer(PsCallback(), host="127.0.0.1", port=1).start()
        except PsServerError as error:
            print(error)
        if was_root:
            os.seteuid(0)  # for what is written at the end: coverage's data
        """
    )
    assert "127.0.0.1:1" in outcome.stdout
    assert "ermission" in outcome.stdout
    assert outcome.stderr == ""


def test_failed_start_runs_no_callback() -> None:
    callback = RecordingCallback()
    with pytest.raises(PsServerError):
        PsServer(callback, host=NOT_OURS, port=0).start()
    assert callback.events == []


def test_failed_start_logs_no_stop(caplog: pytest.LogCaptureFixture) -> None:
    """An operator who reads 'stopped' looks for the start that was before it."""
    with (
        caplog.at_level(logging.INFO, "psofa_gevent"),
        pytest.raises(PsServerError),
    ):
        PsServer(PsCallback(), host=NOT_OURS, port=0).start()
    assert caplog.messages == []


def test_failed_start_ends_the_wait_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving, answer = Event(), Event()

    def fail_late(*_args: object) -> None:
        resolving.set()
        answer.wait()
        raise gevent.socket.gaierror(gevent.socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("psofa_gevent.net.addresses.socket.getaddrinfo", fail_late)
    server = PsServer(PsCallback(), host="localhost", port=0)
    starter = gevent.spawn(pytest.raises, PsServerError, server.start)
    assert resolving.wait(5)
    waiter = gevent.spawn(server.wait_for, 20.0)
    gevent.idle()
    answer.set()
    starter.get(timeout=5)
    assert waiter.get(timeout=5) is True


# Dual-stack IPv6


@needs_ipv6
def test_ipv6_server_is_reached_by_ipv6(ps_server: ServerFactory) -> None:
    callback = echo()
    server = ps_server(callback, socket_address_family=IPV6)
    assert server.address[0] == "::1"
    assert_serves(server)
    [opened] = callback.named("on_open")
    assert opened.session is not None
    assert opened.session.remote_endpoint is not None
    assert opened.session.remote_endpoint[0] == "::1"


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "0.0.0.0"])
def test_ipv6_server_on_every_address_is_reached_by_both(
    ps_server: ServerFactory, host: str
) -> None:
    callback = echo()
    server = ps_server(callback, host=host, socket_address_family=IPV6)
    assert server.address[0] == "::"
    port = server.address[1]
    for loopback in (LOOPBACK, "::1"):
        with ScriptedClient((loopback, port)) as client:
            client.send(loopback)
            client.expect(loopback)
    remotes = {
        event.session.remote_endpoint[0]
        for event in callback.named("on_open")
        if event.session is not None and event.session.remote_endpoint is not None
    }
    assert remotes == {"::ffff:127.0.0.1", "::1"}


@needs_ipv6
def test_ipv4_host_on_the_ipv6_family_is_reached_by_ipv4(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), host=LOOPBACK, socket_address_family=IPV6)
    assert server.address[0] == "::ffff:127.0.0.1"
    with ScriptedClient((LOOPBACK, server.address[1])) as client:
        client.send("mapped")
        client.expect("mapped")


@pytest.mark.parametrize(
    ("host", "says"),
    [("::1", "needs socket_address_family"), ("/run/app.sock", "'unix:/run/app.sock'")],
)
def test_host_of_another_kind_is_an_error_that_says_what_would_be_right(
    host: str, says: str
) -> None:
    with pytest.raises(PsServerError, match=says):
        PsServer(PsCallback(), host=host).start()


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT])
def test_machine_without_ipv6_gets_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class OnlyIpv4(_SystemSocket):  # type: ignore[misc, valid-type]  # a class known at run time
        def __init__(self, family: int = -1, *args: Any, **kwargs: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(code, os.strerror(code))
            super().__init__(family, *args, **kwargs)

    monkeypatch.setattr(psofa_gevent.listening.sockets, "_SystemSocket", OnlyIpv4)
    server = PsServer(PsCallback(), host="::", port=0, socket_address_family=IPV6)
    with pytest.raises(PsServerError, match=r"\[::\]:0.*no IPv6"):
        server.start()
    assert not server.started
    with serving(echo()) as ipv4_server:
        assert_serves(ipv4_server)
