"""A client that stays connected: when it connects again, and who waits for that.

How it ends, by itself or when told, is in test_reconnect_end.py.
"""

from __future__ import annotations

import uuid
from typing import Any

import gevent
import gevent.event
import pytest

from acting import ActingCallback
from helpers import NativeThread, ScriptedServer, black_hole, close_reasons, free_port, takes
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsError,
    PsMultiClient,
    PsMultiClientError,
    PsReconnect,
    PsSession,
    run_coroutine,
)
from psofa_gevent.testing import RecordingCallback, eventually
from reconnecting import NO_DELAY, QUICK, SLOW, asking, error_of, has_failed, server_at

# The policy


def test_delays_grow_up_to_the_longest() -> None:
    policy = PsReconnect(first_delay=1, factor=3, longest_delay=20, jitter=0)
    assert [policy.delay(failures) for failures in range(6)] == [1, 1, 3, 9, 20, 20]
    assert policy.delay(10**9) == 20


@pytest.mark.parametrize("jitter", [0.0, 0.25, 1.0])
def test_a_part_of_each_delay_is_left_to_chance(jitter: float) -> None:
    policy = PsReconnect(first_delay=8, jitter=jitter)
    delays = [policy.delay(1) for _ in range(1_000)]
    assert all(8 * (1 - jitter) <= delay <= 8 for delay in delays)
    assert max(delays) - min(delays) >= 8 * jitter * 0.9


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("first_delay", "1", TypeError),
        ("first_delay", None, TypeError),
        ("first_delay", 0, ValueError),
        ("factor", "2", TypeError),
        ("factor", 0.5, ValueError),
        ("longest_delay", -0.1, ValueError),
        ("jitter", 1.5, ValueError),
        ("jitter", True, TypeError),
        ("attempts", 0, ValueError),
        ("attempts", 1.5, TypeError),
        ("give_up_after", 0, ValueError),
        ("attempt_timeout", 0, ValueError),
        ("steady_after", None, TypeError),
        ("should_retry", True, TypeError),
        ("should_retry", asking, TypeError),
    ],
)
def test_a_policy_that_cannot_be_is_refused(
    name: str, value: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=name):
        PsReconnect(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, "yes", 0.5, PsReconnect])
def test_a_reconnect_that_is_no_policy_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="reconnect"):
        PsClient(PsCallback(), "127.0.0.1", 1, reconnect=value)
    with pytest.raises(TypeError, match="reconnect"):
        PsMultiClient(PsCallback(), reconnect=value)


# Again and again


def test_each_attempt_that_succeeds_is_a_session_with_its_own_callbacks(
    address: tuple[str, int],
) -> None:
    callback = RecordingCallback()
    sessions: list[PsSession] = []
    client = PsClient(callback, *address, reconnect=QUICK)
    server = server_at(address)
    server.start()
    client.connect()
    for _ in range(3):
        session = client.wait_connected(20)
        sessions.append(session)
        session.send("hello")
        callback.wait_for("on_message", session=session)
        server.shutdown()
        callback.wait_for("on_close", session=session)
        server.start()
    client.wait_connected(20)
    client.disconnect()
    server.shutdown()
    assert len(set(sessions)) == len({session.connection_id for session in sessions}) == 3
    for session in sessions:
        names = [event.name for event in callback.events if event.session is session]
        assert names == ["on_open", "on_message", "on_close"]
    assert len(callback.named("on_start")) == len(callback.named("on_stop")) == 1


@pytest.mark.parametrize("how", ["close", "abort", "peer aborts"])
def test_it_connects_again_however_a_session_ended(how: str) -> None:
    callback = RecordingCallback()
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=QUICK)
        first = client.connect()
        peer = scripted.accept()
        if how == "close":
            first.close()
        elif how == "abort":
            first.abort()
        else:
            peer.reset()
        scripted.accept(timeout=20)
        assert client.wait_connected(20) is not first
        client.disconnect()


def test_a_peer_that_vanished_is_found_by_the_idle_check_and_left() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as scripted:
        settings: dict[str, Any] = {"reconnect": QUICK, "idle_milliseconds": 200}
        with PsClient(callback, *scripted.address, **settings):
            scripted.accept()
            scripted.accept(timeout=20)
            callback.wait_for("on_open", 2)
    assert close_reasons(callback)[0] is PsCloseReason.TIMEOUT


