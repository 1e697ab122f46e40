"""Accepting: a full server lets clients wait, and so does one that was told to pause."""

from __future__ import annotations

from typing import Any

import gevent
import gevent.socket
import pytest
from gevent.event import Event

from helpers import NativeThread, echo, local_server
from psofa_gevent import PsCloseReason, PsSession
from psofa_gevent.testing import ClientFactory, RecordingCallback, ScriptedClient, ServerFactory
from reachable import assert_serves, native_clients

# The cap


class Counting(RecordingCallback):
    """An echo that notes the most sessions it ever saw at a time."""

    def __init__(self) -> None:
        super().__init__(lambda message: message)
        self.most = 0

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self.most = max(self.most, session.owner.get_session_count())


def test_at_the_cap_clients_wait_and_are_served_as_one_leaves(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=2)
    first, second, third = [ps_client(server) for _ in range(3)]
    callback.wait_for("on_open", 2)
    third.send("served at last")
    third.expect_nothing(0.1)
    assert server.get_session_count() == 2
    second.send("still here")
    second.expect("still here")
    first.close()
    third.expect("served at last")
    assert callback.most == 2


@pytest.mark.parametrize("cap", [1, 3])
def test_all_who_wait_at_the_cap_are_served_in_the_end(ps_server: ServerFactory, cap: int) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=cap)
    with native_clients(server.address, 40) as clients:
        for client in clients:
            client.sendall(b"hello")
        for number, client in enumerate(clients):
            gevent.socket.wait_read(client.fileno(), timeout=5.0)
            assert client.recv(100) == b"hello", number
            client.close()
    callback.wait_for("on_close", 40)
    assert callback.most == cap


def leave_by_fin(client: ScriptedClient, _session: PsSession) -> None:
    client.close()


def leave_by_reset(client: ScriptedClient, _session: PsSession) -> None:
    client.reset()


def leave_by_close(_client: ScriptedClient, session: PsSession) -> None:
    session.close()


def leave_by_abort(_client: ScriptedClient, session: PsSession) -> None:
    session.abort()


def leave_by_idleness(_client: ScriptedClient, session: PsSession) -> None:
    session.change_idle_milliseconds(1)


@pytest.mark.parametrize(
    "leave", [leave_by_fin, leave_by_reset, leave_by_close, leave_by_abort, leave_by_idleness]
)
def test_whichever_way_one_leaves_the_next_is_served(
    ps_server: ServerFactory, ps_client: ClientFactory, leave: Any
) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=1)
    first = ps_client(server)
    [opened] = callback.wait_for("on_open")
    second = ps_client(server)
    second.send("next")
    leave(first, opened.session)
    second.expect("next")
    assert callback.most == 1


@pytest.mark.logs_errors
def test_failing_on_open_frees_its_place(ps_server: ServerFactory) -> None:
    class Callback(Counting):
        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            if len(self.named("on_open")) <= 20:
                raise ZeroDivisionError

    callback = Callback()
    server = ps_server(callback, max_sessions=2)
    with native_clients(server.address, 20):
        callback.wait_for("on_close", 20)
    assert_serves(server)
    assert callback.most <= 2


def test_slow_on_close_takes_no_place(ps_server: ServerFactory) -> None:
    class Callback(Counting):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            go_on.wait()
            super().on_close(session, close_reason)

    go_on = Event()
    callback = Callback()
    server = ps_server(callback, max_sessions=1)
    for _ in range(3):
        assert_serves(server)
    assert callback.named("on_close") == []
    go_on.set()
    callback.wait_for("on_close", 3)


def test_pausing_at_the_cap_holds_when_one_leaves(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=1)
    first = ps_client(server)
    callback.wait_for("on_open")
    second = ps_client(server)
    second.send("next")
    second.expect_nothing(0.02)
    server.stop_accepting()
    first.close()
    callback.wait_for("on_close")
    second.expect_nothing(0.1)
    server.resume_accepting()
    second.expect("next")


