"""`shutdown`: what it ends, in which time, and that every session hears of it.

The same `Shutdown` ends `PsClient.disconnect` and `PsMultiClient.destroy_bundle`. Callbacks that
run or hang are in test_shutdown_callbacks.py, and who may call it is in test_shutdown_callers.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import monkey

from hanging import (
    FOREVER,
    SECOND_BOUND,
    Hanging,
    HangingOnClose,
    HangingOnStop,
    Resisting,
    assert_all_closed,
    serving_clients,
)
from helpers import close_reasons, echo, living_greenlets, local_server, takes
from psofa_gevent import PsCloseReason, PsMultiClient, PsServer, PsSession
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")

sync_and_async = pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])


# Quiet sessions


@sync_and_async
def test_quiet_sessions_close_at_once_whatever_linger_timeout_is(use_async: bool) -> None:
    callback = RecordingCallback(use_async_callback=use_async)
    with serving_clients(callback, 20, linger_timeout=FOREVER) as (server, clients):
        with takes(most=0.5):
            server.shutdown(timeout=60)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 20)
        assert server.get_session_count() == 0
        for client in clients:
            client.expect_eof()


@pytest.mark.parametrize("timeout", [0, 0.0, None])
def test_quiet_sessions_get_their_on_close_with_any_timeout(timeout: float | None) -> None:
    callback = RecordingCallback()
    with serving_clients(callback, 20) as (server, clients):
        with takes(most=0.5):
            server.shutdown(timeout)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 20)
        for client in clients:
            client.expect_eof()


def test_shutdown_without_sessions_returns_at_once() -> None:
    callback = RecordingCallback()
    with local_server(callback) as server, takes(most=0.5):
        server.shutdown(timeout=None, drain=60)
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]


def test_shutdown_of_a_stopped_server_has_no_effect() -> None:
    callback = RecordingCallback()
    server = local_server(callback)
    server.shutdown()
    assert callback.events == []
    with server:
        pass
    server.shutdown()
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]


def test_shutdown_stops_listening_first() -> None:
    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            with pytest.raises(ConnectionRefusedError):
                ScriptedClient(address).close()
            self.was_refused = True

    callback = Callback()
    with serving_clients(callback, 1) as (server, _clients):
        address = server.address
        server.shutdown()
    assert callback.was_refused


@pytest.mark.usefixtures("many_descriptors")
def test_shutdown_of_1000_sessions_delivers_each_on_close() -> None:
    callback = RecordingCallback()
    with local_server(callback) as server, contextlib.ExitStack() as stack:
        for _ in range(1_000):
            client = stack.enter_context(_SystemSocket(socket.AF_INET, socket.SOCK_STREAM))
            client.connect(server.address)
            if server.get_session_count() % 100 == 0:
                gevent.sleep(0)
        callback.wait_for("on_open", 1_000, timeout=30)
        with takes(most=3):
            server.shutdown(timeout=30)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 1_000)
        assert server.get_session_count() == 0


# Drain


def test_sessions_go_on_while_drained_and_no_one_new_is_accepted() -> None:
    callback = echo()
    with serving_clients(callback, 2) as (server, [client, other]):
        address = server.address
        stopper = gevent.spawn(server.shutdown, 5, drain=30)
        eventually(lambda: not server.started)
        with pytest.raises(ConnectionRefusedError):
            ScriptedClient(address).close()
        for client_ in (client, other):
            client_.send("still here?")
            client_.expect("still here?")
        assert all(session.is_open for session in server.sessions)
        assert len(list(server.sessions)) == 2
        assert not stopper.dead
        server.shutdown(drain=0)
        stopper.get(timeout=5)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 2)


def test_drain_ends_when_the_last_session_has_left() -> None:
    callback = echo()
    with serving_clients(callback, 3) as (server, clients):
        stopper = gevent.spawn(server.shutdown, drain=60)
        eventually(lambda: not server.started)
        with takes(most=0.5):
            for client in clients:
                client.close()
            stopper.get(timeout=5)
        assert_all_closed(callback, PsCloseReason.PEER_CLOSE, 3)


def test_sessions_that_stay_are_closed_when_drain_is_over() -> None:
    callback = echo()
    with serving_clients(callback, 3) as (server, clients):
        stopper = gevent.spawn(server.shutdown, drain=0.3)
        eventually(lambda: not server.started)
        clients[0].close()
        with takes(0.2, most=0.3):
            stopper.get(timeout=5)
        reasons = Counter(close_reasons(callback))
        assert reasons == {PsCloseReason.PEER_CLOSE: 1, PsCloseReason.SHUTDOWN: 2}


def test_on_close_is_delivered_during_the_drain() -> None:
    callback = echo()
    with serving_clients(callback, 2) as (server, clients):
        stopper = gevent.spawn(server.shutdown, drain=60)
        eventually(lambda: not server.started)
        clients[0].close()
        callback.wait_for("on_close")
        assert not stopper.dead
        clients[1].close()
        stopper.get(timeout=5)


def test_timeout_starts_when_drain_ends() -> None:
    callback = Hanging()
    with serving_clients(callback, 1) as (server, [client]):
        client.send("hang")
        callback.wait_for("on_message")
        with takes(0.5, most=0.5):
            server.shutdown(timeout=0.2, drain=0.3)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 1)


def test_idle_sessions_time_out_during_the_drain() -> None:
    callback = echo()
    with serving_clients(callback, 2, idle_milliseconds=100) as (server, _clients):
        with takes(most=2.5):
            server.shutdown(drain=60)
        assert_all_closed(callback, PsCloseReason.TIMEOUT, 2)


# A second call


def test_all_who_call_wait_for_the_end() -> None:
    class Callback(RecordingCallback):
        def on_stop(self, owner: Any) -> None:
            gevent.sleep(0.1)
            super().on_stop(owner)

    callback = Callback()
    stops_seen: list[int] = []

    def shut_down(server: PsServer) -> None:
        server.shutdown()
        stops_seen.append(len(callback.named("on_stop")))

    with serving_clients(callback, 3) as (server, _clients):
        stoppers = [gevent.spawn(shut_down, server) for _ in range(10)]
        gevent.joinall(stoppers, timeout=5, raise_error=True)
    assert stops_seen == [1] * 10
    assert_all_closed(callback, PsCloseReason.SHUTDOWN, 3)


def test_second_call_may_shorten_the_drain() -> None:
    callback = echo()
    with serving_clients(callback, 2) as (server, _clients):
        stopper = gevent.spawn(server.shutdown, drain=60)
        eventually(lambda: not server.started)
        with takes(0.1, most=0.2):
            server.shutdown(drain=0.1)
        stopper.get(timeout=1)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 2)


def test_second_call_may_shorten_the_timeout() -> None:
    callback = Hanging()
    with serving_clients(callback, 2) as (server, clients):
        clients[0].send("hang")
        callback.wait_for("on_message")
        stopper = gevent.spawn(server.shutdown, None)
        eventually(lambda: not server.started)
        with takes(0.1, most=0.2):
            server.shutdown(timeout=0.1)
        stopper.get(timeout=1)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 2)


def test_second_call_during_the_drain_shortens_what_comes_after_it() -> None:
    callback = Hanging()
    with serving_clients(callback, 1) as (server, [client]):
        client.send("hang")
        callback.wait_for("on_message")
        stopper = gevent.spawn(server.shutdown, None, drain=0.3)
        eventually(lambda: not server.started)
        with takes(0.2, most=0.5):
            server.shutdown(timeout=0.1, drain=60)
        stopper.get(timeout=1)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 1)


@pytest.mark.parametrize("longer", [{"timeout": None}, {"timeout": 60}])
def test_second_call_cannot_lengthen_the_timeout(longer: dict[str, Any]) -> None:
    callback = Hanging()
    with serving_clients(callback, 1) as (server, [client]):
        client.send("hang")
        callback.wait_for("on_message")
        with takes(0.2, most=0.3):
            stopper = gevent.spawn(server.shutdown, 0.3)
            eventually(lambda: not server.started)
            server.shutdown(**longer)
        stopper.get(timeout=1)


def test_second_call_cannot_lengthen_the_drain() -> None:
    callback = echo()
    with serving_clients(callback, 1) as (server, _clients):
        with takes(0.1, most=0.3):
            stopper = gevent.spawn(server.shutdown, drain=0.3)
            eventually(lambda: not server.started)
            server.shutdown(drain=60)
        stopper.get(timeout=1)


def test_second_call_ends_a_hanging_on_close() -> None:
    callback = HangingOnClose()
    with serving_clients(callback, 3) as (server, _clients):
        stopper = gevent.spawn(server.shutdown, None)
        callback.wait_for("on_close")
        with takes(most=0.1 + SECOND_BOUND):
            server.shutdown(timeout=0.1)
        stopper.get(timeout=1)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 3)


def test_second_call_ends_a_hanging_on_stop() -> None:
    callback = HangingOnStop()
    with local_server(callback) as server:
        stopper = gevent.spawn(server.shutdown, None)
        callback.wait_for("on_stop")
        with takes(most=0.1 + SECOND_BOUND):
            server.shutdown(timeout=0.1)
        stopper.get(timeout=1)


def test_caller_that_gives_up_waiting_does_not_stop_the_shutdown() -> None:
    callback = Resisting(1)
    with serving_clients(callback, 1) as (server, [client]):
        client.send("take your time")
        callback.wait_for("on_message")
        with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
            server.shutdown(None)
        assert not server.started
        assert server.wait_for(0) is False
        callback.go_on.set()
        assert server.wait_for(5) is True
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 1)


# Connections that have not begun


@pytest.mark.parametrize("turns", range(6))
def test_connections_that_were_not_started_get_neither_on_open_nor_on_close(turns: int) -> None:
    """However far the hub has come with them when the shutdown begins."""
    callback = RecordingCallback()
    with local_server(callback) as server, contextlib.ExitStack() as stack:
        clients = []
        for _ in range(250):
            client = stack.enter_context(_SystemSocket(socket.AF_INET, socket.SOCK_STREAM))
            client.settimeout(5.0)
            client.connect(server.address)
            clients.append(client)
        for _ in range(turns):
            gevent.sleep(0)
        server.shutdown()
        opened = [event.session for event in callback.named("on_open")]
        closed = [event.session for event in callback.named("on_close")]
        assert Counter(opened) == Counter(closed)
        assert server.get_session_count() == 0
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""


def test_those_that_wait_at_the_cap_are_reset_unheard() -> None:
    callback = RecordingCallback()
    with local_server(callback, max_sessions=1) as server, contextlib.ExitStack() as stack:
        first, *waiting = [stack.enter_context(ScriptedClient(server.address)) for _ in range(5)]
        callback.wait_for("on_open")
        for client in waiting:
            client.send("hello")
        server.shutdown()
        first.expect_eof()
        for client in waiting:
            client.expect_reset()
    assert_all_closed(callback, PsCloseReason.SHUTDOWN, 1)


def test_those_that_close_while_the_shutdown_begins_get_one_on_close() -> None:
    callback = RecordingCallback()
    with serving_clients(callback, 100) as (server, clients):
        for client in clients[:30]:
            client.close()
        for client in clients[30:50]:
            client.reset()
        for session in list(server.sessions)[50:70]:
            session.close()
        for session in list(server.sessions)[-10:]:
            session.abort()
        server.shutdown()
        assert len(close_reasons(callback)) == 100
        assert callback.events[-1].name == "on_stop"


# What is left afterwards


def descriptors() -> set[str]:
    folder = Path("/proc/self/fd")
    return set(os.listdir(folder if folder.is_dir() else "/dev/fd"))


@sync_and_async
def test_nothing_is_left_in_the_moment_in_which_shutdown_returns(use_async: bool) -> None:
    def use(count: int) -> None:
        callback = RecordingCallback(lambda message: message, use_async_callback=use_async)
        with local_server(callback) as server, contextlib.ExitStack() as stack:
            for _ in range(count):
                client = stack.enter_context(ScriptedClient(server.address))
                client.send("hello")
                client.expect("hello")
            inside = descriptors()
            server.shutdown()
            left.append((living_greenlets() - before, descriptors() - outside, loop.activecnt))
            assert len(inside - descriptors()) == count + 1

    loop = gevent.get_hub().loop
    left: list[tuple[set[Any], set[str], int]] = []
    before: set[Any] = set()
    outside: set[str] = set()
    use(1)  # the asyncio loop belongs to the hub and stays
    left.clear()
    before, outside, active = living_greenlets(), descriptors(), loop.activecnt
    use(20)
    [(greenlets, opened, active_then)] = left
    assert greenlets == set()
    assert len(opened) == 20, "the clients' own ends"
    assert active_then <= active


@pytest.mark.logs_errors
def test_nothing_is_left_after_callbacks_were_killed() -> None:
    before, opened = living_greenlets(), descriptors()
    callback = Resisting(2)
    with serving_clients(callback, 4) as (server, clients):
        for client in clients[:2]:
            client.send("resist")
        callback.wait_for("on_message", 2)
        server.shutdown(timeout=0.1)
        assert living_greenlets() - before == set()
    assert descriptors() - opened == set()


def test_start_and_shutdown_many_times_leaves_nothing() -> None:
    callback = RecordingCallback(lambda message: message)
    server = local_server(callback)
    counts: list[tuple[int, int, int]] = []
    for _ in range(20):
        with server, ScriptedClient(server.address) as client:
            client.send("hello")
            client.expect("hello")
        assert not server.started
        counts.append(
            (len(living_greenlets()), len(descriptors()), gevent.get_hub().loop.activecnt)
        )
    assert len(set(counts[1:])) == 1, counts
    assert len(close_reasons(callback)) == 20


# Disconnect and destroy keep the same promises


@sync_and_async
def test_destroy_bundle_ends_hanging_callbacks_within_the_bounds(use_async: bool) -> None:
    callback = Hanging(use_async_callback=use_async)
    greeter = RecordingCallback()
    with serving_clients(greeter, 0) as (server, _clients):
        bundle = PsMultiClient(callback)
        bundle.init_bundle()
        for _ in range(5):
            bundle.connect(*server.address)
        for event in greeter.wait_for("on_open", 5)[:3]:
            assert event.session is not None
            event.session.send("hang")
        callback.wait_for("on_message", 3)
        with takes(0.2, most=0.2 + SECOND_BOUND):
            bundle.destroy_bundle(timeout=0.2)
        assert_all_closed(callback, PsCloseReason.SELF_CLOSE, 5)
        assert bundle.get_session_count() == 0