def test_the_next_on_open_waits_for_the_last_on_close() -> None:
    go_on = gevent.event.Event()
    callback = ActingCallback(on_close=lambda _session, _reason: go_on.wait(10))
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=QUICK)
        client.connect()
        scripted.accept().close()
        callback.wait_for("on_close")
        with pytest.raises(PsClientError, match=r"not connected within 0\.3 s"):
            client.wait_connected(0.3)
        go_on.set()
        client.wait_connected(20)
        client.disconnect()
    names = [event.name for event in callback.events]
    assert names == ["on_start", "on_open", "on_close", "on_open", "on_close", "on_stop"]


def test_async_callbacks_are_connected_again_too() -> None:
    class Async(PsCallback):
        use_async_callback = True

        def __init__(self) -> None:
            self.names: list[str] = []

        async def on_open_async(self, session: PsSession) -> None:
            self.names.append("open")

        async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
            self.names.append("close")

    callback = Async()
    with ScriptedServer() as scripted, PsClient(callback, *scripted.address, reconnect=QUICK):
        for _ in range(3):
            scripted.accept(timeout=20).close()
        eventually(lambda: len(callback.names) >= 6)
    assert callback.names[:6] == ["open", "close"] * 3


def test_a_chosen_id_is_that_of_each_session() -> None:
    chosen = uuid.uuid4()
    with ScriptedServer() as scripted:
        client = PsClient(PsCallback(), *scripted.address, reconnect=QUICK)
        first = client.connect(chosen)
        scripted.accept().close()
        eventually(lambda: not first.is_open)
        assert client.wait_connected(20).connection_id == chosen == first.connection_id
        client.disconnect()


# The beginning


def test_connect_waits_for_a_server_that_starts_later(address: tuple[str, int]) -> None:
    server = server_at(address)
    starting = gevent.spawn_later(0.2, server.start)
    client = PsClient(PsCallback(), *address, reconnect=QUICK)
    session = client.connect(timeout=20)
    assert session.is_open
    starting.join()
    client.disconnect()
    server.shutdown()


def test_connect_that_comes_to_nothing_leaves_nothing(address: tuple[str, int]) -> None:
    callback = RecordingCallback()
    client = PsClient(callback, *address, reconnect=QUICK)
    with pytest.raises(PsClientError, match=r"within 1(\.0)? s.*Connection refused"):
        client.connect(timeout=1.0)
    assert not client.started
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]
    with server_at(address):
        assert client.connect(timeout=20).is_open  # and it may be tried again
        client.disconnect()


def test_connect_in_background_returns_at_once(address: tuple[str, int]) -> None:
    client = PsClient(PsCallback(), *address, reconnect=QUICK)
    client.connect_in_background()
    assert client.started
    assert "connecting" in repr(client)
    with server_at(address):
        session = client.wait_connected(20)
        assert session is client.session
        assert repr(client).endswith(" connected>")
        client.disconnect()


def test_it_is_refused_while_another_goes_on(address: tuple[str, int]) -> None:
    client = PsClient(PsCallback(), *address, reconnect=QUICK)
    client.connect_in_background()
    with pytest.raises(PsClientError, match="already"):
        client.connect()
    with pytest.raises(PsClientError, match="already"):
        client.connect_in_background()
    client.disconnect()


def test_connect_in_background_needs_a_policy(address: tuple[str, int]) -> None:
    client = PsClient(PsCallback(), *address)
    with pytest.raises(PsClientError, match="reconnect"):
        client.connect_in_background()
    with (
        PsMultiClient(PsCallback()) as bundle,
        pytest.raises(PsMultiClientError, match="reconnect"),
    ):
        bundle.connect_in_background(*address)


# Waiting


def test_wait_connected_gives_the_session_that_is_open() -> None:
    with ScriptedServer() as scripted, PsClient(PsCallback(), *scripted.address) as client:
        assert client.wait_connected(0) is client.session


def test_wait_connected_raises_where_none_will_come() -> None:
    with ScriptedServer() as scripted:
        client = PsClient(PsCallback(), *scripted.address)
        with pytest.raises(PsClientError, match="by itself"):
            client.wait_connected()
        with pytest.raises(TypeError, match="timeout"):
            client.wait_connected("1")  # type: ignore[arg-type]


def test_any_number_may_wait(address: tuple[str, int]) -> None:
    client = PsClient(PsCallback(), *address, reconnect=QUICK)
    client.connect_in_background()
    waiting = [gevent.spawn(client.wait_connected, 20) for _ in range(20)]
    gevent.idle()
    with server_at(address):
        assert {greenlet.get() for greenlet in waiting} == {client.session}
        client.disconnect()


