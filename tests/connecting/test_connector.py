"""Attempts to connect: names with many addresses, and those that fail and say why."""

from __future__ import annotations

import _socket
import errno
import socket
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import monkey
from gevent.event import Event

from clients import client_of, look_up
from helpers import LOOPBACK, black_hole, echo, free_port, takes
from psofa_gevent import PsCallback, PsClient, PsClientError, PsSession, PsSocketAddressFamily
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory

IPV6 = PsSocketAddressFamily.IPV6
UNREACHABLE = "224.0.0.1"
"""A multicast address: TCP cannot reach it on any machine, and the kernel says so at once."""


# Many addresses


def test_dead_first_address_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, ps_server: ServerFactory
) -> None:
    server = ps_server(echo())
    look_up(monkeypatch, lambda: ["127.0.0.2", UNREACHABLE, LOOPBACK])
    with client_of(("many.example", server.address[1])) as client:
        session = client.connect()
        assert session.remote_endpoint == server.address


def test_silent_first_address_gets_its_share_of_the_timeout_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with black_hole() as (_host, port), gevent.socket.socket() as listener:
        listener.bind(("127.0.0.2", port))
        listener.listen()
        look_up(monkeypatch, lambda: [LOOPBACK, "127.0.0.2"])
        with client_of(("many.example", port)) as client, takes(0.3, most=0.6):
            session = client.connect(timeout=1.0)
            assert session.remote_endpoint == ("127.0.0.2", port)


def test_all_addresses_dead_is_an_error_with_the_last_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    look_up(monkeypatch, lambda: [UNREACHABLE, "127.0.0.2", "127.0.0.3"])
    with (
        client_of(("many.example", port)) as client,
        pytest.raises(PsClientError, match=rf"many\.example:{port}.*refused"),
    ):
        client.connect()


def test_all_addresses_silent_is_a_timeout_within_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with black_hole() as (_host, port):
        look_up(monkeypatch, lambda: [LOOPBACK] * 3)
        with (
            client_of(("many.example", port)) as client,
            takes(0.2, most=0.3),
            pytest.raises(PsClientError, match=rf"many\.example:{port}.*timed out"),
        ):
            client.connect(timeout=0.3)


def test_name_without_an_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up(monkeypatch, list)
    with (
        client_of(("none.example", 1)) as client,
        pytest.raises(PsClientError, match=r"none\.example:1.*no address"),
    ):
        client.connect()


# Failing


def failed_connect(address: tuple[Any, ...], **arguments: Any) -> PsClientError:
    """Expect that connect fails, with host and port in the error; the client stays usable."""
    with client_of(address) as client:
        with pytest.raises(PsClientError) as failed:
            client.connect(**arguments)
        assert client.session is None
    host, port = address[:2]
    assert host in str(failed.value)
    assert str(port) in str(failed.value)
    return failed.value


def test_refused_says_host_port_and_cause() -> None:
    error = failed_connect((LOOPBACK, free_port()))
    assert "refused" in str(error)
    assert isinstance(error.__cause__, ConnectionRefusedError)


def test_unreachable_says_host_port_and_cause() -> None:
    error = failed_connect((UNREACHABLE, 9))
    assert "unreachable" in str(error)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == errno.ENETUNREACH


@pytest.mark.parametrize("timeout", [0, 0.001, 0.2, 1])
def test_timed_out_says_host_port_and_cause(timeout: float) -> None:
    with black_hole() as address, takes(timeout * 0.9, most=timeout):
        error = failed_connect(address, timeout=timeout)
    assert str(error).endswith(f"timed out after {timeout:g} s")


def test_of_several_endpoints_each_says_which_time_was_asked_for() -> None:
    with black_hole() as address:
        client = PsClient(PsCallback(), *address, endpoints=[address])
        with pytest.raises(PsClientError) as caught:
            client.connect(timeout=0.3)
    assert str(caught.value).count("timed out after its share of 0.3 s") == 2


