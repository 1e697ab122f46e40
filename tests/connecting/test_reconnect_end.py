"""How a client that stays connected ends: when it is told, when it gives up, and when it fails."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import pytest

from acting import ActingCallback
from helpers import NativeThread, ScriptedServer, black_hole, free_port, takes
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsError,
    PsMultiClient,
    PsReconnect,
    PsServer,
    PsSession,
)
from psofa_gevent.connecting.link import Link
from psofa_gevent.hub.greenlets import LibraryGreenlet
from psofa_gevent.owner.manager import SessionManager
from psofa_gevent.testing import RecordingCallback, eventually
from reconnecting import NO_DELAY, QUICK, SLOW, error_of, has_failed, server_at


def is_interrupted(connect: Callable[[], object]) -> bool:
    """Whether a `gevent.Timeout` comes out of it."""
    try:
        connect()
    except gevent.Timeout:
        return True
    return False


@pytest.mark.parametrize("was_started", [False, True])
def test_a_timeout_in_the_moment_in_which_it_has_connected_leaves_nothing(
    was_started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = Link._tell

    def expire_and_tell(link: Link) -> None:
        if not link.has_ended:
            caller.kill(gevent.Timeout(), block=False)
        tell(link)

    policy = PsReconnect(first_delay=0.01, longest_delay=0.01, attempts=1)
    with ScriptedServer() as scripted:
        client = PsClient(PsCallback(), *scripted.address, reconnect=policy)
        if was_started:
            client.connect().close()
            eventually(lambda: not client._stays_connected)
        with monkeypatch.context() as patched:
            patched.setattr(Link, "_tell", expire_and_tell)
            caller = gevent.spawn(is_interrupted, client.connect)
            assert caller.get()
        assert client.session is None
        assert client.connect().is_open  # at once
        eventually(lambda: client.get_session_count() == 1)
        client.disconnect()


def test_a_timeout_around_a_connect_of_many_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tell = Link._tell

    def expire_and_tell(link: Link) -> None:
        if not link.has_ended:
            caller.kill(gevent.Timeout(), block=False)
        tell(link)

    monkeypatch.setattr(Link, "_tell", expire_and_tell)
    with ScriptedServer() as scripted, PsMultiClient(PsCallback(), reconnect=QUICK) as bundle:
        caller = gevent.spawn(is_interrupted, lambda: bundle.connect(*scripted.address))
        assert caller.get()
        eventually(lambda: bundle.get_session_count() == 0)
        assert not bundle._links


def test_a_connect_that_fails_leaves_alone_the_one_that_came_after_it(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = PsReconnect(first_delay=0.01, longest_delay=0.01, attempts=1)
    client = PsClient(PsCallback(), *address, reconnect=policy)
    server = server_at(address)
    later: list[gevent.Greenlet[[], PsSession]] = []
    end = Link._end

    def end_and_connect(link: Link) -> None:
        if not later:
            server.start()
            later.append(gevent.spawn(client.connect))  # before the first one knows of the end
        end(link)

    monkeypatch.setattr(Link, "_end", end_and_connect)
    with pytest.raises(PsClientError, match="gave up"):
        client.connect()
    assert later[0].get().is_open
    assert client.wait_connected(20).is_open
    client.disconnect()
    server.shutdown()


def test_disconnect_that_does_not_wait_for_on_start_ends_it(address: tuple[str, int]) -> None:
    go_on = gevent.event.Event()

    class Slow(PsCallback):
        def on_start(self, owner: Any) -> None:
            go_on.wait()

    client = PsClient(Slow(), *address, reconnect=QUICK)
    outcome = error_of(client.connect_in_background)
    client.disconnect(timeout=0)
    assert not client.started
    go_on.set()
    assert "disconnected" in str(outcome.get())
    assert not client._links
    assert "disconnected" in repr(client)


def test_disconnect_ends_a_delay_at_once() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=SLOW)
        client.connect()
        scripted.accept().close()
        callback.wait_for("on_close")
        waiting = error_of(client.wait_connected)
        with takes(most=NO_DELAY):
            client.disconnect()
            assert "disconnected" in str(waiting.get())
    assert [event.name for event in callback.events][-1] == "on_stop"
    assert not client.started


def test_disconnect_in_another_thread_ends_a_delay() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=SLOW)
        client.connect()
        scripted.accept().close()
        callback.wait_for("on_close")
        with takes(most=NO_DELAY):
            NativeThread(client.disconnect).wait()
    assert callback.named("on_stop")


def test_disconnect_ends_an_attempt_at_once() -> None:
    with black_hole() as address:
        client = PsClient(PsCallback(), *address, reconnect=QUICK)
        client.connect_in_background()
        eventually(lambda: client._connectors)
        with takes(most=NO_DELAY):
            client.disconnect()


def test_disconnect_in_on_close_stops_it() -> None:
    def stop(session: PsSession, _reason: PsCloseReason) -> None:
        assert isinstance(session.owner, PsClient)
        session.owner.disconnect()

    callback = ActingCallback(on_close=stop)
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=QUICK)
        client.connect()
        scripted.accept().close()
        callback.wait_for("on_stop")
    assert len(callback.named("on_open")) == 1


def test_the_log_tells_that_it_is_connected_where_it_told_that_it_was_not(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = PsClient(PsCallback(), *address, reconnect=QUICK)
    client.connect_in_background()
    eventually(lambda: "attempt 1 failed" in caplog.text)
    server = server_at(address)
    server.start()
    first = client.wait_connected(timeout=20).connection_id
    [at_the_server] = eventually(lambda: server.sessions)
    at_the_server.close()
    eventually(lambda: "connected again" in caplog.text)
    client.disconnect()
    server.shutdown()
    name = "{}:{}".format(*address)
    assert f"{name}: connected: <PsSession {first} " in caplog.text
    assert f"{name}: session {first} ended: PEER_CLOSE" in caplog.messages
    assert f"{name}: connected again: <PsSession " in caplog.text.rpartition("ended: PEER_CLOSE")[2]


def test_a_first_connect_that_succeeds_needs_no_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with PsServer(PsCallback(), host="127.0.0.1", port=0) as server:
        client = PsClient(PsCallback(), *server.address, reconnect=QUICK)
        client.connect()
        client.disconnect()
    assert "connected" not in caplog.text


def test_it_gives_up_after_so_many_attempts(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    policy = PsReconnect(first_delay=0.01, longest_delay=0.01, attempts=4)
    client = PsClient(PsCallback(), *address, reconnect=policy)
    expected = pytest.raises(PsClientError, match=r"after 4 attempts.*refused")
    with caplog.at_level(logging.DEBUG), expected:
        client.connect(timeout=None)
    attempts = [record for record in caplog.records if "attempt" in record.getMessage()]
    levels = [record.levelname for record in attempts]
    assert levels == ["WARNING", "DEBUG", "DEBUG", "DEBUG", "WARNING"]  # the last tells of the end
    assert not client.started


def test_attempt_timeout_is_for_each_endpoint(address: tuple[str, int]) -> None:
    """The second one gets no time that the first one has left."""
    with black_hole() as silent:
        policy = PsReconnect(attempt_timeout=3, attempts=1)
        client = PsClient(PsCallback(), *address, endpoints=[silent], reconnect=policy)
        with pytest.raises(PsClientError, match="timed out"), takes(3, most=3):
            client.connect(timeout=None)


@pytest.mark.logs_errors
def test_the_error_tells_how_the_last_session_ended() -> None:
    def fail(_session: PsSession) -> None:
        raise KeyError("no such device")

    with ScriptedServer() as scripted:
        client = PsClient(ActingCallback(on_open=fail), *scripted.address, reconnect=SLOW)
        expected = pytest.raises(PsClientError, match=r"FAILED \(KeyError\('no such device'\)\)")
        with expected:
            client.connect(timeout=1.0)


def test_an_error_from_before_a_session_is_told_no_more(address: tuple[str, int]) -> None:
    go_on = gevent.event.Event()
    callback = ActingCallback(on_close=lambda _session, _reason: go_on.wait())
    client = PsClient(callback, *address, reconnect=QUICK)
    with pytest.raises(PsClientError, match="refused"):
        client.connect(timeout=0.5)
    client.connect_in_background()
    eventually(lambda: has_failed(client._link))
    with server_at(address):
        client.wait_connected(20).close()
        callback.wait_for("on_close")
        with pytest.raises(PsClientError, match="the last session ended: SELF_CLOSE"):
            client.wait_connected(0.1)
        go_on.set()
        client.disconnect()


def test_it_gives_up_after_a_time(address: tuple[str, int]) -> None:
    policy = PsReconnect(first_delay=0.01, longest_delay=0.02, give_up_after=0.2)
    client = PsClient(PsCallback(), *address, reconnect=policy)
    with pytest.raises(PsClientError, match=r"gave up after 0\.2 s;"):
        client.connect(timeout=None)


def test_sessions_that_do_not_last_count_as_failures() -> None:
    """A server that lets nobody stay is not asked for ever, and not ever so often."""
    policy = PsReconnect(first_delay=0.01, longest_delay=0.01, attempts=3)
    callback = RecordingCallback()
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=policy)
        client.connect()
        for _ in range(3):
            scripted.accept(timeout=20).close()
        callback.wait_for("on_close", 3)
        eventually(lambda: not client._stays_connected)
        with pytest.raises(PsClientError, match="gave up after 3 attempts"):
            client.wait_connected(5)
        client.connect()  # may be asked for anew
        scripted.accept(timeout=20)
        client.disconnect()


@pytest.mark.parametrize("tls", [False, True])
def test_a_session_that_received_something_has_not_failed(tls: bool) -> None:
    """Servers that answer and close, each time: the next connection comes after `first_delay`."""
    exchanges = 8  # the wait after as many failures would be some 2 s, and after 3 it gives up
    asked: list[int] = []
    policy = PsReconnect(
        first_delay=0.01,
        longest_delay=60,
        jitter=0,
        attempts=3,
        give_up_after=30,
        should_retry=lambda failures, _error: asked.append(failures),
    )
    server_context = client_context = None
    if tls:
        trustme = pytest.importorskip("trustme")
        authority = trustme.CA()
        server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(server_context)
        client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(client_context)

    def answer_and_close(session: PsSession) -> None:
        session.send("time")
        session.close()

    once = ActingCallback(on_open=answer_and_close)
    asking = RecordingCallback()
    with (
        PsServer(once, host="127.0.0.1", port=0, ssl_context=server_context) as server,
        PsClient(asking, *server.address, reconnect=policy, ssl_context=client_context),
    ):
        asking.wait_for("on_close", exchanges, timeout=20)
    assert set(asked) == {0}
    assert asking.received().startswith(b"time" * exchanges)


def test_a_slow_on_close_lets_no_session_last() -> None:
    policy = PsReconnect(first_delay=0.01, longest_delay=0.01, attempts=2, steady_after=1)
    callback = ActingCallback(on_close=lambda _session, _reason: gevent.sleep(1.1))
    with ScriptedServer() as scripted, PsClient(callback, *scripted.address, reconnect=policy) as c:
        for _ in range(2):
            scripted.accept(timeout=20).close()
        eventually(lambda: not c._stays_connected)


def test_a_session_that_lasted_ends_the_row_of_failures() -> None:
    policy = PsReconnect(first_delay=0.01, longest_delay=0.01, attempts=2, steady_after=0)
    with ScriptedServer() as scripted, PsClient(PsCallback(), *scripted.address, reconnect=policy):
        for _ in range(6):
            scripted.accept(timeout=20).close()


def test_should_retry_is_asked_and_can_say_no(address: tuple[str, int]) -> None:
    asked: list[tuple[int, PsError | None]] = []

    def should_retry(failures: int, error: PsError | None) -> bool:
        asked.append((failures, error))
        return failures < 3

    policy = PsReconnect(first_delay=0.01, longest_delay=0.01, should_retry=should_retry)
    client = PsClient(PsCallback(), *address, reconnect=policy)
    with pytest.raises(PsClientError, match="should_retry"):
        client.connect(timeout=None)
    assert [failures for failures, _error in asked] == [1, 2, 3]
    assert all("refused" in str(error) for _failures, error in asked)


def test_should_retry_is_not_asked_when_it_gives_up_anyway(address: tuple[str, int]) -> None:
    asked: list[int] = []
    policy = PsReconnect(
        first_delay=0.01,
        attempts=3,
        should_retry=lambda failures, _error: asked.append(failures),
    )
    with pytest.raises(PsClientError, match="gave up after 3 attempts"):
        PsClient(PsCallback(), *address, reconnect=policy).connect(timeout=None)
    assert asked == [1, 2]


def test_clients_have_no_session_before_the_first_connect(address: tuple[str, int]) -> None:
    client = PsClient(PsCallback(), *address, reconnect=SLOW)
    assert client.session is None
    client.connect_in_background()
    assert client.session is None
    client.disconnect()
    with PsMultiClient(PsCallback(), reconnect=SLOW) as bundle:
        assert bundle.connect_in_background(*address).session is None


def test_should_retry_may_disconnect(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    def disconnect(_failures: int, _error: PsError | None) -> bool:
        client.disconnect()
        return False

    policy = PsReconnect(first_delay=60, should_retry=disconnect)
    callback = RecordingCallback()
    client = PsClient(callback, *address, reconnect=policy)
    client.connect_in_background()
    callback.wait_for("on_stop")
    assert not client.started
    with pytest.raises(PsClientError, match="disconnected"):
        client.wait_connected()
    assert "gave up" not in caplog.text


@pytest.mark.logs_errors
@pytest.mark.parametrize("kind", [KeyError, gevent.Timeout])
def test_a_should_retry_that_raises_ends_it(
    kind: type[BaseException], address: tuple[str, int]
) -> None:
    def should_retry(_failures: int, _error: PsError | None) -> bool:
        raise kind(None, "no such setting")

    policy = PsReconnect(should_retry=should_retry)
    client = PsClient(PsCallback(), *address, reconnect=policy)
    with pytest.raises(PsClientError, match="no such setting"):
        client.connect(timeout=None)


def test_a_stranger_that_kills_all_greenlets_does_not_end_it() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=QUICK)
        client.connect()
        link = client._link
        assert link is not None
        for number in range(3):
            peer = scripted.accept(timeout=20)
            callback.wait_for("on_open", number + 1)
            worker = link._service
            assert worker is not None
            assert isinstance(worker.greenlet, LibraryGreenlet)
            gevent.kill(worker.greenlet)
            peer.close()
        client.disconnect()
    assert len(callback.named("on_open")) >= 3


def test_a_session_that_is_killed_before_it_begins_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[PsSession] = []
    open_it = SessionManager.open

    def open_and_kill_the_first(manager: SessionManager, *args: Any, **kwargs: Any) -> PsSession:
        session = open_it(manager, *args, **kwargs)
        opened.append(session)
        if len(opened) == 1:
            assert session.greenlet is not None
            session.greenlet.kill(block=False)
        return session

    monkeypatch.setattr(SessionManager, "open", open_and_kill_the_first)
    callback = RecordingCallback()
    with ScriptedServer() as scripted:
        client = PsClient(callback, *scripted.address, reconnect=QUICK)
        client.connect_in_background()
        (event,) = callback.wait_for("on_open", timeout=20)
        assert event.session is opened[1]
        client.disconnect()


def test_one_that_is_stopped_as_the_peer_answers_is_closed() -> None:
    with ScriptedServer() as scripted, PsMultiClient(PsCallback(), reconnect=QUICK) as bundle:
        connection = bundle.connect_in_background(*scripted.address)
        link = connection._link
        assert link is not None
        connect = link._connect

        def connect_and_disconnect(timeout: float | None) -> PsSession:
            session = connect(timeout)
            bundle.disconnect(connection)
            return session

        link._connect = connect_and_disconnect
        scripted.accept().expect_eof()
        eventually(lambda: bundle.get_session_count() == 0)


def test_a_hub_that_is_destroyed_takes_it_along() -> None:
    def destroy(address: tuple[str, int]) -> list[str]:
        client = PsClient(PsCallback(), *address, reconnect=SLOW)
        client.connect_in_background()
        bundle = PsMultiClient(PsCallback(), reconnect=SLOW)
        bundle.init_bundle()
        first, second = (bundle.connect_in_background(*address) for _ in range(2))
        gevent.get_hub().destroy(destroy_loop=True)
        errors = []
        for wait in (client.wait_connected, first.wait_connected, second.wait_connected):
            with pytest.raises(PsError) as caught:
                wait(5)
            errors.append(str(caught.value))
            bundle.disconnect(first)
        client.disconnect()
        client.connect_in_background()  # in the next hub
        client.disconnect()
        return errors

    for error in NativeThread(destroy, ("127.0.0.1", free_port())).wait():
        assert "disconnected" in error or "own thread" in error