def test_wait_connected_is_refused_where_it_would_wait_for_itself() -> None:
    errors: list[PsError] = []

    def wait(session: PsSession, _reason: PsCloseReason) -> None:
        assert isinstance(session.owner, PsClient)
        try:
            session.owner.wait_connected()
        except PsClientError as exc:
            errors.append(exc)

    async def wait_in_coroutine() -> None:
        client.wait_connected()

    with ScriptedServer() as scripted:
        callback = ActingCallback(on_close=wait)
        with PsClient(callback, *scripted.address, reconnect=SLOW) as client:
            scripted.accept().close()
            eventually(lambda: errors)
            with pytest.raises(PsClientError, match="coroutine"):
                run_coroutine(wait_in_coroutine())
            outcome = NativeThread(client.wait_connected)
            with pytest.raises(PsClientError, match="thread"):
                outcome.join()
    assert "on_close" in str(errors[0])


@pytest.mark.parametrize("name", ["on_open", "on_message"])
def test_a_callback_of_the_closed_session_does_not_wait_for_the_next(name: str) -> None:
    errors: list[PsError] = []

    def close_and_wait(session: PsSession, *_args: object) -> None:
        assert isinstance(session.owner, PsClient)
        assert session.owner.wait_connected() is session
        session.close()
        try:
            session.owner.wait_connected()
        except PsClientError as exc:
            errors.append(exc)

    callback = ActingCallback(**{name: close_and_wait})
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=SLOW)
        client.connect_in_background()
        scripted.accept().send("hello")
        eventually(lambda: errors)
        client.disconnect()
    assert "can't wait for the next" in str(errors[0])


@pytest.mark.logs_errors
def test_should_retry_does_not_wait_for_itself(address: tuple[str, int]) -> None:
    def should_retry(_failures: int, _error: PsError | None) -> None:
        client.wait_connected()

    client = PsClient(PsCallback(), *address, reconnect=PsReconnect(should_retry=should_retry))
    with pytest.raises(PsClientError, match=r"should_retry failed.*can't wait"):
        client.connect(timeout=None)


@pytest.mark.parametrize("is_async", [False, True])
def test_connect_where_the_next_session_would_wait_for_it_waits_for_the_first_only(
    is_async: bool,
) -> None:
    """In on_close of another session, and in a coroutine, with a peer that lets nobody stay."""
    errors: list[PsError] = []

    def connect(bundle: PsMultiClient) -> None:
        try:
            bundle.connect(*scripted.address, timeout=None)
        except PsMultiClientError as exc:
            errors.append(exc)

    async def connect_async(bundle: PsMultiClient) -> None:
        connect(bundle)

    def close(session: PsSession) -> None:
        session.close()

    def connect_once(session: PsSession, _reason: PsCloseReason) -> None:
        assert isinstance(session.owner, PsMultiClient)
        if not is_async and not errors:
            connect(session.owner)

    callback = ActingCallback(on_open=close, on_close=connect_once)
    with ScriptedServer() as scripted, PsMultiClient(callback, reconnect=SLOW) as bundle:
        if is_async:
            run_coroutine(connect_async(bundle))
        else:
            bundle.connect_in_background(*scripted.address)
        eventually(lambda: errors)
    assert "the last session ended: SELF_CLOSE" in str(errors[0])


def test_connect_is_refused_in_the_hub_and_leaves_nothing() -> None:
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            client.connect()
        except PsClientError as exc:
            errors.append(exc)

    with ScriptedServer() as scripted:
        client = PsClient(PsCallback(), *scripted.address, reconnect=QUICK)
        gevent.get_hub().loop.run_callback(connect)
        eventually(lambda: errors)
        eventually(lambda: not client.started)
        client.connect()
        client.disconnect()


def test_entering_the_context_while_it_connects_goes_on(address: tuple[str, int]) -> None:
    client = PsClient(PsCallback(), *address, reconnect=QUICK)
    client.connect_in_background()
    with client, server_at(address):
        assert client.wait_connected(20).is_open
    assert not client.started


# Several endpoints


def test_endpoints_are_tried_in_turn_and_the_first_is_preferred(address: tuple[str, int]) -> None:
    with ScriptedServer() as second:
        settings: dict[str, Any] = {"reconnect": QUICK, "endpoints": [second.address]}
        client = PsClient(PsCallback(), *address, **settings)
        session = client.connect(timeout=20)
        assert session.remote_endpoint == second.address
        with server_at(address):
            second.accept().close()
            eventually(lambda: not session.is_open)
            assert client.wait_connected(20).remote_endpoint == address
            client.disconnect()


