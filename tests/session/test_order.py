"""Point 1 of the design: on_open once, on_message in order, on_close once, whatever races.

The last test here throws everything at many sessions at once, at random; the ones before it take
the races one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections import defaultdict
from collections.abc import Callable, Iterator

import gevent
import gevent.event
import pytest
from gevent import monkey

from acting import STALLING, ActingCallback, sending, wait_until_stalled
from helpers import stalled_peer
from psofa_gevent import (
    PsClient,
    PsCloseReason,
    PsMultiClient,
    PsSendError,
    PsServer,
    PsSession,
)
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)

FOREVER = 600.0
"""Seconds for a setting that must not be what ends the test."""

block_the_hub: Callable[[float], None] = monkey.get_original("time", "sleep")


def session_greenlets(session: PsSession) -> list[gevent.Greenlet[..., object]]:
    """The greenlet in which the session lives, as a stranger finds it; none when it has ended."""
    return [
        each
        for each in gc.get_objects()
        if isinstance(each, gevent.Greenlet) and getattr(each, "session", None) is session
    ]


def greenlets_of_this_hub() -> list[gevent.Greenlet[..., object]]:
    """All that a stranger finds; not those of hubs that other tests have destroyed."""
    return [
        each
        for each in gc.get_objects()
        if isinstance(each, gevent.Greenlet) and each.loop is gevent.get_hub().loop
    ]


# The life of one session


def test_on_open_then_messages_in_order_then_on_close_each_where_it_belongs(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActingCallback(on_message=lambda session, message: session.send(message))
    client = ps_client(ps_server(callback))
    for number in range(50):
        client.send(f"{number:03}")
        client.expect(f"{number:03}")
    client.eof()
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.PEER_CLOSE
    assert callback.names(session) == ["on_open", *["on_message"] * 50, "on_close"]
    assert callback.received() == b"".join(b"%03d" % number for number in range(50))


def test_no_two_callbacks_of_one_session_at_a_time(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    running: set[PsSession] = set()

    def alone(session: PsSession, _value: object = None) -> None:
        assert session not in running
        running.add(session)
        gevent.sleep(0.002)
        running.remove(session)

    callback = ActingCallback(on_open=alone, on_message=alone, on_close=alone)
    server = ps_server(callback, read_buffer_size=10)
    clients = [ps_client(server) for _ in range(5)]
    for client in clients:
        client.send(b"x" * 100)
        client.eof()
    callback.wait_for("on_close", 5)
    assert len(callback.received()) == 500
    eventually(lambda: not running)
    assert {event.value for event in callback.named("on_close")} == {PsCloseReason.PEER_CLOSE}


def test_messages_wait_until_on_open_has_returned(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    go_on = gevent.event.Event()
    callback = ActingCallback(on_open=lambda session: go_on.wait())
    client = ps_client(ps_server(callback))
    client.send("early")
    client.eof()
    session = callback.opened()
    client.expect_nothing(0.05)
    assert callback.names(session) == ["on_open"]
    go_on.set()
    assert callback.closed(session) is PsCloseReason.PEER_CLOSE
    assert callback.names(session) == ["on_open", "on_message", "on_close"]


@pytest.mark.parametrize("end", [PsSession.close, PsSession.abort])
def test_no_message_after_a_callback_asked_for_the_close(
    ps_server: ServerFactory, ps_client: ClientFactory, end: Callable[[PsSession], None]
) -> None:
    callback = ActingCallback(on_message=lambda session, message: end(session))
    client = ps_client(ps_server(callback, read_buffer_size=1))
    client.send("123")
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE
    assert callback.received() == b"1"


@pytest.mark.parametrize("end", [PsSession.close, PsSession.abort])
def test_a_close_in_on_open_ends_the_session_without_a_message(
    ps_server: ServerFactory, ps_client: ClientFactory, end: Callable[[PsSession], None]
) -> None:
    callback = ActingCallback(on_open=end)
    client = ps_client(ps_server(callback))
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE
    assert callback.names(session) == ["on_open", "on_close"]
    with pytest.raises((AssertionError, ConnectionError)):
        client.expect_nothing()


def test_is_open_turns_false_when_the_close_is_requested_not_when_it_is_done(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    go_on = gevent.event.Event()
    callback = ActingCallback(on_message=lambda session, message: go_on.wait())
    client = ps_client(ps_server(callback))
    client.send("x")
    callback.wait_for("on_message")
    session = callback.opened()
    before = session.is_open
    session.close()
    assert (before, session.is_open) == (True, False)
    session.close()
    session.abort()
    assert not callback.named("on_close")
    go_on.set()
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE


@pytest.mark.logs_errors
@pytest.mark.parametrize("reason", [each for each in PsCloseReason if each.name != "NONE"])
def test_is_open_is_false_in_on_close_whatever_the_reason(
    ps_server: ServerFactory, ps_client: ClientFactory, reason: PsCloseReason
) -> None:
    seen: list[bool] = []

    def fail(session: PsSession, message: bytes) -> None:
        raise ValueError

    callback = ActingCallback(
        on_message=fail, on_close=lambda session, reason: seen.append(session.is_open)
    )
    server = ps_server(callback)
    client = ps_client(server)
    session = callback.opened()
    endings: dict[PsCloseReason, Callable[[], object]] = {
        PsCloseReason.PEER_CLOSE: client.eof,
        PsCloseReason.SELF_CLOSE: session.close,
        PsCloseReason.FAILED: lambda: client.send("x"),
        PsCloseReason.TIMEOUT: lambda: session.change_idle_milliseconds(1),
        PsCloseReason.SHUTDOWN: server.shutdown,
        PsCloseReason.REPLACED: lambda: session._ask_to_close(PsCloseReason.REPLACED),
    }
    endings[reason]()
    assert callback.closed(session) is reason
    assert seen == [False]


def test_a_wake_up_that_comes_too_late_does_not_disturb_the_callback_that_has_begun(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """The idle timer finds the sessions waiting, and in the same turn of the hub bytes arrive."""
    go_on = gevent.event.Event()
    returned: list[bool] = []
    callback = ActingCallback(on_message=lambda session, message: returned.append(go_on.wait(30)))
    server = ps_server(callback, idle_milliseconds=1_000, divide=1)
    clients = [ps_client(server) for _ in range(5)]
    callback.wait_for("on_open", 5)
    for client in clients:
        client.send("x")
    block_the_hub(1.1)  # when it goes on, all is due at once
    callback.wait_for("on_message", 5)
    gevent.sleep(0.01)
    assert returned == []
    go_on.set()
    eventually(lambda: returned == [True] * 5)
    assert not callback.named("on_close")


# Reasons that race: the first one wins

Ending = Callable[[PsServer, PsSession, ScriptedClient], object]


def shut_down(server: PsServer, session: PsSession, _client: ScriptedClient) -> object:
    gevent.spawn(server.shutdown)
    return eventually(lambda: not session.is_open)


def send_fin(_server: PsServer, _session: PsSession, client: ScriptedClient) -> object:
    with contextlib.suppress(OSError):  # there is nothing to half-close after an RST
        client.eof()
    return None


ENDINGS: dict[str, Ending] = {
    "close": lambda server, session, client: session.close(),
    "abort": lambda server, session, client: session.abort(),
    "kill": lambda server, session, client: gevent.killall(session_greenlets(session), block=False),
    "shutdown": shut_down,
    "peer's FIN": send_fin,
    "peer's RST": lambda server, session, client: client.reset(),
    "idle": lambda server, session, client: session.change_idle_milliseconds(1),
}
DECIDED_AT_ONCE = {
    "close": PsCloseReason.SELF_CLOSE,
    "abort": PsCloseReason.SELF_CLOSE,
    "shutdown": PsCloseReason.SHUTDOWN,
}
"""Those whose request is made when the call returns."""
STATES = ["waiting", "in a callback", "sending"]


@pytest.fixture
def busy() -> Iterator[gevent.event.Event]:
    """What a callback waits for; set at the end of the test at the latest."""
    event = gevent.event.Event()
    yield event
    event.set()


@pytest.mark.logs_errors
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("first", "second"),
    [(first, second) for first in DECIDED_AT_ONCE for second in ENDINGS if second != "shutdown"],
)
def test_the_first_reason_wins(
    ps_server: ServerFactory, busy: gevent.event.Event, state: str, first: str, second: str
) -> None:
    def act(session: PsSession, message: bytes) -> None:
        if message == b"wait":
            busy.wait()
        else:
            session.send(STALLING)

    callback = ActingCallback(on_message=act)
    server = ps_server(callback, linger_timeout=0.05, send_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        if state == "in a callback":
            client.send("wait")
            callback.wait_for("on_message")
        elif state == "sending":
            client.send("send")
            wait_until_stalled(session)
        ENDINGS[first](server, session, client)
        ENDINGS[second](server, session, client)
        if state == "in a callback" and second != "kill":
            gevent.sleep(0.005)
            assert not callback.named("on_close")
        busy.set()
        if first == "shutdown" and state == "sending" and second != "peer's RST":
            session.abort()  # a shutdown lets the callback send on, and this peer takes nothing
        assert callback.closed(session) is DECIDED_AT_ONCE[first]
        assert session.close_cause is None
        gevent.sleep(0.01)
        messages = [] if state == "waiting" else ["on_message"]
        assert callback.names(session) == ["on_open", *messages, "on_close"]
        assert server.get_session_count() == 0


@pytest.mark.logs_errors
@pytest.mark.parametrize("second", ENDINGS)
def test_an_exception_that_came_first_wins(
    ps_server: ServerFactory, ps_client: ClientFactory, second: str
) -> None:
    error = ValueError("first")

    def fail(session: PsSession, message: bytes) -> None:
        raise error

    # The peer has not taken all of what was sent, so the failed session lingers, and can be hit.
    callback = ActingCallback(on_message=fail)
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        sender = sending(session)
        wait_until_stalled(session)
        client.send("x")
        eventually(lambda: not session.is_open)
        assert not callback.named("on_close")
        ENDINGS[second](server, session, client)
        session.abort()
        assert callback.closed(session) is PsCloseReason.FAILED
        assert session.close_cause is error
        assert isinstance(sender.get(), PsSendError)


@pytest.mark.logs_errors
@pytest.mark.parametrize("end", [PsSession.close, PsSession.abort])
def test_a_close_wins_over_the_exception_that_its_callback_raises_after_it(
    ps_server: ServerFactory, ps_client: ClientFactory, end: Callable[[PsSession], None]
) -> None:
    def end_and_fail(session: PsSession, message: bytes) -> None:
        end(session)
        raise ValueError

    callback = ActingCallback(on_message=end_and_fail)
    ps_client(ps_server(callback)).send("x")
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.SELF_CLOSE
    assert session.close_cause is None


# Greenlets that strangers kill


def test_a_session_killed_before_it_started_calls_nothing_and_counts_no_more(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(RecordingCallback())
    callback = RecordingCallback()
    client = PsClient(callback, "127.0.0.1", server.address[1])
    session = client.connect()
    gevent.killall(session_greenlets(session))
    eventually(lambda: not session.is_open)
    assert client.get_session_count() == 0
    with pytest.raises(PsSendError):
        session.send("x")
    client.disconnect()
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]


@pytest.mark.logs_errors
@pytest.mark.parametrize("where", ["waiting", "on_open", "on_message", "on_eof", "send"])
@pytest.mark.parametrize("exception", [gevent.GreenletExit, ValueError, KeyError("instance")])
def test_a_killed_session_fails_and_gets_its_on_close_once(
    ps_server: ServerFactory,
    busy: gevent.event.Event,
    where: str,
    exception: type[BaseException] | BaseException,
) -> None:
    def act(session: PsSession, message: bytes) -> None:
        if where == "send":
            session.send(STALLING)
        elif where == "on_message":
            busy.wait()

    callback = ActingCallback(
        on_open=lambda session: where == "on_open" and busy.wait(),
        on_message=act,
        on_eof=lambda session: where == "on_eof" and busy.wait(),
    )
    server = ps_server(callback, linger_timeout=0.05, send_timeout=FOREVER, allow_half_open=True)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        if where == "on_eof":
            client.eof()
            callback.wait_for("on_eof")
        elif where == "send":
            client.send("x")
            wait_until_stalled(session)
        elif where == "on_message":
            client.send("x")
            callback.wait_for("on_message")
        [greenlet] = session_greenlets(session)
        greenlet.kill(exception, block=False)
        greenlet.kill(exception, block=False)
        greenlet.join()
        assert callback.closed(session) is PsCloseReason.FAILED
        cause = session.close_cause
        assert cause is exception or type(cause) is exception
        assert callback.names(session).count("on_close") == 1
        assert server.get_session_count() == 0


def test_a_session_killed_while_it_lingers_keeps_its_reason(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address):
        [opened] = callback.wait_for("on_open")
        session = opened.session
        assert session is not None
        sender = sending(session)
        wait_until_stalled(session)
        session.close()
        gevent.sleep(0.02)
        assert not callback.named("on_close")
        gevent.killall(session_greenlets(session))
        [closed] = callback.wait_for("on_close")
        assert closed.value is PsCloseReason.SELF_CLOSE
        assert session.close_cause is None
        sender.join()


@pytest.mark.logs_errors
@pytest.mark.parametrize("use_async_callback", [False, True])
@pytest.mark.parametrize("turns", range(8))
def test_a_session_killed_as_it_begins_gets_both_callbacks_or_neither(
    ps_server: ServerFactory, turns: int, use_async_callback: bool
) -> None:
    """However far it has come: a task, too, that is cancelled before its first step never runs."""
    server = ps_server(RecordingCallback())
    callback = RecordingCallback(use_async_callback=use_async_callback)
    with PsMultiClient(callback) as bundle:
        session = bundle.connect(*server.address[:2]).session
        [greenlet] = session_greenlets(session)
        for _ in range(turns):
            gevent.sleep(0)
        greenlet.kill()
    names = [event.name for event in callback.events if event.session is session]
    assert names in ([], ["on_open", "on_close"])
    assert session.is_open is False


class Holding(RecordingCallback):
    """An async callback that holds the asyncio loop when told to, so that other tasks wait."""

    def __init__(self) -> None:
        super().__init__(use_async_callback=True)
        self.go_on = gevent.event.Event()

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        self.on_message(session, message)
        self.go_on.wait()


@pytest.mark.logs_errors
@pytest.mark.parametrize("end", ["kill", "shutdown"])
def test_a_session_killed_before_its_async_on_open_began_gets_both_callbacks_or_neither(
    ps_client: ClientFactory, end: str
) -> None:
    callback = Holding()
    with serving(callback) as server:
        ps_client(server).send("hold")
        callback.wait_for("on_message")
        ps_client(server)
        eventually(lambda: len(server.sessions) == 2)
        gevent.sleep(0.01)
        session = server.sessions[1]
        if end == "kill":
            gevent.killall(session_greenlets(session), block=False)
            gevent.sleep(0.01)
        else:
            server.shutdown(timeout=0.05)
        callback.go_on.set()
    names = [event.name for event in callback.events if event.session is session]
    assert names in ([], ["on_open", "on_close"])


@pytest.mark.logs_errors
def test_an_async_on_close_comes_though_its_greenlet_was_killed_before_it_began(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Holding()
    server = ps_server(callback)
    first, second = ps_client(server), ps_client(server)
    callback.wait_for("on_open", 2)
    first.send("hold")
    callback.wait_for("on_message")
    second.eof()
    eventually(lambda: server.get_session_count() == 1)
    gevent.sleep(0.01)
    for each in greenlets_of_this_hub():
        if not hasattr(each, "session"):
            each.kill(block=False)
    gevent.sleep(0.01)
    callback.go_on.set()
    callback.wait_for("on_close")


class SlowToClose(RecordingCallback):
    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        gevent.sleep(0.001)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        await asyncio.sleep(0.001)


@pytest.mark.logs_errors
@pytest.mark.parametrize("use_async_callback", [False, True])
def test_on_close_comes_once_when_a_stranger_kills_every_greenlet_there_is(
    ps_server: ServerFactory, ps_client: ClientFactory, use_async_callback: bool
) -> None:
    callback = SlowToClose(use_async_callback=use_async_callback)
    server = ps_server(callback, idle_milliseconds=1)
    for _ in range(30):
        ps_client(server)
    callback.wait_for("on_open", 30)
    for _ in range(20):
        gevent.killall(greenlets_of_this_hub(), block=False)
        gevent.sleep(0.003)
    callback.wait_for("on_close", 30)
    one_more = ps_client(server)
    one_more.send("still serving")
    eventually(lambda: callback.received() == b"still serving")
    one_more.eof()
    callback.wait_for("on_close", 31)
    assert len(callback.named("on_open")) == len(callback.named("on_close")) == 31
    assert server.get_session_count() == 0


# Shutdown


@pytest.mark.parametrize("turns", range(5))
def test_a_shutdown_gives_both_callbacks_or_neither(turns: int) -> None:
    """However far the sessions have come since their connections: the first turns of the hub."""
    callback = RecordingCallback()
    server = PsServer(callback, host="127.0.0.1", port=0)
    server.start()
    clients = [ScriptedClient(server.address) for _ in range(20)]
    for _ in range(turns):
        gevent.sleep(0)
    server.shutdown()
    for client in clients:
        client.close()
    opened = [event.session for event in callback.named("on_open")]
    closed = [event.session for event in callback.named("on_close")]
    assert len(set(opened)) == len(opened)
    assert set(opened) == set(closed)
    assert len(closed) == len(opened)
    assert {event.value for event in callback.named("on_close")} <= {PsCloseReason.SHUTDOWN}
    assert callback.events[-1].name == "on_stop"


def test_a_client_that_disconnects_at_once_gets_both_callbacks(ps_server: ServerFactory) -> None:
    server = ps_server(RecordingCallback())
    callback = RecordingCallback()
    with PsMultiClient(callback) as bundle:
        session = bundle.connect("127.0.0.1", server.address[1]).session
    assert not session.is_open
    names = [event.name for event in callback.events]
    assert names == ["on_start", "on_open", "on_close", "on_stop"]
    assert callback.named("on_close")[0].value is PsCloseReason.SELF_CLOSE


# Everything at once

PATTERN = random.Random(0).randbytes(100_000)


class Chronicle(RecordingCallback):
    """Checks the order while it happens, and makes trouble with the sessions at random."""

    def __init__(self, rng: random.Random, *, use_async_callback: bool) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self.claims: dict[PsSession, PsCloseReason] = {}
        self.faults: list[str] = []
        self.attackers: list[gevent.Greenlet[..., object]] = []
        self._rng = rng
        self._running: set[PsSession] = set()

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self.send_attackers(session)
        self.work(session)

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        self.work(session)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        if session in self._running:
            self.faults.append(f"{session!r}: on_close while another callback ran")
        if self._rng.random() < 0.1:
            raise ValueError("in on_close")

    async def on_open_async(self, session: PsSession) -> None:
        super().on_open(session)
        self.send_attackers(session)
        await self.work_async(session)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        await self.work_async(session)

    # Callbacks that take their time, send, fail, close

    def work(self, session: PsSession) -> None:
        with self.alone(session):
            chance = self._rng.random()
            if chance < 0.3:
                gevent.sleep(0.001 + chance * 0.01)
            elif chance < 0.6:
                self.send(session)
            else:
                self.fail_or_close(session, chance)

    async def work_async(self, session: PsSession) -> None:
        with self.alone(session):
            chance = self._rng.random()
            if chance < 0.3:
                await asyncio.sleep(0.001 + chance * 0.01)
            elif chance < 0.6:
                with self.send_error_means_closed(session):
                    await session.send_async(self.any_message(), 0.05)
            else:
                self.fail_or_close(session, chance)

    @contextlib.contextmanager
    def alone(self, session: PsSession) -> Iterator[None]:
        if session in self._running:
            self.faults.append(f"{session!r}: two callbacks at a time")
        self._running.add(session)
        try:
            yield
        finally:
            self._running.discard(session)

    def fail_or_close(self, session: PsSession, chance: float) -> None:
        if chance > 0.97:
            if not self.use_async_callback:  # there a close may come in before the task has ended
                self.claim(session, PsCloseReason.FAILED)
            raise self._rng.choice([ValueError, gevent.Timeout, gevent.GreenletExit])
        if chance > 0.94:
            self.close(session)

    def any_message(self) -> bytes:
        return bytes(self._rng.choice([0, 1, 1_000, 3_000_000]))

    @contextlib.contextmanager
    def send_error_means_closed(self, session: PsSession) -> Iterator[None]:
        try:
            yield
        except PsSendError:
            if session.is_open:
                self.faults.append(f"{session!r}: a failed send left it open")

    # Attacks from elsewhere

    def send_attackers(self, session: PsSession) -> None:
        attacks = [self.close, self.close_in_thread, self.abort, self.kill, self.idle, self.send]
        for _ in range(self._rng.choice([0, 0, 1, 2, 3])):
            delay = 0.001 + self._rng.random() * 0.5
            self.attackers.append(gevent.spawn_later(delay, self._rng.choice(attacks), session))

    def claim(self, session: PsSession, reason: PsCloseReason) -> None:
        """What is about to be asked for is the session's reason, if nothing was before."""
        if session.is_open:
            self.claims[session] = reason

    def close(self, session: PsSession) -> None:
        self.claim(session, PsCloseReason.SELF_CLOSE)
        session.close()

    def close_in_thread(self, session: PsSession) -> None:
        gevent.get_hub().threadpool.apply(session.close)

    def abort(self, session: PsSession) -> None:
        self.claim(session, PsCloseReason.SELF_CLOSE)
        session.abort()

    def kill(self, session: PsSession) -> None:
        gevent.killall(session_greenlets(session), block=False)

    def idle(self, session: PsSession) -> None:
        session.change_idle_milliseconds(1)

    def send(self, session: PsSession) -> None:
        with self.send_error_means_closed(session):
            session.send(self.any_message(), 0.05)