def test_resuming_at_the_cap_does_not_exceed_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Counting()
    server = ps_server(callback, max_sessions=1)
    first = ps_client(server)
    callback.wait_for("on_open")
    second = ps_client(server)
    second.send("next")
    for _ in range(5):
        server.stop_accepting()
        server.resume_accepting()
        gevent.sleep(0.01)
    second.expect_nothing(0.05)
    assert server.get_session_count() == 1
    first.close()
    second.expect("next")
    assert callback.most == 1


def test_cap_counts_anew_after_a_restart() -> None:
    callback = Counting()
    server = local_server(callback, max_sessions=1)
    for _ in range(3):
        with server, ScriptedClient(server.address) as client:
            client.send("hello")
            client.expect("hello")
    assert callback.most == 1


# Stop and resume accepting


def test_paused_server_lets_clients_wait_and_serves_them_when_resumed(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = echo()
    server = ps_server(callback)
    before = ps_client(server)
    callback.wait_for("on_open")
    server.stop_accepting()
    waiting = [ps_client(server) for _ in range(5)]
    for client in waiting:
        client.send("hello")
    waiting[0].expect_nothing(0.1)
    before.send("still served")
    before.expect("still served")
    assert len(callback.named("on_open")) == 1
    assert server.started
    server.resume_accepting()
    for client in waiting:
        client.expect("hello")
    assert_serves(server)


def test_pause_takes_effect_at_once(ps_server: ServerFactory) -> None:
    """Also for those whom the hub would accept in its very next turn."""
    callback = echo()
    server = ps_server(callback)
    with native_clients(server.address, 3):
        server.stop_accepting()
        gevent.sleep(0.05)
        assert callback.named("on_open") == []
        server.resume_accepting()
        callback.wait_for("on_open", 3)


def test_one_who_waited_and_left_meanwhile_is_still_told_right(ps_server: ServerFactory) -> None:
    callback = echo()
    server = ps_server(callback)
    server.stop_accepting()
    with ScriptedClient(server.address) as client:
        client.send("last words")
    server.resume_accepting()
    [closed] = callback.wait_for("on_close")
    assert callback.received() == b"last words"
    # Nobody is there to take the echo: whichever the kernel tells first.
    assert closed.value in (PsCloseReason.PEER_CLOSE, PsCloseReason.FAILED)


def test_pausing_and_resuming_twice_is_the_same_as_once(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    server.stop_accepting()
    server.stop_accepting()
    server.resume_accepting()
    server.resume_accepting()
    assert_serves(server)


def test_pause_and_resume_without_a_turn_of_the_hub_between_them(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    server.stop_accepting()
    server.resume_accepting()
    assert_serves(server)
    server.stop_accepting()
    server.resume_accepting()
    server.stop_accepting()
    with ScriptedClient(server.address) as client:
        client.send("x")
        client.expect_nothing(0.1)
        server.resume_accepting()
        client.expect("x")


def test_pausing_a_server_that_is_not_started_has_no_effect() -> None:
    server = local_server(echo())
    server.stop_accepting()
    server.resume_accepting()
    server.stop_accepting()
    with server:
        assert_serves(server)
        server.stop_accepting()
    server.resume_accepting()
    server.stop_accepting()
    with server:
        assert_serves(server)


def test_pausing_in_on_start_begins_paused() -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            owner.stop_accepting()

    callback = Callback(lambda message: message)
    with local_server(callback) as server, ScriptedClient(server.address) as client:
        client.send("hello")
        client.expect_nothing(0.1)
        server.resume_accepting()
        client.expect("hello")


def test_another_thread_may_pause_and_resume(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    NativeThread(server.stop_accepting).join()
    with ScriptedClient(server.address) as client:
        client.send("hello")
        client.expect_nothing(0.1)
        NativeThread(server.resume_accepting).join()
        client.expect("hello")


def test_shutdown_of_a_paused_server_ends_its_sessions() -> None:
    callback = echo()
    with (
        local_server(callback) as server,
        ScriptedClient(server.address) as served,
    ):
        callback.wait_for("on_open")
        server.stop_accepting()
        with native_clients(server.address, 1):
            server.shutdown()
        served.expect_eof()
    assert len(callback.named("on_open")) == len(callback.named("on_close")) == 1