def test_endpoints_help_a_single_connect_too(address: tuple[str, int]) -> None:
    with black_hole() as silent, ScriptedServer() as third:
        endpoints = [silent, third.address]
        client = PsClient(PsCallback(), *address, endpoints=endpoints)
        with takes(most=2.9):  # a silent one gets its share of the time, and not all
            assert client.connect(timeout=3).remote_endpoint == third.address
        client.disconnect()
        with PsMultiClient(PsCallback()) as bundle:
            connection = bundle.connect(*address, endpoints=[third.address])
            assert connection.session.remote_endpoint == third.address
            assert (connection.host, connection.port) == address


def test_an_error_names_all_endpoints(address: tuple[str, int]) -> None:
    other = free_port()
    client = PsClient(PsCallback(), *address, endpoints=[("127.0.0.1", other)])
    with pytest.raises(PsClientError) as caught:
        client.connect()
    assert f"127.0.0.1:{address[1]}: Connection refused" in str(caught.value)
    assert f"127.0.0.1:{other}: Connection refused" in str(caught.value)


@pytest.mark.parametrize(
    ("endpoints", "error"),
    [
        ("127.0.0.1:1", TypeError),
        (("127.0.0.1", 1), TypeError),
        ([("127.0.0.1",)], TypeError),
        ([("127.0.0.1", "1")], TypeError),
        ([("127.0.0.1", 0)], ValueError),
        ([("", 1)], ValueError),
    ],
)
def test_endpoints_that_are_none_are_refused(endpoints: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        PsClient(PsCallback(), "127.0.0.1", 1, endpoints=endpoints)
    with PsMultiClient(PsCallback()) as bundle, pytest.raises(error):
        bundle.connect("127.0.0.1", 1, endpoints=endpoints)


# Many


def test_many_connections_survive_a_restart(address: tuple[str, int]) -> None:
    callback = RecordingCallback()
    server = server_at(address)
    server.start()
    with PsMultiClient(callback, reconnect=QUICK) as bundle:
        connections = [bundle.connect(*address) for _ in range(100)]
        first = [connection.session for connection in connections]
        server.shutdown()
        callback.wait_for("on_close", 100)
        server.start()
        second = [connection.wait_connected(30) for connection in connections]
        assert not set(first) & set(second)
        assert len(set(second)) == 100
        assert bundle.get_session_count() == 100
    server.shutdown()
    assert bundle.get_session_count() == 0


def test_one_of_many_is_disconnected_for_good(address: tuple[str, int]) -> None:
    callback = RecordingCallback()
    with server_at(address) as server, PsMultiClient(callback, reconnect=QUICK) as bundle:
        by_connection, by_session, kept = (bundle.connect(*address) for _ in range(3))
        bundle.disconnect(by_connection)
        bundle.disconnect(by_session.session)
        callback.wait_for("on_close", 2)
        for connection in (by_connection, by_session):
            with pytest.raises(PsMultiClientError, match="disconnected"):
                connection.wait_connected(5)
        old = kept.session
        old.abort()
        eventually(lambda: not old.is_open)
        assert kept.wait_connected(20).is_open
        eventually(lambda: server.get_session_count() == 1)
        assert len(bundle._links) == 1


def test_one_of_many_is_disconnected_in_another_thread_while_it_waits(
    address: tuple[str, int],
) -> None:
    with PsMultiClient(PsCallback(), reconnect=SLOW) as bundle:
        connection = bundle.connect_in_background(*address)
        assert connection.session is None
        waiting = error_of(connection.wait_connected)
        NativeThread(bundle.disconnect, connection).join()
        assert "disconnected" in str(waiting.get())


def test_destroying_the_bundle_ends_all_attempts_and_delays(address: tuple[str, int]) -> None:
    with black_hole() as silent:
        bundle = PsMultiClient(PsCallback(), reconnect=SLOW)
        bundle.init_bundle()
        connections = [bundle.connect_in_background(*where) for where in (address, silent) * 10]
        eventually(lambda: sum(has_failed(each._link) for each in connections) == 10)
        with takes(most=NO_DELAY):
            bundle.destroy_bundle()
        for connection in connections:
            with pytest.raises(PsMultiClientError, match="disconnected"):
                connection.wait_connected()
        assert not bundle._links


def test_connect_of_one_of_many_that_fails_leaves_nothing(address: tuple[str, int]) -> None:
    with PsMultiClient(PsCallback(), reconnect=QUICK) as bundle:
        with pytest.raises(PsMultiClientError, match="Connection refused"):
            bundle.connect(*address, timeout=0.2)
        assert not bundle._links