def random_peer(
    rng: random.Random, address: tuple[object, ...], sent: defaultdict[object, list[int]]
) -> None:
    """Sends pieces of `PATTERN`; notes in `sent` how much, if it could send all that it wanted.

    By its endpoint, which another peer may have had before.
    """
    # Its session is ended at any time, or the server is.
    with contextlib.suppress(OSError), ScriptedClient(address) as peer:
        reader = gevent.spawn(read_all, peer) if rng.random() < 0.7 else None
        try:
            sent[peer.local_endpoint].append(send_randomly(rng, peer))
            ending = rng.choice(["FIN", "RST", "nothing"])
            if ending == "FIN":
                peer.eof()
            elif ending == "RST":
                peer.reset()
        finally:
            if reader is not None:
                reader.join()


def send_randomly(rng: random.Random, peer: ScriptedClient) -> int:
    total = 0
    for _ in range(rng.randrange(20)):
        size = rng.choice([1, 10, 3_000])
        peer.send(PATTERN[total : total + size])
        total += size
        gevent.sleep(0.001 + rng.random() * 0.02)
    return total


def read_all(peer: ScriptedClient) -> None:
    # AssertionError: a reset; OSError: `random_peer` closed it.
    with contextlib.suppress(AssertionError, OSError):
        peer.receive_until_eof()


