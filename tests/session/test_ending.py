"""Points 3 and 9 of the design: who ends a session, what a close request wakes, what is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import gevent
import gevent.event
import pytest

from acting import STALLING, ActingCallback, sending, wait_until_stalled
from helpers import NativeThread, ScriptedServer, stalled_peer
from marks import needs_libev_to_destroy
from psofa_gevent import PsCallback, PsCloseReason, PsMultiClient, PsSendError, PsServer, PsSession
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)

FOREVER = 600.0

Ending = Callable[[PsServer, PsSession, ScriptedClient], object]
ENDINGS: dict[str, tuple[Ending, PsCloseReason]] = {
    "close": (lambda server, session, client: session.close(), PsCloseReason.SELF_CLOSE),
    "close in a greenlet": (
        lambda server, session, client: gevent.spawn(session.close).get(),
        PsCloseReason.SELF_CLOSE,
    ),
    "close in a thread": (
        lambda server, session, client: NativeThread(session.close).join(),
        PsCloseReason.SELF_CLOSE,
    ),
    "close in the thread pool": (
        lambda server, session, client: gevent.get_hub().threadpool.apply(session.close),
        PsCloseReason.SELF_CLOSE,
    ),
    "close in the hub": (
        lambda server, session, client: gevent.get_hub().loop.run_callback(session.close),
        PsCloseReason.SELF_CLOSE,
    ),
    "abort": (lambda server, session, client: session.abort(), PsCloseReason.SELF_CLOSE),
    "idle timer": (
        lambda server, session, client: session.change_idle_milliseconds(1),
        PsCloseReason.TIMEOUT,
    ),
    "peer's FIN": (lambda server, session, client: client.eof(), PsCloseReason.PEER_CLOSE),
    "peer's RST": (lambda server, session, client: client.reset(), PsCloseReason.FAILED),
    "replaced": (  # what bind(replace=True) does with the session that had the key
        lambda server, session, client: session._ask_to_close(PsCloseReason.REPLACED),
        PsCloseReason.REPLACED,
    ),
    "shutdown": (
        lambda server, session, client: gevent.spawn(server.shutdown),
        PsCloseReason.SHUTDOWN,
    ),
}


@pytest.fixture
def go_on() -> Iterator[gevent.event.Event]:
    """What a callback waits for; set at the end of the test at the latest."""
    event = gevent.event.Event()
    yield event
    event.set()


# What a close request wakes


@pytest.mark.parametrize("how", ENDINGS)
def test_a_close_request_wakes_a_session_that_waits_for_bytes(
    ps_server: ServerFactory, ps_client: ClientFactory, how: str
) -> None:
    end, reason = ENDINGS[how]
    callback = ActingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    client = ps_client(server)
    session = callback.opened()
    gevent.sleep(0)
    end(server, session, client)
    assert callback.closed(session) is reason


@pytest.mark.parametrize("how", ENDINGS)
def test_a_close_request_wakes_a_send_of_any_greenlet_which_then_raises(
    ps_server: ServerFactory, how: str
) -> None:
    end, reason = ENDINGS[how]
    callback = ActingCallback()
    server = ps_server(callback, linger_timeout=0.05)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        senders = [sending(session) for _ in range(3)]
        wait_until_stalled(session)
        thread = NativeThread(session.send, STALLING, None)
        gevent.sleep(0.05)
        assert not thread.ended
        end(server, session, client)
        assert all(isinstance(each.get(), PsSendError) for each in senders)
        with pytest.raises(PsSendError):
            thread.wait()
        assert callback.closed(session) is reason


@pytest.mark.parametrize("how", ["close", "close in a thread", "abort", "peer's RST"])
def test_a_close_request_wakes_a_send_of_the_sessions_own_callback(
    ps_server: ServerFactory, how: str
) -> None:
    errors: list[PsSendError] = []

    def send(session: PsSession, message: bytes) -> None:
        try:
            session.send(STALLING, None)
        except PsSendError as error:
            errors.append(error)

    end, reason = ENDINGS[how]
    callback = ActingCallback(on_message=send)
    server = ps_server(callback, linger_timeout=0.05)
    with stalled_peer(server.address) as client:
        client.send("x")
        session = callback.opened()
        wait_until_stalled(session)
        end(server, session, client)
        assert callback.closed(session) is reason
        assert len(errors) == 1


@pytest.mark.parametrize("how", ["close", "close in a thread", "abort"])
def test_a_close_request_wakes_a_send_of_another_sessions_callback(
    ps_server: ServerFactory, ps_client: ClientFactory, how: str
) -> None:
    """As in a chat: one slow member, who leaves while another's message is on its way to it."""
    errors: list[PsSendError] = []

    def tell_the_first(session: PsSession, message: bytes) -> None:
        try:
            callback.opened().send(STALLING, None)
        except PsSendError as error:
            errors.append(error)
            session.send("gone")

    end, reason = ENDINGS[how]
    callback = ActingCallback(on_message=tell_the_first)
    server = ps_server(callback, linger_timeout=0.05)
    with stalled_peer(server.address) as client:
        slow = callback.opened()
        other = ps_client(server)
        other.send("x")
        wait_until_stalled(slow)
        end(server, slow, client)
        other.expect("gone")
        assert callback.closed(slow) is reason
        assert len(errors) == 1


