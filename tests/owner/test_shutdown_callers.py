"""Shutdown from everywhere (design, points 7 and 8): callbacks, coroutines, the hub.

None of these calls may deadlock on itself: where the caller is something that the shutdown has to
wait for, it returns at once, and the work goes on.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import gevent
import pytest

from hanging import SECOND_BOUND, Hanging, assert_all_closed, serving_clients
from helpers import (
    NativeThread,
    ScriptedServer,
    close_reasons,
    living_greenlets,
    local_server,
    takes,
)
from marks import sync_and_async
from psofa_gevent import PsClient, PsCloseReason, PsMultiClient, PsServer, PsSession, run_coroutine
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)
from stopping import METHODS, SOON, StopsIn, expect_one_life_each, provoke


@sync_and_async
@pytest.mark.parametrize("method", METHODS)
def test_shutdown_in_a_callback_returns_at_once_and_goes_on(
    method: str, use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = StopsIn(method, use_async_callback=use_async_callback)
    server = ps_server(callback, allow_half_open=True)
    callback.stop = server.shutdown
    client = ps_client(server)
    opened = callback.wait_for("on_open")[0].session
    assert opened is not None
    provoke(method, client, opened, server.shutdown)
    assert server.wait_for(SOON)
    expect_one_life_each(callback, 1)
    # It had returned before the things that come after the callback.
    after = METHODS[METHODS.index(method) + 1 :] if method in ("on_close", "on_stop") else []
    assert callback.returned
    assert not set(callback.returned[0]) & set(after)
    server.start()  # and all is as new
    server.shutdown()


@sync_and_async
@pytest.mark.parametrize("method", METHODS)
def test_disconnect_of_a_client_in_a_callback_returns_at_once_and_goes_on(
    method: str, use_async_callback: bool
) -> None:
    callback = StopsIn(method, use_async_callback=use_async_callback)
    with ScriptedServer() as listener:
        client = PsClient(callback, *listener.address, allow_half_open=True)
        callback.stop = client.disconnect
        session = client.connect()
        provoke(method, listener.accept(), session, client.disconnect)
        callback.wait_for("on_stop")
        client.disconnect()
        expect_one_life_each(callback, 1)
        assert callback.named("on_close")[0].value is PsCloseReason.SELF_CLOSE
        assert len(callback.returned) == 1
        client.connect()
        client.disconnect()


@sync_and_async
@pytest.mark.parametrize("method", METHODS)
def test_destroy_bundle_in_a_callback_returns_at_once_and_goes_on(
    method: str, use_async_callback: bool
) -> None:
    callback = StopsIn(method, use_async_callback=use_async_callback)
    with ScriptedServer() as listener:
        bundle = PsMultiClient(callback, allow_half_open=True)
        callback.stop = bundle.destroy_bundle
        bundle.init_bundle()
        session = bundle.connect(*listener.address).session
        provoke(method, listener.accept(), session, bundle.destroy_bundle)
        callback.wait_for("on_stop")
        bundle.destroy_bundle()
        expect_one_life_each(callback, 1)
        assert len(callback.returned) == 1
        bundle.init_bundle()
        bundle.destroy_bundle()


def test_shutdown_in_a_greenlet_that_a_callback_spawned_waits_for_the_end(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    seen: list[str] = []

    class Spawns(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            gevent.spawn(self.shut_down)

        def shut_down(self) -> None:
            server.shutdown()
            seen.append(self.events[-1].name)

    callback = Spawns()
    server = ps_server(callback)
    ps_client(server).send("x")
    eventually(lambda: seen)
    assert seen == ["on_stop"]


def test_shutdown_in_a_coroutine_outside_a_callback_returns_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    callback.wait_for("on_open")

    async def shut_down() -> bool:
        server.shutdown()
        still_stopping = not callback.named("on_stop")
        await asyncio.sleep(0)
        return still_stopping

    assert run_coroutine(shut_down()) is True
    assert server.wait_for(SOON)
    expect_one_life_each(callback, 1)


def test_shutdown_in_the_hub_returns_at_once_and_goes_on(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    callback.wait_for("on_open")
    gevent.get_hub().loop.run_callback(server.shutdown)
    assert server.wait_for(SOON)
    expect_one_life_each(callback, 1)


def test_disconnect_in_the_hub_returns_at_once_and_goes_on() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as listener:
        client = PsClient(callback, *listener.address)
        client.connect()
        gevent.get_hub().loop.run_callback(client.disconnect)
        callback.wait_for("on_stop")
        client.disconnect()
        expect_one_life_each(callback, 1)


def test_shutdown_from_everywhere_at_once_stops_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = StopsIn("on_message")
    server = ps_server(callback)
    callback.stop = server.shutdown
    clients = [ps_client(server) for _ in range(10)]
    callback.wait_for("on_open", 10)
    for client in clients:
        client.send("x")
    greenlets = [gevent.spawn(server.shutdown) for _ in range(3)]
    threads = [NativeThread(server.shutdown) for _ in range(3)]
    gevent.get_hub().loop.run_callback(server.shutdown)
    server.shutdown()
    gevent.joinall(greenlets, timeout=SOON, raise_error=True)
    for thread in threads:
        thread.join(SOON)
    expect_one_life_each(callback, 10)


def test_two_servers_that_shut_each_other_down_both_stop(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callbacks = [StopsIn("on_message"), StopsIn("on_message")]
    servers = [ps_server(callback) for callback in callbacks]
    callbacks[0].stop, callbacks[1].stop = servers[1].shutdown, servers[0].shutdown
    clients = [ps_client(server) for server in servers]
    for callback in callbacks:
        callback.wait_for("on_open")
    for client in clients:
        client.send("x")
    for server, callback in zip(servers, callbacks, strict=True):
        assert server.wait_for(SOON)
        expect_one_life_each(callback, 1)


@pytest.mark.parametrize("method", ["on_close", "on_stop"])
def test_two_servers_that_shut_each_other_down_at_the_end_both_stop(
    method: str, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callbacks = [StopsIn(method), StopsIn(method)]
    servers = [ps_server(callback) for callback in callbacks]
    callbacks[0].stop, callbacks[1].stop = servers[1].shutdown, servers[0].shutdown
    for server in servers:
        ps_client(server)
    for callback in callbacks:
        callback.wait_for("on_open")
    servers[0].shutdown()
    for server, callback in zip(servers, callbacks, strict=True):
        assert server.wait_for(SOON)
        expect_one_life_each(callback, 1)


# What comes of it


class CallsShutdown(RecordingCallback):
    """Calls shutdown in one of its methods, which must return at once, and notes that it did."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method
        self.returned = False

    def _call(self, method: str, owner: Any) -> None:
        if method == self._method:
            with takes(most=0):
                owner.shutdown(timeout=20)
            self.returned = True

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self._call("on_open", session.owner)

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        self._call("on_message", session.owner)
        session.send("shutting down")

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        self._call("on_close", session.owner)

    def on_stop(self, owner: Any) -> None:
        super().on_stop(owner)
        self._call("on_stop", owner)


