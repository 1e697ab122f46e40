"""`PsClient`: one connection, made again and again.

Attempts that fail, and names with many addresses, are in tests/connecting.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import Any

import gevent
import pytest
from gevent.event import Event

from clients import client_of, look_up
from helpers import (
    LOOPBACK,
    NativeThread,
    ScriptedServer,
    black_hole,
    echo,
    free_port,
    run_python,
    takes,
)
from marks import needs_ipv6, needs_libev_to_destroy
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsSession,
    PsSocketAddressFamily,
)
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually

IPV6 = PsSocketAddressFamily.IPV6


# Connecting


def test_connect_returns_an_open_session_that_talks(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    callback = RecordingCallback()
    with client_of(server.address, callback) as client:
        session = client.connect()
        assert session.is_open
        assert client.session is session
        assert session.owner is client
        assert session.remote_endpoint == server.address
        session.send("hello")
        callback.wait_for("on_message")
        assert callback.received() == b"hello"
        assert [event.name for event in callback.events] == ["on_start", "on_open", "on_message"]
        [there] = server.sessions
        assert there.remote_endpoint == session.local_endpoint


def test_host_may_be_a_name(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    with client_of(("localhost", server.address[1])) as client:
        assert client.connect().is_open


def test_chosen_connection_id_shows_in_the_session_and_its_callbacks(
    ps_server: ServerFactory,
) -> None:
    chosen = uuid.uuid4()
    callback = RecordingCallback()
    with client_of(ps_server(echo()).address, callback) as client:
        session = client.connect(chosen)
        assert session.connection_id == chosen
        [opened] = callback.wait_for("on_open")
        assert opened.session is session
        client.disconnect()
        assert session.connection_id == chosen
        assert str(chosen) in repr(session)


def test_connection_ids_are_random_unless_chosen(ps_server: ServerFactory) -> None:
    server = ps_server(echo())
    with client_of(server.address) as first, client_of(server.address) as second:
        ids = {first.connect().connection_id, second.connect().connection_id}
        first.disconnect()
        ids.add(first.connect().connection_id)
    assert len(ids) == 3


@needs_ipv6
def test_ipv6_client_reaches_ipv6_and_ipv4_servers(ps_server: ServerFactory) -> None:
    for server in (ps_server(echo(), socket_address_family=IPV6), ps_server(echo())):
        callback = RecordingCallback()
        with client_of(server.address, callback, socket_address_family=IPV6) as client:
            client.connect().send("hello")
            callback.wait_for("on_message")


@needs_ipv6
def test_ipv4_client_reaches_a_dual_stack_server(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), host="0.0.0.0", socket_address_family=IPV6)
    callback = RecordingCallback()
    with client_of((LOOPBACK, server.address[1]), callback) as client:
        client.connect().send("hello")
        callback.wait_for("on_message")


def test_with_connects_on_entry_and_disconnects_on_exit(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    address = ps_server(echo()).address
    with PsClient(callback, *address) as client:
        assert client.session is not None
        callback.wait_for("on_open")
    assert [event.name for event in callback.events] == [
        "on_start",
        "on_open",
        "on_close",
        "on_stop",
    ]


def test_repr_tells_target_and_state(ps_server: ServerFactory) -> None:
    host, port = ps_server(echo()).address
    with client_of((host, port)) as client:
        assert repr(client) == f"<PsClient {host}:{port} disconnected>"
        client.connect()
        assert repr(client) == f"<PsClient {host}:{port} connected>"


def test_connect_without_a_timeout_works(ps_server: ServerFactory) -> None:
    with client_of(ps_server(echo()).address) as client:
        assert client.connect(timeout=None).is_open


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_peer_that_leaves_at_once_gives_an_error_or_a_whole_session(reset: bool) -> None:
    callback = RecordingCallback()

    def leave() -> None:
        for _ in range(20):
            peer = server.accept()
            (peer.reset if reset else peer.close)()

    with ScriptedServer() as server, client_of(server.address, callback) as client:
        leaving = gevent.spawn(leave)
        for count in range(1, 21):
            with contextlib.suppress(PsClientError):
                client.connect()
            eventually(lambda: client.session is None)
            opened = len(callback.named("on_open"))
            callback.wait_for("on_close", opened)
            assert opened <= count
        leaving.get(timeout=5)
        assert len(callback.named("on_close")) == len(callback.named("on_open"))
        ours = PsCloseReason.FAILED if reset else PsCloseReason.PEER_CLOSE
        assert {event.value for event in callback.named("on_close")} <= {ours}


# A second connect


def test_connect_while_connected_is_an_error_and_changes_nothing(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(echo())
    callback = RecordingCallback()
    with client_of(server.address, callback) as client:
        session = client.connect()
        with pytest.raises(PsClientError, match="already"):
            client.connect()
        assert client.session is session
        session.send("still here")
        callback.wait_for("on_message")
        assert len(callback.named("on_open")) == 1
        assert server.get_session_count() == 1


def test_connect_while_connecting_is_an_error_and_the_first_goes_on() -> None:
    callback = RecordingCallback()
    with black_hole() as address, client_of(address, callback) as client:
        first = gevent.spawn(pytest.raises, PsClientError, client.connect, timeout=0.3)
        callback.wait_for("on_start")
        with pytest.raises(PsClientError, match="already"):
            client.connect()
        assert "timed out" in str(first.get(timeout=5).value)


class SlowOnStart(RecordingCallback):
    def __init__(self) -> None:
        super().__init__()
        self.go_on = Event()

    def on_start(self, owner: Any) -> None:
        super().on_start(owner)
        self.go_on.wait()


def test_connect_while_on_start_runs_is_an_error(ps_server: ServerFactory) -> None:
    callback = SlowOnStart()
    with client_of(ps_server(echo()).address, callback) as client:
        first = gevent.spawn(client.connect)
        callback.wait_for("on_start")
        with pytest.raises(PsClientError):
            client.connect(timeout=1)
        callback.go_on.set()
        assert client.session is None or first.ready()
        session = first.get(timeout=5)
        assert client.session is session
        assert client.get_session_count() == 1
        callback.wait_for("on_open")
        assert [event.name for event in callback.events] == ["on_start", "on_open"]


def test_connect_in_on_start_is_an_error(ps_server: ServerFactory) -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            with pytest.raises(PsClientError):
                owner.connect(timeout=1)

    callback = Callback()
    with client_of(ps_server(echo()).address, callback) as client:
        client.connect()
        assert client.get_session_count() == 1
        assert len(callback.named("on_start")) == 1


def test_connect_works_again_after_disconnect(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    with client_of(ps_server(echo()).address, callback) as client:
        for count in range(1, 4):
            client.connect().send("hello")
            callback.wait_for("on_message", count)
            client.disconnect()
            assert client.session is None
        assert [event.value for event in callback.named("on_close")] == [
            PsCloseReason.SELF_CLOSE
        ] * 3
        assert len(callback.named("on_start")) == len(callback.named("on_stop")) == 3


def test_connect_works_again_after_the_peer_closed() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        for count in range(1, 4):
            session = client.connect()
            server.accept().close()
            callback.wait_for("on_close", count)
            assert client.session is None
            assert not session.is_open
    assert [event.value for event in callback.named("on_close")] == [PsCloseReason.PEER_CLOSE] * 3


def test_connect_works_in_on_close() -> None:
    class Reconnects(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            if close_reason is PsCloseReason.PEER_CLOSE:
                assert isinstance(session.owner, PsClient)
                self.again = session.owner.connect()

    callback = Reconnects()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        first = client.connect()
        server.accept().close()
        peer = server.accept()
        callback.wait_for("on_open", 2)
        assert client.session is callback.again
        assert callback.again is not first
        peer.send("welcome back")
        callback.wait_for("on_message")


def test_connect_works_as_soon_as_the_session_is_closing() -> None:
    """The last one may linger still: `session` is None by then, and says that it may be made."""
    callback = RecordingCallback()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        first = client.connect()
        server.accept()
        first.close()
        assert [client.session] == [None]
        second = client.connect()
        assert client.session is second
        callback.wait_for("on_close")
        assert second.is_open
        client.disconnect()
        assert len(callback.named("on_close")) == 2


# Disconnecting


def test_disconnect_returns_after_on_close_and_on_stop(ps_server: ServerFactory) -> None:
    class Slow(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            gevent.sleep(0.05)
            super().on_close(session, close_reason)

        def on_stop(self, owner: Any) -> None:
            gevent.sleep(0.05)
            super().on_stop(owner)

    callback = Slow()
    with client_of(ps_server(echo()).address, callback) as client:
        client.connect()
        client.disconnect()
        [closed, stopped] = callback.events[-2:]
        assert closed.value is PsCloseReason.SELF_CLOSE
        assert stopped.name == "on_stop"
        assert client.session is None
        assert client.get_session_count() == 0


def test_connect_and_disconnect_at_once_still_runs_on_open_and_on_close(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    with client_of(ps_server(echo()).address, callback) as client:
        for _ in range(10):
            client.connect()
            client.disconnect()
    names = ["on_start", "on_open", "on_close", "on_stop"] * 10
    assert [event.name for event in callback.events] == names


def test_all_that_was_sent_arrives_before_the_disconnect() -> None:
    with ScriptedServer() as server, client_of(server.address) as client:
        session = client.connect()
        peer = server.accept()
        peer.send("unread by the client")
        reading = gevent.spawn(peer.receive_until_eof)
        session.send(b"x" * 1_000_000)
        client.disconnect()
        assert reading.get(timeout=5) == b"x" * 1_000_000


def test_disconnect_without_a_connection_has_no_effect() -> None:
    callback = RecordingCallback()
    client = PsClient(callback, LOOPBACK, 9)
    client.disconnect()
    client.disconnect(timeout=None)
    assert callback.events == []


def test_disconnect_after_the_peer_closed_runs_on_stop_once() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        client.connect()
        server.accept().close()
        callback.wait_for("on_close")
        client.disconnect()
        client.disconnect()
        assert [event.name for event in callback.events] == [
            "on_start",
            "on_open",
            "on_close",
            "on_stop",
        ]


def test_all_who_disconnect_wait_for_the_one_end() -> None:
    callback = RecordingCallback()
    ends_seen: list[int] = []

    def disconnect() -> None:
        client.disconnect()
        ends_seen.append(len(callback.named("on_stop")))

    with ScriptedServer() as server, client_of(server.address, callback) as client:
        client.connect()
        gevent.joinall([gevent.spawn(disconnect) for _ in range(5)], timeout=5, raise_error=True)
    assert ends_seen == [1] * 5
    assert len(callback.named("on_close")) == 1


def test_disconnect_while_the_peer_closes_gives_one_on_close() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        for count in range(1, 6):
            client.connect()
            server.accept().close()
            client.disconnect()
            assert len(callback.named("on_close")) == len(callback.named("on_stop")) == count


def test_connect_in_on_stop_is_an_error() -> None:
    class Callback(RecordingCallback):
        def on_stop(self, owner: Any) -> None:
            super().on_stop(owner)
            with pytest.raises(PsClientError):
                owner.connect(timeout=1)
            self.was_refused = True

    callback = Callback()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        client.connect()
        client.disconnect()
        assert callback.was_refused
        assert client.session is None


def test_disconnect_in_a_callback_returns_at_once() -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            assert isinstance(session.owner, PsClient)
            session.owner.disconnect(timeout=20)
            self.returned = time.monotonic()

    callback = Callback()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        client.connect()
        peer = server.accept()
        peer.send("go")
        with takes(most=1):
            peer.expect_eof()
            [stopped] = callback.wait_for("on_stop")
        assert stopped.value is client
        assert [event.value for event in callback.named("on_close")] == [PsCloseReason.SELF_CLOSE]


def test_disconnect_of_a_hanging_callback_returns_within_the_bounds() -> None:
    class Hanging(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            gevent.sleep(60)

    callback = Hanging()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        client.connect()
        callback.wait_for("on_open")
        with takes(0.2, most=0.2):
            client.disconnect(timeout=0.2)
        assert [event.value for event in callback.named("on_close")] == [PsCloseReason.SELF_CLOSE]


def test_disconnect_during_connect_ends_the_attempt() -> None:
    callback = RecordingCallback()
    with black_hole() as address, client_of(address, callback) as client:
        connecting = gevent.spawn(pytest.raises, PsClientError, client.connect, timeout=30)
        callback.wait_for("on_start")
        with takes(most=0.5):
            client.disconnect()
            failed = connecting.get(timeout=5)
        assert str(address[1]) in str(failed.value)
        assert "disconnected" in str(failed.value)
        assert [event.name for event in callback.events] == ["on_start", "on_stop"]


def test_disconnect_while_the_name_is_looked_up_ends_the_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer_late() -> list[str]:
        asked.set()
        gevent.sleep(60)
        return [LOOPBACK]

    asked = Event()
    look_up(monkeypatch, answer_late)
    with client_of(("slow.example", 9)) as client:
        connecting = gevent.spawn(pytest.raises, PsClientError, client.connect)
        assert asked.wait(5)
        with takes(most=0.5):
            client.disconnect()
            connecting.get(timeout=5)


def test_disconnect_while_on_start_runs_leaves_nothing_open(ps_server: ServerFactory) -> None:
    callback = SlowOnStart()
    server = ps_server(echo())
    with client_of(server.address, callback) as client:
        connecting = gevent.spawn(pytest.raises, PsClientError, client.connect)
        callback.wait_for("on_start")
        disconnecting = gevent.spawn(client.disconnect)
        eventually(lambda: not client.started)
        callback.go_on.set()
        connecting.get(timeout=5)
        disconnecting.get(timeout=5)
        assert client.session is None
        assert client.get_session_count() == 0
        names = [event.name for event in callback.events]
        assert names == ["on_start", "on_stop"]
        client.connect()
        assert client.get_session_count() == 1


@pytest.mark.hub_errors
@pytest.mark.parametrize("turns", range(8))
def test_disconnect_at_any_moment_of_a_connect_leaves_nothing_open(
    ps_server: ServerFactory, turns: int
) -> None:
    """The attempt fails, or its session gets on_open and on_close: nothing in between."""
    callback = RecordingCallback()
    server = ps_server(echo())
    with client_of(server.address, callback) as client:
        connecting = gevent.spawn(client.connect)
        for _ in range(turns):
            gevent.sleep(0)
        client.disconnect()
        connecting.join(5)
        assert connecting.ready()
        if not connecting.successful():
            assert isinstance(connecting.exception, PsClientError)
            assert callback.named("on_open") == []
        if client.session is not None:  # it connected after the disconnect, which saw nothing
            client.disconnect()
        names = [event.name for event in callback.events]
        assert names.count("on_open") == names.count("on_close")
        assert names.count("on_start") == names.count("on_stop") == 1
    eventually(lambda: server.get_session_count() == 0)


def test_connect_while_disconnecting_is_an_error() -> None:
    class Slow(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            go_on.wait()
            super().on_close(session, close_reason)

    go_on = Event()
    with ScriptedServer() as server, client_of(server.address, Slow()) as client:
        client.connect()
        disconnecting = gevent.spawn(client.disconnect)
        eventually(lambda: not client.started)
        with pytest.raises(PsClientError, match="disconnect"):
            client.connect()
        go_on.set()
        disconnecting.get(timeout=5)
        assert client.connect().is_open


# on_start


def test_exception_in_on_start_undoes_the_connect_and_is_raised() -> None:
    class Callback(RecordingCallback):
        def on_start(self, owner: Any) -> None:
            super().on_start(owner)
            raise ZeroDivisionError("no start")

    callback = Callback()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="no start"):
                client.connect()
        with pytest.raises(TimeoutError):
            server.accept(timeout=0.05)
        client.disconnect()
        assert [event.name for event in callback.events] == ["on_start"] * 2


def test_failed_first_connect_runs_on_stop_after_on_start() -> None:
    callback = RecordingCallback()
    with client_of((LOOPBACK, free_port()), callback) as client:
        with pytest.raises(PsClientError):
            client.connect()
        assert [event.name for event in callback.events] == ["on_start", "on_stop"]


def test_timeout_of_the_caller_ends_a_connect_cleanly() -> None:
    callback = RecordingCallback()
    with black_hole() as address, client_of(address, callback) as client:
        for _ in range(2):
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.05):
                client.connect(timeout=30)
            assert client.session is None
        assert [event.name for event in callback.events] == ["on_start", "on_stop"] * 2


def test_kill_ends_a_connect_cleanly() -> None:
    callback = RecordingCallback()
    with black_hole() as address, client_of(address, callback) as client:
        connecting = gevent.spawn(client.connect, timeout=30)
        callback.wait_for("on_start")
        connecting.kill(timeout=5)
        assert connecting.dead
        assert client.session is None


# Threads


def test_connect_in_another_thread_than_the_first_is_a_clear_error() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as server, client_of(server.address, callback) as client:
        client.connect()
        server.accept().close()
        callback.wait_for("on_close")
        with pytest.raises(PsClientError, match="thread"):
            NativeThread(client.connect).wait()
        assert client.connect().is_open


def test_connect_in_another_thread_while_connected_is_an_error() -> None:
    with ScriptedServer() as server, client_of(server.address) as client:
        session = client.connect()
        with pytest.raises(PsClientError):
            NativeThread(client.connect).wait()
        assert client.session is session
        assert session.is_open


def test_disconnect_in_another_thread_returns_after_on_stop() -> None:
    callback = RecordingCallback()

    def disconnect() -> str:
        client.disconnect()
        return callback.events[-1].name

    with ScriptedServer() as server, client_of(server.address, callback) as client:
        client.connect()
        callback.wait_for("on_open")
        assert NativeThread(disconnect).wait() == "on_stop"


def test_client_may_live_in_a_thread_of_its_own(ps_server: ServerFactory) -> None:
    """Its hub is that of the thread in which it connects."""
    address = ps_server(echo()).address

    def talk() -> bytes:
        callback = RecordingCallback()
        with PsClient(callback, *address) as client:
            assert client.session is not None
            client.session.send("hello")
            callback.wait_for("on_message")
        return callback.received()

    assert NativeThread(talk).wait() == b"hello"


@needs_libev_to_destroy
def test_with_connects_anew_what_went_with_its_hub(ps_server: ServerFactory) -> None:
    def destroy_hub() -> None:
        client.connect()
        gevent.get_hub().destroy(destroy_loop=True)

    callback = RecordingCallback()
    client = PsClient(callback, *ps_server(echo()).address)
    NativeThread(destroy_hub).wait()
    with client:
        assert client.session is not None
        client.session.send("hello")
        callback.wait_for("on_message")


# Side by side


def test_two_clients_of_one_callback_do_not_mix(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    address = ps_server(echo()).address
    with client_of(address, callback) as first, client_of(address, callback) as second:
        sessions = [first.connect(), second.connect()]
        for number, session in enumerate(sessions):
            session.send(str(number))
        callback.wait_for("on_message", 2)
        for number, session in enumerate(sessions):
            assert callback.received(session) == str(number).encode()
        first.disconnect()
        assert second.session is sessions[1]


def test_client_within_a_server_callback_works(ps_server: ServerFactory) -> None:
    """What a proxy does."""
    back_end = ps_server(echo())

    class Front(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            callback = RecordingCallback()
            client = PsClient(callback, *back_end.address)
            client.connect().send(message)
            callback.wait_for("on_message")
            client.disconnect()
            session.send(callback.received())

    front = ps_server(Front())
    with ScriptedClient(front.address) as user:
        for word in ("one", "two"):
            user.send(word)
            user.expect(word)
    eventually(lambda: back_end.get_session_count() == 0)


def test_client_that_is_dropped_while_disconnected_leaves_nothing() -> None:
    outcome = run_python(
        """
        import gc, weakref
        import gevent
        from psofa_gevent import PsCallback, PsClient, PsServer
        from psofa_gevent.testing import eventually

        gc.disable()
        with PsServer(PsCallback(), host="127.0.0.1", port=0) as server:
            client = PsClient(PsCallback(), *server.address)
            client.connect()
            client.disconnect()
            dropped = weakref.ref(client)
            del client
            eventually(lambda: dropped() is None)
            print(dropped())
        """
    )
    assert outcome.stdout == "None\n", outcome.stderr


def test_session_is_none_before_connect() -> None:
    client = PsClient(PsCallback(), LOOPBACK, 9)
    assert client.session is None
    assert client.get_session_count() == 0