def test_close_may_be_called_by_another_sessions_callback(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActingCallback(on_message=lambda session, message: callback.opened().close())
    server = ps_server(callback)
    victim = ps_client(server)
    first = callback.opened()
    other = ps_client(server)
    other.send("close the first")
    victim.expect_eof()
    assert callback.closed(first) is PsCloseReason.SELF_CLOSE
    assert callback.opened(1).is_open


@pytest.mark.parametrize("how", ["close", "abort", "peer's RST", "peer's FIN", "idle timer"])
def test_a_callback_that_waits_on_something_else_is_not_interrupted(
    ps_server: ServerFactory, ps_client: ClientFactory, go_on: gevent.event.Event, how: str
) -> None:
    returned: list[bool] = []
    callback = ActingCallback(
        on_message=lambda session, message: returned.append(go_on.wait(FOREVER))
    )
    server = ps_server(callback)
    client = ps_client(server)
    client.send("x")
    callback.wait_for("on_message")
    session = callback.opened()
    ENDINGS[how][0](server, session, client)
    gevent.sleep(0.05)
    assert not returned
    assert not callback.named("on_close")
    assert server.get_session_count() == 1
    go_on.set()
    callback.wait_for("on_close")
    assert returned == [True]


@pytest.mark.logs_errors
@pytest.mark.parametrize("asked_before", [False, True])
def test_a_callback_that_never_returns_is_ended_at_callback_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory, asked_before: bool
) -> None:
    callback = ActingCallback(on_message=lambda session, message: gevent.sleep(FOREVER))
    server = ps_server(callback, callback_timeout=0.1)
    ps_client(server).send("x")
    callback.wait_for("on_message")
    session = callback.opened()
    if asked_before:
        session.close()
        assert callback.closed(session) is PsCloseReason.SELF_CLOSE
        assert session.close_cause is None
    else:
        assert callback.closed(session) is PsCloseReason.FAILED
        assert isinstance(session.close_cause, TimeoutError)


@pytest.mark.logs_errors
def test_a_callback_that_never_returns_is_ended_at_the_end_of_shutdowns_timeout(
    ps_client: ClientFactory,
) -> None:
    callback = ActingCallback(on_message=lambda session, message: gevent.sleep(FOREVER))
    with serving(callback) as server:
        ps_client(server).send("x")
        callback.wait_for("on_message")
        session = callback.opened()
        server.shutdown(timeout=0.1)
        assert callback.closed(session) is PsCloseReason.SHUTDOWN


# SHUTDOWN and the sends of callbacks


@pytest.mark.parametrize("began_before", [True, False])
def test_shutdown_neither_interrupts_nor_refuses_the_sends_of_a_running_callback(
    ps_server: ServerFactory, go_on: gevent.event.Event, began_before: bool
) -> None:
    def send(session: PsSession, message: bytes) -> None:
        if not began_before:
            go_on.wait()
        session.send(STALLING, None)
        assert not session.is_open
        session.send("", None)
        session.send("after", None)

    callback = ActingCallback(on_message=send)
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        client.send("x")
        callback.wait_for("on_message")
        session = callback.opened()
        if began_before:
            wait_until_stalled(session)
        stopping = gevent.spawn(server.shutdown, FOREVER)
        eventually(lambda: not session.is_open)
        go_on.set()
        assert client.receive_until_eof() == STALLING + b"after"
        stopping.join()
        assert callback.closed(session) is PsCloseReason.SHUTDOWN


def test_shutdown_lets_a_callback_finish_its_send_to_another_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActingCallback(
        on_message=lambda session, message: callback.opened().send(STALLING, None)
    )
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        slow = callback.opened()
        ps_client(server).send("x")
        wait_until_stalled(slow)
        stopping = gevent.spawn(server.shutdown, FOREVER)
        eventually(lambda: not slow.is_open)
        assert client.receive_until_eof() == STALLING
        stopping.join()
        assert [event.value for event in callback.named("on_close")] == [PsCloseReason.SHUTDOWN] * 2