@pytest.mark.parametrize("method", ["on_open", "on_message", "on_close", "on_stop"])
def test_shutdown_in_a_callback_returns_at_once_and_works(method: str) -> None:
    callback = CallsShutdown(method)
    with local_server(callback) as server:
        with ScriptedClient(server.address) as client:
            callback.wait_for("on_open")
            if method == "on_message":
                client.send("shut down")
                client.expect("shutting down")
            elif method == "on_close":
                client.close()
            elif method == "on_stop":
                server.shutdown()
            assert server.wait_for(5) is True
            if method != "on_close":
                client.expect_eof()
        assert callback.returned
        assert len(close_reasons(callback)) == len(callback.named("on_open"))
        assert callback.events[-1].name == "on_stop"


def test_shutdown_in_the_hub_returns_at_once_and_works() -> None:
    callback = RecordingCallback()
    with serving_clients(callback, 3) as (server, _clients):
        gevent.get_hub().loop.run_callback(server.shutdown)
        assert server.wait_for(5) is True
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 3)


def test_shutdown_in_a_coroutine_returns_at_once_and_works() -> None:
    class Callback(RecordingCallback):
        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            await super().on_message_async(session, message)
            assert isinstance(session.owner, PsServer)
            session.owner.shutdown(timeout=20)
            await session.send_async("shutting down")

    callback = Callback(use_async_callback=True)
    with serving_clients(callback, 2) as (server, [client, _other]):
        client.send("shut down")
        client.expect("shutting down")
        assert server.wait_for(5) is True
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 2)


def test_shutdown_in_another_thread_returns_after_the_last_callback() -> None:
    callback = RecordingCallback()

    def shut_down() -> int:
        server.shutdown()
        return len(callback.named("on_stop"))

    with serving_clients(callback, 3) as (server, _clients):
        assert NativeThread(shut_down).wait() == 1
        assert not server.started
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 3)


def test_callback_that_waits_for_the_shutdown_it_began_elsewhere_is_ended() -> None:
    """Each waits for the other: the timeout resolves it."""

    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            assert isinstance(session.owner, PsServer)
            gevent.spawn(session.owner.shutdown, 0.2).join()

    callback = Callback()
    with serving_clients(callback, 2) as (server, clients):
        clients[0].send("shut down")
        with takes(0.2, most=0.2 + SECOND_BOUND):
            assert server.wait_for(20) is True
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 2)


@pytest.mark.logs_errors
@pytest.mark.parametrize("drain", [0.0, 0.3])
def test_stranger_that_kills_all_greenlets_does_not_stop_the_shutdown(drain: float) -> None:
    before = living_greenlets()
    callback = Hanging()
    with serving_clients(callback, 6) as (server, clients):
        clients[0].send("hang")
        callback.wait_for("on_message")
        gevent.get_hub().loop.run_callback(partial(server.shutdown, 0.5, drain=drain))
        for _ in range(4):
            gevent.sleep(0.01)
            gevent.killall(list(living_greenlets() - before), block=False)
        assert server.wait_for(10) is True
        assert len(close_reasons(callback)) == len(callback.named("on_open")) == 6
        assert callback.events[-1].name == "on_stop"
        assert len(callback.named("on_stop")) == 1