@pytest.mark.logs_errors
@pytest.mark.parametrize("use_async_callback", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_order_holds_for_many_sessions_when_everything_races(
    seed: int, use_async_callback: bool
) -> None:
    rng = random.Random(seed)
    callback = Chronicle(rng, use_async_callback=use_async_callback)
    sent: defaultdict[object, list[int]] = defaultdict(list)
    server = PsServer(callback, host="127.0.0.1", port=0, linger_timeout=0.2)
    server.start()
    counts = [server.get_session_count()]
    peers = [
        gevent.spawn_later(0.001 + rng.random(), random_peer, rng, server.address, sent)
        for _ in range(80)
    ]
    for _ in range(rng.randrange(110, 140)):
        gevent.sleep(0.01)
        counts.append(server.get_session_count())
    server.shutdown(timeout=rng.choice([0, 0.05, 5]))
    assert server.get_session_count() == 0
    recorded = list(callback.events)
    gevent.joinall(peers, raise_error=True)
    gevent.joinall(callback.attackers, raise_error=True)

    assert callback.faults == []
    assert callback.events == recorded, "something was called after the shutdown"
    assert 0 <= min(counts) <= max(counts) <= len(peers)
    assert max(counts) > 10
    sessions = [event.session for event in callback.named("on_open")]
    assert len(set(sessions)) == len(sessions) > 40
    for session in sessions:
        assert session is not None
        check_life(callback, session, sent[session.remote_endpoint])
    seen = {event.value for event in callback.named("on_close")}
    assert len(seen) >= 3, "too tame to prove anything"


def check_life(callback: Chronicle, session: PsSession, sent: list[int]) -> None:
    names = [event.name for event in callback.events if event.session is session]
    assert names == ["on_open", *["on_message"] * (len(names) - 2), "on_close"]
    [closed] = callback.named("on_close", session)
    received = callback.received(session)
    assert PATTERN.startswith(received)
    assert session.bytes_received == len(received)
    assert session.messages_received == len(names) - 2
    if closed.value is PsCloseReason.PEER_CLOSE:
        assert len(received) in sent
    assert closed.value is not PsCloseReason.NONE
    assert closed.value is callback.claims.get(session, closed.value)
    assert (session.close_cause is None) == (closed.value is not PsCloseReason.FAILED)
    assert not session.is_open