def test_shutdown_ends_the_sends_of_greenlets_that_are_no_callbacks(
    ps_server: ServerFactory,
) -> None:
    callback = ActingCallback()
    server = ps_server(callback, linger_timeout=0.05)
    with stalled_peer(server.address):
        session = callback.opened()
        sender = sending(session)
        wait_until_stalled(session)
        server.shutdown(FOREVER)
        assert isinstance(sender.get(), PsSendError)
        assert callback.closed(session) is PsCloseReason.SHUTDOWN


def test_a_send_after_shutdown_is_refused_where_no_callback_of_the_session_runs(
    ps_server: ServerFactory,
) -> None:
    callback = ActingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        sender = sending(session)
        wait_until_stalled(session)
        stopping = gevent.spawn(server.shutdown, FOREVER)
        assert isinstance(sender.get(), PsSendError)
        assert isinstance(sending(session, b"late").get(), PsSendError)
        client.receive(session.bytes_sent)
        client.expect_eof()
        stopping.join()


# A hub that is gone


@needs_libev_to_destroy
@pytest.mark.parametrize("end", ["close", "abort", "abort of its end", "disconnect", "init_bundle"])
def test_a_session_whose_hub_was_destroyed_is_closed_as_soon_as_anybody_asks(end: str) -> None:
    def lose_hub_and_end() -> None:
        bundle = PsMultiClient(PsCallback())
        bundle.init_bundle()
        session = bundle.connect(*scripted.address).session
        gevent.sleep(0)
        session.post(STALLING)
        bundle.bind(session, "key")
        if end == "abort of its end":
            session.close()
            gevent.sleep(0)
        gevent.get_hub().destroy(destroy_loop=True)
        match end:
            case "close":
                session.close()
            case "abort" | "abort of its end":
                session.abort()
            case "disconnect":
                bundle.disconnect(session)
            case _:
                bundle.init_bundle()
                bundle.destroy_bundle()
        assert not session.is_open
        assert bundle.find("key") is None
        with pytest.raises(PsSendError):
            session.send("late")

    with ScriptedServer() as scripted:
        thread = NativeThread(lose_hub_and_end)
        peer = scripted.accept()
        thread.wait()
        if "abort" in end:
            peer.expect_reset()
        else:
            peer.receive_until_eof()


# The close greenlet


