"""The farewell of those who are refused: it reaches them, and holds up nobody."""

from __future__ import annotations

import contextlib
from typing import Any

import gevent
import pytest

from admitting import ask, refusals
from helpers import NativeThread, echo, local_server, takes
from marks import needs_libev_to_destroy
from proxy_headers import v1, v2
from psofa_gevent import PsRefusal
from psofa_gevent.listening import farewell as farewell_module
from psofa_gevent.testing import ScriptedClient, ServerFactory, eventually


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