def test_unknown_name_says_host_port_and_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def know_nothing() -> list[str]:
        raise gevent.socket.gaierror(gevent.socket.EAI_NONAME, "Name or service not known")

    look_up(monkeypatch, know_nothing)
    error = failed_connect(("no-such-host.example", 9))
    assert "not known" in str(error)
    assert isinstance(error.__cause__, gevent.socket.gaierror)


@pytest.mark.parametrize("host", ["a" * 300, "a..b", "\udcff"], ids=["long", "empty", "surrogate"])
def test_host_that_cannot_be_a_name_is_an_error_and_prints_nothing(host: str) -> None:
    failed_connect((host, 9))


def test_ipv6_target_on_the_ipv4_family_is_an_error_that_says_what_it_needs() -> None:
    assert "needs socket_address_family" in str(failed_connect(("::1", 9)))


def test_a_path_as_a_host_is_an_error_that_says_how_it_is_written() -> None:
    assert "'unix:/run/app.sock'" in str(failed_connect(("/run/app.sock", 9)))


def test_machine_without_ipv6_gets_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyIpv4(gevent.socket.socket):
        def __init__(self, family: int = -1, *args: Any, **kwargs: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *args, **kwargs)

    monkeypatch.setattr("psofa_gevent.connecting.connector.socket.socket", OnlyIpv4)
    with (
        client_of(("::1", 9), socket_address_family=IPV6) as client,
        pytest.raises(PsClientError, match=r"\[::1\]:9.*(no IPv6|family not supported)"),
    ):
        client.connect()


def test_slow_name_server_counts_into_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer_late() -> list[str]:
        gevent.sleep(60)
        return [LOOPBACK]

    look_up(monkeypatch, answer_late)
    with takes(0.2, most=0.2):
        error = failed_connect(("slow.example", 9), timeout=0.2)
    assert "timed out" in str(error)


def test_name_is_resolved_without_blocking_others(
    monkeypatch: pytest.MonkeyPatch, ps_server: ServerFactory
) -> None:
    """With a resolver that blocks its OS thread, as that of the C library does."""
    resolve = _socket.getaddrinfo
    block_thread = monkey.get_original("time", "sleep")

    def resolve_late(*args: Any) -> Any:
        block_thread(0.3)
        return resolve(*args)

    monkeypatch.setattr("_socket.getaddrinfo", resolve_late)
    server = ps_server(echo())
    with (
        client_of(("localhost", server.address[1])) as client,
        ScriptedClient(server.address) as other,
    ):
        connecting = gevent.spawn(client.connect)
        answers = 0
        while not connecting.ready():
            other.send("ping")
            other.expect("ping")
            answers += 1
        assert connecting.get().is_open
        assert answers > 5


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_client_does_not_connect_with_itself(host: str) -> None:
    """As TCP allows (RFC 9293, section 3.5), by chance too, where nobody listens."""
    port = free_port(host)
    family = PsSocketAddressFamily.IPV6 if ":" in host else PsSocketAddressFamily.IPV4
    client = PsClient(
        PsCallback(), host, port, source_address=(host, port), socket_address_family=family
    )
    with pytest.raises(PsClientError, match="Connection refused"):
        client.connect()
    assert not client.started


def test_failed_connect_leaves_a_client_that_can_connect(ps_server: ServerFactory) -> None:
    port = free_port()
    callback = RecordingCallback()
    with client_of((LOOPBACK, port), callback) as client:
        for _ in range(3):
            with pytest.raises(PsClientError, match="refused"):
                client.connect()
        ps_server(echo(), port=port)
        client.connect().send("at last")
        callback.wait_for("on_message")


def test_retry_in_a_callback_says_the_true_cause_each_time(ps_server: ServerFactory) -> None:
    """There disconnect would not wait, and must not leave the client in its hands."""

    class Callback(PsCallback):
        def on_open(self, session: PsSession) -> None:
            for _ in range(3):
                try:
                    client.connect()
                except PsClientError as error:
                    errors.append(str(error))
            done.set()

    errors: list[str] = []
    done = Event()
    with client_of((LOOPBACK, free_port())) as client:
        with ScriptedClient(ps_server(Callback()).address):
            assert done.wait(5)
        assert len(errors) == 3
        assert all("refused" in error for error in errors), errors
