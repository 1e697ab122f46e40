"""``callback_timeout``: a callback that runs too long is ended, and nobody else notices.

In ``on_open``, ``on_message`` and ``on_eof`` that is FAILED with a `TimeoutError` as its cause; in
``on_close`` and ``on_stop`` it is logged, and the next one's turn comes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import gevent
import gevent.lock
import pytest
from gevent import monkey
from gevent.event import AsyncResult, Event

from helpers import Stopwatch, stalled_peer, takes
from marks import sync_and_async
from psofa_gevent import PsClient, PsCloseReason, PsMultiClient, PsServer, PsSession
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

native_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")
"""Blocks the hub, in a patched process too."""

LIMIT = 0.2
"""Seconds: the callback_timeout of these tests."""

Owner: TypeAlias = PsServer | PsClient | PsMultiClient


class ActsIn(RecordingCallback):
    """Calls `act` in one of its methods, sync or async, and notes how that ended."""

    def __init__(
        self,
        method: str,
        act: Callable[[], object] = lambda: gevent.sleep(60),
        act_async: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(60),
        *,
        use_async_callback: bool = False,
    ) -> None:
        super().__init__(reply=bytes, use_async_callback=use_async_callback)
        self._method = method
        self._act = act
        self._act_async = act_async
        self.only_for: PsSession | None = None
        self.ended: list[BaseException | None] = []

    def _acts_in(self, method: str, session: PsSession | None) -> bool:
        return method == self._method and self.only_for in (None, session)

    def _do(self, method: str, session: PsSession | None) -> None:
        if self._acts_in(method, session):
            try:
                self._act()
            except BaseException as error:
                self.ended.append(error)
                raise
            self.ended.append(None)

    async def _do_async(self, method: str, session: PsSession | None) -> None:
        if self._acts_in(method, session):
            try:
                await self._act_async()
            except BaseException as error:
                self.ended.append(error)
                raise
            self.ended.append(None)

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self._do("on_open", session)

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        self._do("on_message", session)

    def on_eof(self, session: PsSession) -> None:
        super().on_eof(session)
        self._do("on_eof", session)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        self._do("on_close", session)

    def on_stop(self, owner: Owner) -> None:
        super().on_stop(owner)
        self._do("on_stop", None)

    async def on_open_async(self, session: PsSession) -> None:
        RecordingCallback.on_open(self, session)
        await self._do_async("on_open", session)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        await self._do_async("on_message", session)

    async def on_eof_async(self, session: PsSession) -> None:
        RecordingCallback.on_eof(self, session)
        await self._do_async("on_eof", session)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        RecordingCallback.on_close(self, session, close_reason)
        await self._do_async("on_close", session)

    async def on_stop_async(self, owner: Owner) -> None:
        RecordingCallback.on_stop(self, owner)
        await self._do_async("on_stop", None)


in_session_methods = pytest.mark.parametrize("method", ["on_open", "on_message", "on_eof"])


def provoke(method: str, client: ScriptedClient) -> None:
    if method == "on_message":
        client.send("x")
    if method == "on_eof":
        client.eof()


def expect_failed_by_the_limit(callback: RecordingCallback, stopwatch: Stopwatch) -> PsSession:
    """Wait for ``on_close(FAILED)`` soon after the limit; the session, which knows the cause."""
    close = callback.wait_for("on_close")[0]
    stopwatch.check(LIMIT, most=LIMIT)
    assert close.value is PsCloseReason.FAILED
    assert close.session is not None
    assert isinstance(close.session.close_cause, TimeoutError)
    assert f"{LIMIT:g}" in str(close.session.close_cause)
    return close.session


# on_open, on_message, on_eof


@pytest.mark.logs_errors
@sync_and_async
@in_session_methods
def test_callback_that_runs_too_long_is_ended_and_fails_its_session(
    method: str, use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn(method, use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=LIMIT, allow_half_open=True)
    stopwatch = Stopwatch()
    client = ps_client(server)
    provoke(method, client)
    session = expect_failed_by_the_limit(callback, stopwatch)
    assert method in str(session.close_cause)
    expected = asyncio.CancelledError if use_async_callback else TimeoutError
    assert len(callback.ended) == 1
    assert isinstance(callback.ended[0], expected)
    assert server.get_session_count() == 0


@pytest.mark.logs_errors
@sync_and_async
@in_session_methods
def test_callback_that_swallows_the_error_gets_it_again_until_it_ends(
    method: str, use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    swallowed: list[float] = []

    def swallow() -> None:
        while len(swallowed) < 3:
            try:
                gevent.sleep(60)
            except TimeoutError:
                swallowed.append(time.monotonic())

    async def swallow_async() -> None:
        while len(swallowed) < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed.append(time.monotonic())

    callback = ActsIn(method, swallow, swallow_async, use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=LIMIT, allow_half_open=True)
    client = ps_client(server)
    provoke(method, client)
    close = callback.wait_for("on_close")[0]
    # Swallowed to the end and returned: the session has failed all the same.
    assert callback.ended == [None]
    assert len(swallowed) == 3
    assert close.value is PsCloseReason.FAILED
    assert close.session is not None
    assert isinstance(close.session.close_cause, TimeoutError)


@pytest.mark.logs_errors
@sync_and_async
def test_session_is_closed_for_others_as_soon_as_the_time_is_over(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    let_go = Event()

    def swallow() -> None:
        while not let_go.is_set():
            try:
                gevent.sleep(60)
            except TimeoutError:
                pass

    async def swallow_async() -> None:
        while not let_go.is_set():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    callback = ActsIn("on_message", swallow, swallow_async, use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=LIMIT)
    ps_client(server).send("x")
    session = callback.wait_for("on_message")[0].session
    assert session is not None
    eventually(lambda: not session.is_open)
    assert not callback.named("on_close")
    let_go.set()
    callback.wait_for("on_close")


@pytest.mark.logs_errors
@sync_and_async
def test_callback_that_swallows_everything_is_ended_by_the_shutdown(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    swallowed = 0

    def swallow_errors() -> None:
        nonlocal swallowed
        while True:
            try:
                gevent.sleep(60)
            except Exception:
                swallowed += 1

    async def swallow_cancellations() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if not server.started:
                    raise

    callback = ActsIn(
        "on_message", swallow_errors, swallow_cancellations, use_async_callback=use_async_callback
    )
    server = ps_server(callback, callback_timeout=0.01)
    ps_client(server).send("x")
    callback.wait_for("on_message")
    eventually(lambda: swallowed > 2)
    server.shutdown(timeout=0.1)
    assert callback.named("on_close")[0].value is PsCloseReason.FAILED


@sync_and_async
def test_each_callback_has_the_whole_time_for_itself(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn(
        "on_message",
        lambda: gevent.sleep(0.02),
        lambda: asyncio.sleep(0.02),
        use_async_callback=use_async_callback,
    )
    server = ps_server(callback, callback_timeout=1.0)
    client = ps_client(server)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        client.send("x")
        client.expect("x")
    assert None in callback.ended
    assert set(callback.ended) == {None}
    client.eof()
    assert callback.wait_for("on_close")[0].value is PsCloseReason.PEER_CLOSE


@sync_and_async
def test_waiting_for_the_next_message_is_not_the_callbacks_time(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback(reply=bytes, use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=0.5)
    client = ps_client(server)
    for _ in range(3):
        client.send("x")
        client.expect("x")
        client.expect_nothing(0.7)


@sync_and_async
def test_callback_timeout_none_lets_a_callback_run(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn(
        "on_message",
        lambda: gevent.sleep(0.3),
        lambda: asyncio.sleep(0.3),
        use_async_callback=use_async_callback,
    )
    client = ps_client(ps_server(callback, callback_timeout=None))
    client.send("x")
    eventually(lambda: callback.ended == [None])


@pytest.mark.logs_errors
def test_callback_that_runs_too_long_costs_the_other_sessions_nothing(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn("on_message")
    server = ps_server(callback, callback_timeout=LIMIT)
    slow, quick = ps_client(server), ps_client(server)
    sessions = [event.session for event in callback.wait_for("on_open", 2)]
    (callback.only_for,) = (
        session
        for session in sessions
        if session is not None and session.remote_endpoint == slow.local_endpoint
    )
    slow.send("x")
    while not callback.named("on_close"):
        quick.send("y")
        quick.expect("y")
    slow.expect("x")
    slow.expect_eof()
    quick.send("z")
    quick.expect("z")


@pytest.mark.logs_errors
def test_many_callbacks_that_run_too_long_are_all_ended(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn("on_open")
    server = ps_server(callback, callback_timeout=LIMIT)
    for _ in range(100):
        ps_client(server)
    closes = callback.wait_for("on_close", 100, timeout=20)
    assert {event.value for event in closes} == {PsCloseReason.FAILED}
    causes = [event.session.close_cause for event in closes if event.session is not None]
    assert all(isinstance(cause, TimeoutError) for cause in causes)
    assert len({id(cause) for cause in causes}) == 100


def never() -> object:
    return Event().wait()


def wait_for_a_result() -> object:
    result: AsyncResult[object] = AsyncResult()
    return result.get()


def join_a_greenlet() -> None:
    sleeping = gevent.spawn(gevent.sleep, 60)
    try:
        sleeping.get()
    finally:
        sleeping.kill()


def take_a_lock_twice() -> None:
    lock = gevent.lock.BoundedSemaphore()
    with lock:
        lock.acquire()


def sleep_with_a_later_timeout() -> None:
    with gevent.Timeout(30):
        gevent.sleep(60)


@pytest.mark.logs_errors
@pytest.mark.parametrize(
    "wait",
    [
        lambda: gevent.sleep(60),
        never,
        wait_for_a_result,
        join_a_greenlet,
        take_a_lock_twice,
        sleep_with_a_later_timeout,
    ],
    ids=["sleep", "event", "result", "greenlet", "lock", "timeout"],
)
def test_callback_is_ended_wherever_in_gevent_it_waits(
    wait: Callable[[], object], ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn("on_message", wait)
    client = ps_client(ps_server(callback, callback_timeout=LIMIT))
    callback.wait_for("on_open")
    stopwatch = Stopwatch()
    client.send("x")
    expect_failed_by_the_limit(callback, stopwatch)


@pytest.mark.logs_errors
def test_callback_that_blocked_the_thread_beyond_its_time_is_ended_at_its_next_wait(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def block_and_wait() -> None:
        native_sleep(2 * LIMIT)
        gevent.sleep(60)

    callback = ActsIn("on_message", block_and_wait)
    client = ps_client(ps_server(callback, callback_timeout=LIMIT))
    callback.wait_for("on_open")
    stopwatch = Stopwatch()
    client.send("x")
    expect_failed_by_the_limit(callback, stopwatch)


async def wait_in_a_task_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(60))
        group.create_task(asyncio.sleep(60))


async def wait_for_a_future() -> None:
    await asyncio.get_running_loop().create_future()


async def wait_with_a_later_timeout() -> None:
    async with asyncio.timeout(30):
        await asyncio.sleep(60)


async def wait_in_gevents_way() -> None:
    gevent.sleep(60)


@pytest.mark.logs_errors
@pytest.mark.parametrize(
    "wait",
    [wait_in_a_task_group, wait_for_a_future, wait_with_a_later_timeout, wait_in_gevents_way],
)
def test_async_callback_is_ended_wherever_it_waits(
    wait: Callable[[], Awaitable[object]], ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn("on_message", act_async=wait, use_async_callback=True)
    client = ps_client(ps_server(callback, callback_timeout=LIMIT))
    callback.wait_for("on_open")
    stopwatch = Stopwatch()
    client.send("x")
    expect_failed_by_the_limit(callback, stopwatch)


class SendsTooLong(RecordingCallback):
    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        session.send(bytes(32 * 1024 * 1024), timeout=None)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        await session.send_async(bytes(32 * 1024 * 1024), timeout=None)


@pytest.mark.logs_errors
@sync_and_async
def test_callback_that_waits_for_something_else_is_at_fault_though_its_peer_reads_nothing(
    use_async_callback: bool, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Another session's callback waits in a send to that peer meanwhile."""

    class Both(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            if message == b"send":
                slow.send(bytes(32 * 1024 * 1024), timeout=None)
            else:
                gevent.sleep(60)

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            RecordingCallback.on_message(self, session, message)
            if message == b"send":
                await slow.send_async(bytes(32 * 1024 * 1024), timeout=None)
            else:
                await asyncio.sleep(60)

    callback = Both(use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=LIMIT, linger_timeout=0.0)
    with stalled_peer(server.address) as peer, ScriptedClient(server.address) as other:
        callback.wait_for("on_open", 2)
        slow = next(each for each in server.sessions if each.remote_endpoint == peer.local_endpoint)
        peer.send("sleep")
        callback.wait_for("on_message", 1)
        other.send("send")
        callback.wait_for("on_close", 2)
    failed = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert [each.startswith(f"<PsSession {slow.connection_id}") for each in failed].count(True) == 1


@pytest.mark.logs_errors
@sync_and_async
def test_callback_whose_send_waits_too_long_is_ended(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = SendsTooLong(use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=LIMIT, linger_timeout=0.0)
    with stalled_peer(server.address) as peer:
        callback.wait_for("on_open")
        stopwatch = Stopwatch()
        peer.send("x")
        expect_failed_by_the_limit(callback, stopwatch)


@pytest.mark.logs_errors
@sync_and_async
def test_close_requested_before_keeps_its_reason_and_the_limit_ends_the_callback(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn("on_message", use_async_callback=use_async_callback)
    client = ps_client(ps_server(callback, callback_timeout=LIMIT))
    client.send("x")
    session = callback.wait_for("on_message")[0].session
    assert session is not None
    session.close()
    assert callback.wait_for("on_close")[0].value is PsCloseReason.SELF_CLOSE
    assert session.close_cause is None
    assert len(callback.ended) == 1


@pytest.mark.logs_errors
def test_callback_ended_during_a_shutdown_keeps_the_shutdowns_reason(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsIn("on_message")
    server = ps_server(callback, callback_timeout=LIMIT)
    ps_client(server).send("x")
    callback.wait_for("on_message")
    with takes(most=LIMIT):
        server.shutdown(timeout=30.0)
    assert callback.named("on_close")[0].value is PsCloseReason.SHUTDOWN
    assert isinstance(callback.ended[0], TimeoutError)


@pytest.mark.logs_errors
def test_error_of_a_users_own_timeout_is_the_cause_when_it_comes_first(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    own = TimeoutError("the user's own")

    def sleep_with_own_timeout() -> None:
        with gevent.Timeout(0.05, own):
            gevent.sleep(60)

    callback = ActsIn("on_message", sleep_with_own_timeout)
    client = ps_client(ps_server(callback, callback_timeout=5.0))
    client.send("x")
    close = callback.wait_for("on_close")[0]
    assert close.value is PsCloseReason.FAILED
    assert close.session is not None
    assert close.session.close_cause is own


@pytest.mark.logs_errors
@pytest.mark.parametrize("make", [PsClient, PsMultiClient])
def test_callback_timeout_holds_for_clients(
    make: Any, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(RecordingCallback())
    callback = ActsIn("on_open")
    stopwatch = Stopwatch()
    if make is PsClient:
        client = PsClient(callback, *server.address, callback_timeout=LIMIT)
        client.connect()
        expect_failed_by_the_limit(callback, stopwatch)
        client.disconnect()
    else:
        with PsMultiClient(callback, callback_timeout=LIMIT) as bundle:
            bundle.connect(*server.address)
            expect_failed_by_the_limit(callback, stopwatch)


# on_close and on_stop


def errors_about(caplog: pytest.LogCaptureFixture, method: str) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "psofa_gevent"
        and record.levelno >= logging.ERROR
        and method in record.getMessage()
    ]


@pytest.mark.logs_errors
@sync_and_async
def test_on_close_that_runs_too_long_is_ended_and_logged_and_the_next_one_comes(
    use_async_callback: bool,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = ActsIn("on_close", use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=LIMIT)
    clients = [ps_client(server) for _ in range(3)]
    callback.wait_for("on_open", 3)
    for client in clients:
        client.eof()
    eventually(lambda: server.get_session_count() == 0)
    closes = callback.wait_for("on_close", 3)
    eventually(lambda: len(callback.ended) == 3)
    # The limit ends the callback, not the session, which had ended before.
    assert {event.value for event in closes} == {PsCloseReason.PEER_CLOSE}
    assert all(event.session and event.session.close_cause is None for event in closes)
    server.shutdown()
    assert len(errors_about(caplog, "on_close")) == 3


@pytest.mark.logs_errors
@sync_and_async
def test_on_close_that_swallows_the_error_gets_it_again(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    swallowed: list[BaseException] = []

    def swallow() -> None:
        while len(swallowed) < 3:
            try:
                gevent.sleep(60)
            except TimeoutError as error:
                swallowed.append(error)

    async def swallow_async() -> None:
        while len(swallowed) < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError as error:
                swallowed.append(error)

    callback = ActsIn("on_close", swallow, swallow_async, use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=0.1)
    ps_client(server).eof()
    eventually(lambda: callback.ended == [None])
    assert len(swallowed) == 3
    ps_client(server).eof()
    eventually(lambda: len(callback.ended) == 2)


@pytest.mark.logs_errors
@sync_and_async
def test_on_stop_that_runs_too_long_is_ended_and_logged(
    use_async_callback: bool,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = ActsIn("on_stop", use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=LIMIT)
    ps_client(server)
    callback.wait_for("on_open")
    with takes(most=LIMIT):
        server.shutdown(timeout=30.0)
    assert len(callback.ended) == 1
    assert callback.named("on_close")[0].value is PsCloseReason.SHUTDOWN
    assert len(errors_about(caplog, "on_stop")) == 1
    server.start()
    server.shutdown(timeout=30.0)
    assert len(callback.ended) == 2


@pytest.mark.logs_errors
def test_failed_callback_and_its_on_close_have_a_limit_each(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class SlowTwice(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            gevent.sleep(60)

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            try:
                gevent.sleep(60)
            finally:
                ended.append(time.monotonic())

    ended: list[float] = []
    callback = SlowTwice()
    server = ps_server(callback, callback_timeout=LIMIT)
    client = ps_client(server)
    callback.wait_for("on_open")
    stopwatch = Stopwatch()
    client.send("x")
    expect_failed_by_the_limit(callback, stopwatch)
    eventually(lambda: ended)
    stopwatch.check_moment(ended[0], 2 * LIMIT, most=2 * LIMIT)


# Limits that are over before, or at, the moment when a callback ends


@pytest.mark.logs_errors
@sync_and_async
def test_callback_that_returns_just_when_its_time_is_over_is_ended_or_not_but_nothing_else_is(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    limit = 0.05
    pauses = [limit * share for share in (0.9, 0.98, 1.0, 1.0, 1.0, 1.02, 1.1)] * 3

    class ReturnsInTime(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            gevent.sleep(float(message))
            returned.append(session)

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            await super().on_message_async(session, message)
            await asyncio.sleep(float(message))
            returned.append(session)

    returned: list[PsSession] = []
    callback = ReturnsInTime(use_async_callback=use_async_callback)
    server = ps_server(callback, callback_timeout=limit)
    clients = [ps_client(server) for _ in pauses]
    callback.wait_for("on_open", len(pauses))
    for client, pause in zip(clients, pauses, strict=True):
        client.send(f"{pause}")

    def failed() -> set[PsSession | None]:
        return {event.session for event in callback.named("on_close")}

    eventually(lambda: len(failed() | set(returned)) == len(pauses))
    gevent.sleep(2 * limit)  # a limit that is over now must not hit the session's wait
    if not use_async_callback:  # a coroutine's end may be known to its session only after the limit
        assert not failed() & set(returned)
    assert set(server.sessions) == set(returned) - failed()


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_callback_timeout_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="callback_timeout"):
        PsServer(RecordingCallback(), callback_timeout=value)