def test_every_on_close_runs_in_the_one_close_greenlet_whatever_the_reason(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    places: set[tuple[object, int]] = set()
    others: set[object] = set()
    callback = ActingCallback(
        on_open=lambda session: others.add(gevent.getcurrent()),
        on_close=lambda session, reason: places.add((gevent.getcurrent(), threading.get_ident())),
    )
    server = ps_server(callback)
    for number, (end, reason) in enumerate(ENDINGS.values()):
        client = ps_client(server)
        session = callback.opened(number)
        end(server, session, client)
        assert callback.closed(session) is reason
    seen = {event.value for event in callback.named("on_close")}
    assert seen == set(PsCloseReason) - {PsCloseReason.NONE}
    [(greenlet, _thread)] = places
    assert greenlet not in others
    assert greenlet is not gevent.getcurrent()


def test_a_slow_on_close_delays_other_on_close_calls_and_nothing_else(
    ps_server: ServerFactory, ps_client: ClientFactory, go_on: gevent.event.Event
) -> None:
    callback = ActingCallback(
        on_message=lambda session, message: session.send(message),
        on_close=lambda session, reason: go_on.wait(),
    )
    server = ps_server(callback, linger_timeout=FOREVER)
    clients = []
    sessions = []
    for number in range(4):
        clients.append(ps_client(server))
        sessions.append(callback.opened(number))
    first, second, idle, _reader = sessions

    clients[0].eof()
    callback.wait_for("on_close")
    clients[0].expect_eof()  # its socket is released while its on_close runs
    second.close()
    clients[1].expect_eof()
    idle.change_idle_milliseconds(1)
    clients[2].expect_eof()
    eventually(lambda: server.get_session_count() == 1)
    clients[3].send("a read")
    clients[3].expect("a read")
    one_more = ps_client(server)
    one_more.send("an accept")
    one_more.expect("an accept")

    assert len(callback.named("on_close")) == 1
    go_on.set()
    calls = [(event.session, event.value) for event in callback.wait_for("on_close", 3)]
    assert calls == [
        (first, PsCloseReason.PEER_CLOSE),
        (second, PsCloseReason.SELF_CLOSE),
        (idle, PsCloseReason.TIMEOUT),
    ]


def test_only_one_on_close_runs_at_a_time_however_many_sessions_close_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    running = most = 0

    def count(session: PsSession, reason: PsCloseReason) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        gevent.sleep(0.001)
        running -= 1

    callback = ActingCallback(on_close=count)
    server = ps_server(callback)
    clients = [ps_client(server) for _ in range(50)]
    callback.wait_for("on_open", 50)
    for client in clients:
        client.close()
    callback.wait_for("on_close", 50)
    assert most == 1


def test_on_close_may_call_everything_and_nothing_of_it_waits_or_has_an_effect(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    outcomes: list[object] = []

    def call_everything(session: PsSession, reason: PsCloseReason) -> None:
        session.close()
        session.abort()
        session.send_eof()
        session.change_idle_milliseconds(1)
        session.set_value("name", "value")
        for message in ("x", ""):
            try:
                session.send(message)
            except PsSendError as error:
                outcomes.append(error)
        server.shutdown()
        outcomes.append("returned")

    callback = ActingCallback(on_close=call_everything)
    server = ps_server(callback)
    ps_client(server).eof()
    assert callback.closed(callback.opened()) is PsCloseReason.PEER_CLOSE
    assert server.wait_for(5)
    assert [type(each) for each in outcomes] == [PsSendError, PsSendError, str]
    assert len(callback.named("on_close")) == 1


# Counts


def test_a_session_counts_until_it_has_ended_and_not_in_its_on_close(
    ps_server: ServerFactory, ps_client: ClientFactory, go_on: gevent.event.Event
) -> None:
    counts: list[int] = []
    callback = ActingCallback(
        on_open=lambda session: counts.append(server.get_session_count()),
        on_message=lambda session, message: go_on.wait(),
        on_close=lambda session, reason: counts.append(server.get_session_count()),
    )
    server = ps_server(callback)
    client = ps_client(server)
    client.send("x")
    callback.wait_for("on_message")
    session = callback.opened()
    session.close()
    assert server.get_session_count() == 1
    assert server.sessions == []
    go_on.set()
    callback.wait_for("on_close")
    assert counts == [1, 0]
    assert server.get_session_count() == 0


@pytest.mark.logs_errors
def test_the_count_is_exact_through_every_way_to_end(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def fail(session: PsSession, message: bytes) -> None:
        raise ValueError

    callback = ActingCallback(on_message=fail)
    server = ps_server(callback)
    assert server.get_session_count() == 0
    ways = [end for name, (end, _reason) in ENDINGS.items() if name != "shutdown"]
    ways.append(lambda server, session, client: client.send("fail"))
    for number, end in enumerate(ways):
        client = ps_client(server)
        session = callback.opened(number)
        assert server.get_session_count() == 1
        assert list(server.sessions) == [session]
        end(server, session, client)
        session.close()
        session.close()
        callback.closed(session)
        assert server.get_session_count() == 0
        assert list(server.sessions) == []
    server.shutdown()
    assert server.get_session_count() == 0


@pytest.mark.logs_errors
@pytest.mark.hub_errors
def test_a_session_that_a_shutdown_left_behind_counts_neither_then_nor_when_it_ends(
    ps_client: ClientFactory, go_on: gevent.event.Event
) -> None:
    """Its callback swallows every kill, and returns long after the server was started again."""

    def swallow(session: PsSession, message: bytes) -> None:
        while not go_on.is_set():
            try:
                go_on.wait()
            except gevent.GreenletExit:
                pass
        ended.set()

    ended = gevent.event.Event()
    callback = ActingCallback(on_message=swallow)
    with serving(callback) as server:
        ps_client(server).send("x")
        callback.wait_for("on_message")
        server.shutdown(timeout=0)
        assert server.get_session_count() == 0
        server.start()
        client = ps_client(server)
        callback.wait_for("on_open", 2)
        go_on.set()
        assert ended.wait(5)
        gevent.sleep(0.01)
        assert server.get_session_count() == 1
        client.eof()
        callback.wait_for("on_close")
        assert server.get_session_count() == 0
        assert len(callback.named("on_close")) == 1


def test_the_sessions_of_a_client_count_in_the_same_way(ps_server: ServerFactory) -> None:
    server = ps_server(RecordingCallback())
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle:
        sessions = [bundle.connect("127.0.0.1", server.address[1]).session for _ in range(3)]
        assert bundle.get_session_count() == 3
        sessions[0].close()
        sessions[0].close()
        sessions[1].abort()
        callback.wait_for("on_close", 2)
        assert bundle.get_session_count() == 1
    assert bundle.get_session_count() == 0
