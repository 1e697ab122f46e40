"""Idle sessions (design, point 5): what counts as idle, what does not, and when TIMEOUT comes.

A session is looked at about once a second. Where a test must show that a session is *not* closed,
it lets a canary die first: a session with an idle time of 1 ms. With ``divide=1``, one slice for
all, the look that finds the canary has seen every other session too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import monkey
from gevent.event import Event

from helpers import ScriptedServer, stalled_peer, takes, waited_for_a_core
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsMultiClient,
    PsSendError,
    PsServer,
    PsSession,
)
from psofa_gevent.framing import Line
from psofa_gevent.owner.idle import IdleSlice
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

pytestmark = pytest.mark.long

native_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")
"""Blocks the hub, in a patched process too."""

SECOND_OR_SO = 1.7
"""Seconds after its deadline within which a session closes: a scan a second, and a slow machine."""
BIG = bytes(32 * 1024 * 1024)
"""More than the kernel's buffers take."""


class IdleCallback(RecordingCallback):
    """Records, with the moment of each close; canaries are the sessions that say so.

    A test overrides what it needs: `opened` and `received` run after the record is made, in the
    greenlet of the session, for those that are no canaries.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closed_at: dict[PsSession, float] = {}
        self.had_waited_for_a_core = waited_for_a_core()
        self.opened: Callable[[PsSession], object] = lambda _session: None
        self.received_message: Callable[[PsSession], object] = lambda _session: None

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self.opened(session)

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        if message == b"canary":
            session.change_idle_milliseconds(1)
        else:
            self.received_message(session)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.closed_at[session] = time.monotonic()
        super().on_close(session, close_reason)

    def reasons(self, session: PsSession) -> list[object]:
        return [event.value for event in self.named("on_close", session)]

    def session_of(self, client: ScriptedClient) -> PsSession:
        """The session whose peer `client` is."""

        def found() -> list[PsSession]:
            opened = [event.session for event in self.named("on_open")]
            return [
                session
                for session in opened
                if session is not None and session.remote_endpoint == client.local_endpoint
            ]

        return eventually(found)[0]


def let_canary_time_out(server: PsServer) -> None:
    """Return when the idle timer of a server with ``divide=1`` has looked at every session."""
    with ScriptedClient(server.address) as canary:
        canary.send("canary")
        canary.expect_eof()


def expect_timeout(callback: IdleCallback, session: PsSession, since: float) -> float:
    """Wait for TIMEOUT, at most a second or so after `since`; return how long after it it came."""
    callback.wait_for("on_close", session=session)
    assert callback.reasons(session) == [PsCloseReason.TIMEOUT]
    assert session.close_cause is None
    elapsed = callback.closed_at[session] - since
    lost = waited_for_a_core() - callback.had_waited_for_a_core
    assert elapsed - lost < SECOND_OR_SO
    return elapsed


# The idle time itself


def test_idle_session_times_out_within_a_second_or_so_of_its_deadline(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    combinations = itertools.product([1, 300, 1_100], [1, 3, 10, 1_000])
    sessions = []
    for idle_milliseconds, divide in combinations:
        callback = IdleCallback()
        server = ps_server(callback, idle_milliseconds=idle_milliseconds, divide=divide)
        deadline = time.monotonic() + idle_milliseconds / 1_000
        session = callback.session_of(ps_client(server))
        sessions.append((callback, session, deadline))
    for callback, session, deadline in sessions:
        assert expect_timeout(callback, session, since=deadline) >= 0


def test_idle_none_never_times_out(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    callback = IdleCallback()
    server = ps_server(callback, divide=1, idle_milliseconds=None)
    client = ps_client(server)
    session = callback.session_of(client)
    let_canary_time_out(server)
    assert session.is_open
    client.send("still there")
    callback.wait_for("on_message", session=session)


def test_longest_idle_time_is_accepted_and_never_comes(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, divide=1, idle_milliseconds=2**53)
    session = callback.session_of(ps_client(server))
    let_canary_time_out(server)
    assert session.is_open


def test_idle_clock_does_not_follow_the_system_time(
    ps_server: ServerFactory, ps_client: ClientFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, divide=1, idle_milliseconds=30_000)
    session = callback.session_of(ps_client(server))
    real_time = time.time
    monkeypatch.setattr(time, "time", lambda: real_time() + 86_400)
    let_canary_time_out(server)
    assert session.is_open


@pytest.mark.parametrize("count", [2_000])
def test_each_of_many_idle_sessions_times_out_once(
    count: int, ps_server: ServerFactory, many_descriptors: None
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, idle_milliseconds=1_000, max_sessions=count)
    clients = [ScriptedClient(server.address, timeout=20.0) for _ in range(count)]
    try:
        callback.wait_for("on_open", count, timeout=20.0)
        callback.wait_for("on_close", count, timeout=20.0)
        eventually(lambda: server.get_session_count() == 0)
        closes = callback.named("on_close")
        assert len(closes) == len({event.session for event in closes}) == count
        assert {event.value for event in closes} == {PsCloseReason.TIMEOUT}
        assert not callback.named("on_message")
        for client in clients:
            client.expect_eof()
    finally:
        for client in clients:
            client.close()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """A soft descriptor limit that is enough for 2,000 connections, both ends in one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4_500
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        yield
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"the hard descriptor limit is {hard}, less than {wanted}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_session_of_a_client_times_out() -> None:
    callback = IdleCallback()
    with ScriptedServer() as listener:
        client = PsClient(callback, *listener.address, idle_milliseconds=1)
        began = time.monotonic()
        session = client.connect()
        expect_timeout(callback, session, began)
        assert client.session is None
        client.disconnect()


