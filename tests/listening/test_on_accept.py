"""``on_accept``: the application says who is let in, when the rules have nothing against it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent.event import Event

from admitting import HERE, Door, ask, counted_peers, is_closed, refusals
from helpers import close_reasons, echo, takes
from marks import sync_and_async
from proxy_headers import v1
from psofa_gevent import PsClient, PsCloseReason, PsHandler, PsMultiClient, PsRefusal, PsSession
from psofa_gevent.testing import ScriptedClient, ServerFactory, eventually


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