def test_idle_sessions_of_a_multi_client_time_out_and_others_stay() -> None:
    callback = IdleCallback()
    with ScriptedServer() as listener, PsMultiClient(callback, idle_milliseconds=1) as bundle:

        def keep(session: PsSession) -> None:
            if session.connection_id == kept_id:
                session.change_idle_milliseconds(None)

        callback.opened = keep
        kept = bundle.connect(*listener.address).session
        kept_id = kept.connection_id
        others = [bundle.connect(*listener.address).session for _ in range(5)]
        for session in others:
            callback.wait_for("on_close", session=session)
            assert callback.reasons(session) == [PsCloseReason.TIMEOUT]
        assert bundle.sessions == [kept]


# Changing it


def change_to_none(session: PsSession) -> None:
    session.change_idle_milliseconds(None)


def change_to_1(session: PsSession) -> None:
    session.change_idle_milliseconds(1)


def test_idle_change_in_on_open_takes_effect(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    callback.opened = change_to_1
    began = time.monotonic()
    server = ps_server(callback, idle_milliseconds=None)
    session = callback.session_of(ps_client(server))
    expect_timeout(callback, session, began)


def test_idle_change_to_none_in_on_open_takes_effect(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    callback.opened = change_to_none
    server = ps_server(callback, divide=1, idle_milliseconds=1)
    session = callback.session_of(ps_client(server))
    let_canary_time_out(server)
    assert session.is_open


def test_idle_change_in_on_message_takes_effect(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    callback.received_message = change_to_1
    server = ps_server(callback, divide=1, idle_milliseconds=None)
    client = ps_client(server)
    session = callback.session_of(client)
    let_canary_time_out(server)
    assert session.is_open
    client.send("now")
    expect_timeout(callback, session, time.monotonic())


def test_idle_change_from_another_greenlet_while_waiting_takes_effect(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, divide=1, idle_milliseconds=None)
    session = callback.session_of(ps_client(server))
    let_canary_time_out(server)
    assert session.is_open
    gevent.spawn(change_to_1, session).get()
    expect_timeout(callback, session, time.monotonic())


def test_idle_change_to_none_while_waiting_takes_effect(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, divide=1, idle_milliseconds=1_000)
    session = callback.session_of(ps_client(server))
    gevent.spawn(change_to_none, session).get()
    assert session.is_open
    for _ in range(2):
        let_canary_time_out(server)
    assert session.is_open


def test_idle_change_while_waiting_restarts_the_clock(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, idle_milliseconds=2_000)
    session = callback.session_of(ps_client(server))
    gevent.sleep(1.2)  # most of the idle time must be over: there is no condition to wait for
    assert session.is_open
    session.change_idle_milliseconds(2_000)
    elapsed = expect_timeout(callback, session, time.monotonic() + 2.0)
    assert elapsed > -0.05


def test_idle_change_during_a_callback_by_another_greenlet_waits_for_the_callback(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    go_on = Event()
    callback.received_message = lambda _session: go_on.wait()
    server = ps_server(callback, divide=1, idle_milliseconds=None)
    client = ps_client(server)
    session = callback.session_of(client)
    client.send("block")
    callback.wait_for("on_message", session=session)
    session.change_idle_milliseconds(1)
    let_canary_time_out(server)
    assert session.is_open
    go_on.set()
    expect_timeout(callback, session, time.monotonic())


@pytest.mark.parametrize("value", [0, -1, 2**53 + 1])
def test_idle_change_out_of_range_is_refused_and_changes_nothing(
    value: int, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, idle_milliseconds=None)
    session = callback.session_of(ps_client(server))
    with pytest.raises(ValueError, match=rf"idle_milliseconds.*{value}"):
        session.change_idle_milliseconds(value)
    assert session.is_open


@pytest.mark.parametrize("value", [1.5, "1", True])
def test_idle_change_of_the_wrong_type_is_refused(
    value: Any, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, idle_milliseconds=None)
    session = callback.session_of(ps_client(server))
    with pytest.raises(TypeError, match=rf"idle_milliseconds.*{value}"):
        session.change_idle_milliseconds(value)


def test_idle_change_of_a_closed_session_has_no_effect(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, divide=1)
    client = ps_client(server)
    session = callback.session_of(client)
    session.close()
    session.change_idle_milliseconds(1)
    client.expect_eof()
    callback.wait_for("on_close", session=session)
    session.change_idle_milliseconds(1)
    let_canary_time_out(server)
    assert callback.reasons(session) == [PsCloseReason.SELF_CLOSE]


# What counts as life


def test_bytes_from_the_peer_restart_the_clock(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """Whenever the scan, which comes to each session once a second, looks at it."""
    callback = IdleCallback()
    server = ps_server(callback, idle_milliseconds=2_000, divide=10)
    clients = [ps_client(server) for _ in range(10)]
    callback.wait_for("on_open", 10)
    gevent.sleep(1.0)  # half of the idle time
    for client in clients:
        client.send("x")
    last = time.monotonic()
    sessions = [callback.session_of(client) for client in clients]
    for session in sessions:
        assert expect_timeout(callback, session, last + 2.0) > -0.05
        assert session.messages_received == 1


def test_sending_does_not_count_as_life(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    callback = IdleCallback()
    began = time.monotonic()
    server = ps_server(callback, idle_milliseconds=200)
    client = ps_client(server)
    session = callback.session_of(client)

    def send_again_and_again() -> PsSendError:
        try:
            while True:
                session.send("x")
                gevent.sleep(0.02)
        except PsSendError as error:
            return error

    sender = gevent.spawn(send_again_and_again)
    client.receive_until_eof()
    expect_timeout(callback, session, began + 0.2)
    assert isinstance(sender.get(timeout=5), PsSendError)


def test_session_with_a_waiting_send_times_out_and_the_send_raises(
    ps_server: ServerFactory,
) -> None:
    callback = IdleCallback()
    began = time.monotonic()
    server = ps_server(callback, idle_milliseconds=200, linger_timeout=0)
    with stalled_peer(server.address) as client:
        session = callback.session_of(client)
        sender = gevent.spawn(expect_send_error, session)
        expect_timeout(callback, session, began + 0.2)
        sender.get(timeout=5)


def expect_send_error(session: PsSession) -> None:
    with pytest.raises(PsSendError):
        session.send(BIG, timeout=None)


def test_half_open_session_times_out_although_it_sends(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, idle_milliseconds=200, allow_half_open=True)
    client = ps_client(server)
    session = callback.session_of(client)
    client.eof()
    callback.wait_for("on_eof", session=session)
    session.send("x")
    client.expect("x")
    client.expect_eof()
    expect_timeout(callback, session, time.monotonic())


def test_idle_change_of_a_half_open_session_takes_effect(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, divide=1, idle_milliseconds=None, allow_half_open=True)
    client = ps_client(server)
    session = callback.session_of(client)
    client.eof()
    callback.wait_for("on_eof", session=session)
    let_canary_time_out(server)
    assert session.is_open
    session.change_idle_milliseconds(1)
    expect_timeout(callback, session, time.monotonic())


@pytest.mark.parametrize("method", ["on_open", "on_message"])
def test_blocked_callback_is_not_idle_time(
    method: str, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    go_on = Event()

    def block(session: PsSession) -> None:
        if session.remote_endpoint == client.local_endpoint and not go_on.is_set():
            go_on.wait()
            finished.append(time.monotonic())

    if method == "on_open":
        callback.opened = block
    else:
        callback.received_message = block
    finished: list[float] = []
    server = ps_server(callback, divide=1, idle_milliseconds=600)
    client = ps_client(server)
    session = callback.session_of(client)
    if method == "on_message":
        client.send("block")
        callback.wait_for("on_message", session=session)
    let_canary_time_out(server)
    assert session.is_open
    go_on.set()
    callback.wait_for("on_close", session=session)
    # The clock starts when the callback has returned, although more than the idle time is over.
    elapsed = expect_timeout(callback, session, finished[0] + 0.6)
    assert elapsed >= 0


def test_message_that_came_during_a_long_callback_is_read_and_not_timed_out(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    go_on = Event()
    callback.received_message = lambda _session: go_on.wait()
    server = ps_server(callback, divide=1, idle_milliseconds=1)
    client = ps_client(server)
    client.send("one")
    session = callback.session_of(client)
    callback.wait_for("on_message", session=session)
    client.send("two")
    let_canary_time_out(server)
    go_on.set()
    callback.wait_for("on_close", session=session)
    assert callback.received(session) == b"onetwo"


def test_blocked_callbacks_do_not_delay_the_timeouts_of_others(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    go_on = Event()
    callback.received_message = lambda _session: go_on.wait()
    server = ps_server(callback, idle_milliseconds=500)
    blocked = [ps_client(server) for _ in range(20)]
    for client in blocked:
        client.send("block")
    callback.wait_for("on_message", len(blocked))
    began = time.monotonic()
    idle = [callback.session_of(ps_client(server)) for _ in range(20)]
    for session in idle:
        expect_timeout(callback, session, began + 0.5)
    assert len(callback.named("on_close")) == len(idle)
    go_on.set()


def test_blocked_on_close_does_not_delay_the_timeouts_of_others(ps_server: ServerFactory) -> None:
    go_on = Event()

    class SlowClose(PsCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            go_on.wait()

    server = ps_server(SlowClose(), idle_milliseconds=1)
    with takes(most=2):
        with ScriptedClient(server.address) as first:
            first.expect_eof()
        with ScriptedClient(server.address) as second:
            second.expect_eof()
        eventually(lambda: server.get_session_count() == 0)
    go_on.set()


# Bytes that have arrived, but were not read when the deadline passed


def while_the_hub_is_busy(
    action: Callable[[ScriptedClient], None], ps_server: ServerFactory, ps_client: ClientFactory
) -> tuple[IdleCallback, PsSession]:
    """Let `action` happen before a deadline that passes before the hub runs again."""
    callback = IdleCallback()
    server = ps_server(callback, idle_milliseconds=400)
    client = ps_client(server)
    session = callback.session_of(client)
    gevent.sleep(0)
    action(client)
    native_sleep(1.5)
    callback.wait_for("on_close", session=session)
    return callback, session


def test_bytes_that_arrived_unread_win_over_the_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    send = functools.partial(ScriptedClient.send, data="in time")
    callback, session = while_the_hub_is_busy(send, ps_server, ps_client)
    assert callback.received(session) == b"in time"


def test_fin_that_arrived_unread_wins_over_the_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback, session = while_the_hub_is_busy(ScriptedClient.eof, ps_server, ps_client)
    assert callback.reasons(session) == [PsCloseReason.PEER_CLOSE]


def test_timeout_and_close_at_the_same_moment_close_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = IdleCallback()
    server = ps_server(callback, divide=1, idle_milliseconds=1_500)
    clients = [ps_client(server) for _ in range(50)]
    sessions = [callback.session_of(client) for client in clients]
    native_sleep(2.5)  # all deadlines have passed, and nobody has looked yet
    for session in sessions[::2]:
        session.close()
    callback.wait_for("on_close", len(sessions))
    let_canary_time_out(server)
    for session in sessions[::2]:
        assert callback.reasons(session) == [PsCloseReason.SELF_CLOSE]
    for session in sessions[1::2]:
        assert callback.reasons(session) == [PsCloseReason.TIMEOUT]


# What a look costs


class LookedAt:
    """A session as the idle timer sees it, which waits since 0 o'clock; counts the looks."""

    _open = True
    _frame_deadline = float("inf")
    waiting_since = 1e-9

    def __init__(self, idle: float) -> None:
        self.idle = idle
        self.looks = 0
        self.wakes = 0

    @property
    def _idle(self) -> float:
        self.looks += 1
        return self.idle

    def _wake(self) -> None:
        self.wakes += 1


def test_sessions_that_cannot_be_idle_yet_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions: list[Any] = [LookedAt(60.0), LookedAt(10.0)]
    place = IdleSlice()
    place.sessions.update(sessions)
    place.due = 0.0  # as after a change

    def looks_at(clock: float) -> list[int]:
        monkeypatch.setattr("psofa_gevent.owner.idle.monotonic", lambda: clock)
        place.look()
        return [session.looks for session in sessions]

    assert looks_at(1) == [1, 1]
    assert looks_at(2) == looks_at(9) == [1, 1]
    assert looks_at(11) == [2, 2]
    assert [session.wakes for session in sessions] == [0, 1]
    # It has got its bytes just then, and waits anew.
    sessions[1].waiting_since = 11.0
    assert looks_at(12) == [3, 3]
    assert looks_at(20) == [3, 3]
    assert looks_at(22) == [4, 4]
    assert [session.wakes for session in sessions] == [0, 2]


# on_idle: the callback acts instead


class AskingCallback(RecordingCallback):
    """What it does when a session is idle is what the test says; noted like any callback."""

    def __init__(self, on_idle: Callable[[PsSession], bool | None]) -> None:
        super().__init__()
        self.act = on_idle
        self.idle: list[PsSession] = []

    def on_idle(self, session: PsSession) -> bool | None:
        self.idle.append(session)
        return self.act(session)


class AskingAsyncCallback(AskingCallback):
    use_async_callback = True

    async def on_open_async(self, session: PsSession) -> None:
        self.on_open(session)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        self.on_message(session, message)

    async def on_eof_async(self, session: PsSession) -> None:
        self.on_eof(session)

    async def on_idle_async(self, session: PsSession) -> bool | None:
        return self.on_idle(session)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.on_close(session, close_reason)

    async def on_start_async(self, owner: Any) -> None:
        self.on_start(owner)

    async def on_stop_async(self, owner: Any) -> None:
        self.on_stop(owner)


asking = pytest.mark.parametrize("kind", [AskingCallback, AskingAsyncCallback])
"""Either kind of callback."""


@pytest.mark.parametrize(
    ("kind", "answer"),
    [(AskingCallback, None), (AskingCallback, 0), (AskingAsyncCallback, None)],
)
def test_on_idle_keeps_the_session_and_comes_again(
    kind: type[AskingCallback], answer: Any, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def ping(session: PsSession) -> bool | None:
        session.send("ping")
        return answer  # type: ignore[no-any-return]  # 0 is what a careless user returns

    callback = kind(ping)
    server = ps_server(callback, idle_milliseconds=100)
    client = ps_client(server)
    client.expect("ping")
    client.send("pong")
    (message,) = callback.wait_for("on_message")
    assert message.value == b"pong"
    client.expect("ping")
    assert not callback.named("on_close")


@asking
def test_on_idle_that_returns_false_closes_with_timeout(
    kind: type[AskingCallback], ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = kind(lambda session: callback.idle.count(session) < 2)
    client = ps_client(ps_server(callback, idle_milliseconds=50))
    client.expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.TIMEOUT
    assert len(callback.idle) == 2


@asking
def test_on_idle_may_close_the_session_itself(
    kind: type[AskingCallback], ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = kind(lambda session: session.close())
    client = ps_client(ps_server(callback, idle_milliseconds=50))
    client.expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.SELF_CLOSE
    assert len(callback.idle) == 1


@pytest.mark.logs_errors
@asking
def test_an_exception_in_on_idle_closes_with_failed(
    kind: type[AskingCallback], ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def fail(_session: PsSession) -> bool:
        raise KeyError("no such device")

    callback = kind(fail)
    ps_client(ps_server(callback, idle_milliseconds=50)).expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, KeyError)
    assert closed.session.close_cause.__context__ is None


@pytest.mark.logs_errors
def test_callback_timeout_ends_on_idle(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    callback = AskingCallback(lambda _session: gevent.sleep(60))
    ps_client(ps_server(callback, idle_milliseconds=50, callback_timeout=0.1)).expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED


def test_messages_that_come_while_on_idle_waits_are_handed_over_after_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    go_on = Event()
    order: list[str] = []

    def wait(_session: PsSession) -> None:
        if not order:
            order.append("begins")
            go_on.wait()
            order.append("ends")

    callback = AskingCallback(wait)
    server = ps_server(callback, idle_milliseconds=50)
    client = ps_client(server)
    eventually(lambda: order == ["begins"])
    client.send("hello")
    ps_client(server).send("another")  # whose session goes on meanwhile
    callback.wait_for("on_message")
    assert callback.received() == b"another"
    go_on.set()
    callback.wait_for("on_message", 2)
    assert order == ["begins", "ends"]
    assert callback.received() == b"anotherhello"


def test_on_idle_may_receive_messages_itself(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    asked: list[bytes] = []

    def ask(session: PsSession) -> None:
        if not asked:
            session.send("ping")
            asked.append(session.receive(timeout=10))

    callback = AskingCallback(ask)
    client = ps_client(ps_server(callback, idle_milliseconds=100, framing=Line()))
    client.expect("ping\n")
    client.send("pong\nmore\n")
    callback.wait_for("on_message")
    assert asked == [b"pong"]
    assert callback.received() == b"more"


def test_on_idle_may_wait_in_receive_for_an_answer_that_does_not_come_again_and_again(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def ask(session: PsSession) -> None:
        session.send("ping")
        with contextlib.suppress(TimeoutError):
            session.receive(timeout=0.3)

    callback = AskingCallback(ask)
    client = ps_client(ps_server(callback, idle_milliseconds=500))
    client.expect("ping" * 3)
    assert not callback.named("on_close")


def test_the_time_of_on_idle_is_not_the_frame_timeout_of_the_peer(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    go_on = Event()

    def wait(_session: PsSession) -> None:
        if len(callback.idle) == 1:
            go_on.wait()

    callback = AskingCallback(wait)
    settings: dict[str, Any] = {"framing": Line(), "frame_timeout": 1.5, "idle_milliseconds": 50}
    server = ps_server(callback, **settings)
    client = ps_client(server)
    client.send("half")
    eventually(lambda: callback.idle)
    client.send("ly\n")
    ps_client(server).send("half")
    (closed,) = callback.wait_for(
        "on_close", timeout=20
    )  # this one's time is over: so is the other's
    assert closed.value is PsCloseReason.FAILED
    go_on.set()
    callback.wait_for("on_message")
    assert callback.received() == b"halfly"


def test_a_message_that_does_not_go_on_is_late_also_with_on_idle(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = AskingCallback(lambda _session: None)
    settings: dict[str, Any] = {"framing": Line(), "frame_timeout": 2.5, "idle_milliseconds": 50}
    client = ps_client(ps_server(callback, **settings))
    client.send("half")
    (closed,) = callback.wait_for("on_close", timeout=20)
    assert closed.value is PsCloseReason.FAILED
    assert callback.idle


def test_a_callback_that_waits_in_receive_is_closed_without_on_idle(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = AskingCallback(lambda _session: True)
    callback.on_open = lambda session: session.receive()  # type: ignore[method-assign, assignment]
    ps_client(ps_server(callback, idle_milliseconds=50)).expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.TIMEOUT
    assert not callback.idle


def test_on_idle_is_called_when_the_peer_has_closed_its_half(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = AskingCallback(lambda session: callback.idle.count(session) < 2)
    client = ps_client(ps_server(callback, idle_milliseconds=50, allow_half_open=True))
    client.eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.TIMEOUT
    assert len(callback.idle) == 2
    assert callback.named("on_eof")


def test_a_client_has_on_idle_too() -> None:
    with ScriptedServer() as scripted:
        callback = AskingCallback(lambda session: session.send("ping"))
        with PsClient(callback, *scripted.address, idle_milliseconds=50):
            scripted.accept().expect("pingping")
