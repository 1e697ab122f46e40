"""`shutdown`: what it ends, in which time, and that every session hears of it.

The same `Shutdown` ends `PsClient.disconnect` and `PsMultiClient.destroy_bundle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from gevent import GreenletExit, monkey
from gevent.event import Event

from helpers import (
    LOOPBACK,
    NativeThread,
    close_reasons,
    echo,
    living_greenlets,
    local_server,
    stalled_peer,
    takes,
)
from psofa_gevent import (
    PsCloseReason,
    PsMultiClient,
    PsServer,
    PsServerError,
    PsSession,
    run_coroutine,
)
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

FOREVER = 120.0
"""Seconds: longer than any test, not longer than its greenlet may live if the test fails."""
SECOND_BOUND = 1.0
"""Seconds that killed callbacks have at least (design: point 8)."""

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")

sync_and_async = pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])


@contextlib.contextmanager
def serving_clients(
    callback: RecordingCallback, count: int, **settings: Any
) -> Iterator[tuple[PsServer, list[ScriptedClient]]]:
    """A started server and clients of it, all of them open."""
    with local_server(callback, **settings) as server, contextlib.ExitStack() as stack:
        stack.callback(server.shutdown, 0)
        clients = [stack.enter_context(ScriptedClient(server.address)) for _ in range(count)]
        callback.wait_for("on_open", count)
        yield server, clients


def assert_all_closed(callback: RecordingCallback, reason: PsCloseReason, count: int) -> None:
    """Every session that was opened got one on_close, on_stop came last."""
    assert close_reasons(callback) == [reason] * count
    assert len(callback.named("on_open")) == count
    assert callback.events[-1].name == "on_stop"


def swallow_kills(until: Event, kills: list[object] | None = None) -> None:
    """Wait for `until`, whatever is thrown in meanwhile."""
    while not until.is_set():
        try:
            until.wait(FOREVER)
        except GreenletExit as kill:
            if kills is not None:
                kills.append(kill)


async def swallow_cancels(until: Event, kills: list[object] | None = None) -> None:
    while not until.is_set():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError as kill:
            if kills is not None:
                kills.append(kill)


class Hanging(RecordingCallback):
    """Its on_message never ends by itself, and does not resist its end."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        gevent.sleep(FOREVER)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        await asyncio.sleep(FOREVER)


class Resisting(RecordingCallback):
    """Its on_message ends when the test says so, or when it was killed `kills` times."""

    def __init__(self, kills: int, *, use_async_callback: bool = False) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self.kills_left = kills
        self.go_on = Event()

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        while self.kills_left > 0 and not self.go_on.is_set():
            try:
                self.go_on.wait(FOREVER)
            except GreenletExit:
                self.kills_left -= 1

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        while self.kills_left > 0 and not self.go_on.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                self.kills_left -= 1


def resisting_for_ever(*, use_async: bool = False) -> Resisting:
    return Resisting(1_000_000, use_async_callback=use_async)


def errors_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


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


# Running callbacks


@sync_and_async
def test_running_callbacks_finish_and_their_replies_arrive(use_async: bool) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            gevent.sleep(0.2)
            session.send("late reply")

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            await super().on_message_async(session, message)
            await asyncio.sleep(0.2)
            await session.send_async("late reply")

    callback = Callback(use_async_callback=use_async)
    with serving_clients(callback, 5) as (server, clients):
        for client in clients:
            client.send("question")
        callback.wait_for("on_message", 5)
        with takes(0.1, most=1):
            server.shutdown(timeout=20)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 5)
        for client in clients:
            client.expect("late reply")
            client.expect_eof()


def test_running_on_open_finishes_too() -> None:
    class Callback(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            gevent.sleep(0.1)
            session.send("welcome")

    callback = Callback()
    with serving_clients(callback, 3) as (server, clients):
        server.shutdown(timeout=20)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 3)
        for client in clients:
            client.expect("welcome")
            client.expect_eof()


def test_no_on_message_begins_after_the_shutdown_did() -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            go_on.wait()

    go_on = Event()
    callback = Callback()
    with serving_clients(callback, 1) as (server, [client]):
        client.send("first")
        session = callback.wait_for("on_message")[0].session
        assert session is not None
        client.send("second")
        stopper = gevent.spawn(server.shutdown, 20)
        eventually(lambda: not session.is_open)
        go_on.set()
        stopper.get(timeout=5)
        assert callback.received() == b"first"


@sync_and_async
def test_hanging_callbacks_are_killed_at_the_timeout_and_get_on_close(use_async: bool) -> None:
    callback = Hanging(use_async_callback=use_async)
    with serving_clients(callback, 10) as (server, clients):
        for client in clients[:5]:
            client.send("hang")
        callback.wait_for("on_message", 5)
        with takes(0.25, most=0.25):
            server.shutdown(timeout=0.25)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 10)
        assert server.get_session_count() == 0
        for client in clients:
            client.expect_eof()


def test_hanging_callback_does_not_hold_up_the_on_close_of_others() -> None:
    callback = Hanging()
    with serving_clients(callback, 5) as (server, clients):
        clients[0].send("hang")
        callback.wait_for("on_message")
        stopper = gevent.spawn(server.shutdown, 30)
        callback.wait_for("on_close", 4)
        assert not stopper.dead
        server.shutdown(timeout=0)
        stopper.get(timeout=5)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 5)


def test_timeout_0_kills_hanging_callbacks_at_once() -> None:
    callback = Hanging()
    with serving_clients(callback, 3) as (server, clients):
        for client in clients:
            client.send("hang")
        callback.wait_for("on_message", 3)
        with takes(most=0.2):
            server.shutdown(timeout=0)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 3)


def test_timeout_none_waits_as_long_as_it_takes() -> None:
    callback = Resisting(1)
    with serving_clients(callback, 1) as (server, [client]):
        client.send("take your time")
        callback.wait_for("on_message")
        stopper = gevent.spawn(server.shutdown, None)
        stopper.join(0.5)
        assert not stopper.dead
        callback.go_on.set()
        stopper.get(timeout=5)
        assert callback.kills_left == 1, "it was killed"
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 1)


@sync_and_async
def test_callback_that_swallows_some_kills_is_killed_again(use_async: bool) -> None:
    callback = Resisting(3, use_async_callback=use_async)
    with serving_clients(callback, 2) as (server, clients):
        clients[0].send("resist")
        callback.wait_for("on_message")
        with takes(0.1, most=0.1 + SECOND_BOUND):
            server.shutdown(timeout=0.1)
        assert callback.kills_left == 0
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 2)


@pytest.mark.logs_errors
@sync_and_async
def test_callback_that_never_ends_is_left_behind_within_the_bounds(
    use_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    callback = resisting_for_ever(use_async=use_async)
    with serving_clients(callback, 4) as (server, clients):
        address = server.address
        for client in clients[:2]:
            client.send("resist")
        stuck = [event.session for event in callback.wait_for("on_message", 2)]
        with takes(0.2, most=0.2 + SECOND_BOUND):
            server.shutdown(timeout=0.2)

        assert not server.started
        assert server.get_session_count() == 0
        assert server.wait_for(0) is True
        assert close_reasons(callback) == [PsCloseReason.SHUTDOWN] * 2
        assert callback.events[-1].name == "on_stop"
        errors = errors_of(caplog)
        for session in stuck:
            assert session is not None
            assert any(str(session.connection_id) in error for error in errors)
        assert any("2" in error and "abandoned" in error for error in errors)
        for client in clients:
            client.receive_until_eof()

        # It does not hinder the next start, on the same port even.
        again = PsServer(RecordingCallback(), host=LOOPBACK, port=address[1])
        with again, ScriptedClient(again.address):
            eventually(again.get_session_count)
        callback.go_on.set()
    gevent.sleep(0.1)
    assert callback.events[-1].name == "on_stop", "a call came after on_stop"


@pytest.mark.logs_errors
def test_one_left_behind_is_told_by_its_next_send() -> None:
    class Callback(Resisting):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            try:
                session.send("anybody there?")
            except BaseException as error:
                errors.append(error)

    errors: list[BaseException] = []
    callback = Callback(1_000_000)
    with serving_clients(callback, 1) as (server, [client]):
        client.send("resist")
        callback.wait_for("on_message")
        server.shutdown(timeout=0)
        assert errors == []
        callback.go_on.set()
        [error] = eventually(lambda: errors)
        assert "closed" in str(error)


@pytest.mark.logs_errors
def test_server_starts_again_while_a_callback_of_before_still_runs() -> None:
    callback = resisting_for_ever()
    server = local_server(callback)
    with server, ScriptedClient(server.address) as client:
        client.send("resist")
        callback.wait_for("on_message")
        server.shutdown(timeout=0)
        with server:
            with ScriptedClient(server.address):
                eventually(server.get_session_count)
            callback.wait_for("on_close")
            callback.go_on.set()
            gevent.sleep(0.05)
            assert server.started
            assert server.get_session_count() == 0
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


@sync_and_async
def test_callback_that_looks_at_is_open_ends_in_good_time(use_async: bool) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            while session.is_open:
                gevent.sleep(0.01)
            session.send("goodbye")

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            await super().on_message_async(session, message)
            while session.is_open:
                await asyncio.sleep(0.01)
            await session.send_async("goodbye")

    callback = Callback(use_async_callback=use_async)
    with serving_clients(callback, 3) as (server, clients):
        for client in clients:
            client.send("work")
        callback.wait_for("on_message", 3)
        with takes(most=0.5):
            server.shutdown(timeout=20)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 3)
        for client in clients:
            client.expect("goodbye")
            client.expect_eof()


@sync_and_async
def test_half_open_sessions_close_like_all_others(use_async: bool) -> None:
    callback = RecordingCallback(use_async_callback=use_async)
    with serving_clients(callback, 3, allow_half_open=True) as (server, clients):
        clients[0].eof()
        [event] = callback.wait_for("on_eof")
        [other, _] = [session for session in server.sessions if session is not event.session]
        other.send_eof()
        with takes(most=0.5):
            server.shutdown(timeout=20)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 3)
        for client in clients:
            client.expect_eof()


@sync_and_async
def test_hanging_on_eof_is_killed_at_the_timeout(use_async: bool) -> None:
    class Callback(RecordingCallback):
        def on_eof(self, session: PsSession) -> None:
            super().on_eof(session)
            gevent.sleep(FOREVER)

        async def on_eof_async(self, session: PsSession) -> None:
            super().on_eof(session)
            await asyncio.sleep(FOREVER)

    callback = Callback(use_async_callback=use_async)
    with serving_clients(callback, 1, allow_half_open=True) as (server, [client]):
        client.eof()
        callback.wait_for("on_eof")
        with takes(0.2, most=0.2):
            server.shutdown(timeout=0.2)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 1)


def test_stalled_send_of_a_callback_ends_at_the_timeout() -> None:
    class Callback(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            session.send(bytes(50_000_000), timeout=None)

    callback = Callback()
    with local_server(callback) as server, stalled_peer(server.address):
        callback.wait_for("on_open")
        with takes(0.2, most=0.2):
            server.shutdown(timeout=0.2)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 1)


def test_lingering_session_ends_at_the_timeout_with_its_own_reason() -> None:
    class Callback(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            super().on_open(session)
            with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.05):
                while True:
                    session.send(bytes(100_000), timeout=None)

    callback = RecordingCallback()
    with (
        local_server(callback, linger_timeout=FOREVER) as server,
        stalled_peer(server.address),
    ):
        [opened] = callback.wait_for("on_open")
        assert opened.session is not None
        opened.session.send(bytes(100_000))  # in the kernel's buffers, and not taken
        opened.session.close()
        gevent.sleep(0.05)
        assert callback.named("on_close") == []
        with takes(most=0.2):
            server.shutdown(timeout=0.2)
        assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_peer_that_never_stops_sending_does_not_hold_up_the_shutdown() -> None:
    def send_for_ever(client: ScriptedClient) -> None:
        with contextlib.suppress(OSError):
            while True:
                client.socket.sendall(bytes(10_000))

    callback = RecordingCallback()
    with serving_clients(callback, 2, linger_timeout=0.2) as (server, clients):
        senders = [gevent.spawn(send_for_ever, client) for client in clients]
        callback.wait_for("on_message", 10)
        with takes(most=0.2):
            server.shutdown(timeout=20)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 2)
        for client in clients:
            client.close()
        gevent.joinall(senders, timeout=5)


# on_close and on_stop


class HangingOnClose(RecordingCallback):
    """Records its on_close before it hangs."""

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        gevent.sleep(FOREVER)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        await asyncio.sleep(FOREVER)


# Not more: each has its share of a second, which a loaded machine makes short.
@pytest.mark.parametrize("count", [1, 5, 50])
@sync_and_async
def test_hanging_on_close_is_ended_and_each_session_gets_its_own(
    count: int, use_async: bool
) -> None:
    callback = HangingOnClose(use_async_callback=use_async)
    with serving_clients(callback, count) as (server, clients):
        with takes(0.2, most=0.2 + SECOND_BOUND):
            server.shutdown(timeout=0.2)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, count)
        for client in clients:
            client.expect_eof()


def test_async_on_close_that_waits_in_the_way_of_gevent_is_ended_too() -> None:
    """It holds the asyncio loop meanwhile, and with it the on_close of the others."""

    class Callback(RecordingCallback):
        async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
            self.on_close(session, close_reason)
            gevent.sleep(FOREVER)

    callback = Callback(use_async_callback=True)
    with serving_clients(callback, 20) as (server, _clients):
        with takes(2.0, most=2 * 2.0):  # enough for a slow machine to end one after the other
            server.shutdown(timeout=2.0)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 20)
        with takes(most=0.5):
            run_coroutine(asyncio.sleep(0))


def test_one_hanging_on_close_does_not_cost_the_others_theirs() -> None:
    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            if len(self.named("on_close")) == 3:
                gevent.sleep(FOREVER)

    callback = Callback()
    with serving_clients(callback, 50) as (server, _clients):
        with takes(0.2, most=0.2 + SECOND_BOUND):
            server.shutdown(timeout=0.2)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 50)


@pytest.mark.logs_errors
@pytest.mark.parametrize(
    ("count", "busy"),
    [(1, 0.0), (100, 0.0), pytest.param(100, 0.005, id="100-on a slow machine")],
)
def test_on_close_that_never_ends_costs_the_others_nothing(
    count: int, busy: float, caplog: pytest.LogCaptureFixture
) -> None:
    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            end = time.thread_time() + busy
            while time.thread_time() < end:
                pass
            super().on_close(session, close_reason)
            swallow_kills(go_on)

    go_on = Event()
    callback = Callback()
    with serving_clients(callback, count) as (server, _clients):
        with takes(0.2, most=0.2 + SECOND_BOUND):
            server.shutdown(timeout=0.2)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, count)
        assert any(str(count) in error and "abandoned" in error for error in errors_of(caplog))
        go_on.set()


@pytest.mark.logs_errors
def test_failing_on_close_costs_the_others_nothing() -> None:
    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            raise errors[len(self.named("on_close")) % len(errors)]

    errors = [ZeroDivisionError(), GreenletExit(), gevent.Timeout(), asyncio.CancelledError()]
    callback = Callback()
    with serving_clients(callback, 8) as (server, _clients):
        server.shutdown()
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 8)


@pytest.mark.logs_errors
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_exit_in_on_close_is_raised_in_the_main_greenlet_and_the_shutdown_goes_on(
    error: type[BaseException],
) -> None:
    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            if len(self.named("on_close")) == 2:
                raise error

    callback = Callback()
    with serving_clients(callback, 10) as (server, _clients):
        with pytest.raises(error):
            server.shutdown()
        assert server.wait_for(5) is True
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 10)


def test_slow_on_close_calls_come_one_at_a_time_and_all_of_them() -> None:
    class Callback(RecordingCallback):
        running = 0
        most = 0

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            self.running += 1
            self.most = max(self.most, self.running)
            gevent.sleep(0.02)
            super().on_close(session, close_reason)
            self.running -= 1

    callback = Callback()
    with serving_clients(callback, 10) as (server, _clients):
        with takes(0.2, most=0.4):
            server.shutdown(timeout=20)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 10)
        assert callback.most == 1


def test_on_stop_is_not_called_before_the_last_on_close_has_ended() -> None:
    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            gevent.sleep(0.1)
            super().on_close(session, close_reason)

    callback = Callback()
    with serving_clients(callback, 2) as (server, _clients):
        server.shutdown()
    assert [event.name for event in callback.events][-3:] == ["on_close", "on_close", "on_stop"]


class HangingOnStop(RecordingCallback):
    def on_stop(self, owner: Any) -> None:
        super().on_stop(owner)
        gevent.sleep(FOREVER)

    async def on_stop_async(self, owner: Any) -> None:
        super().on_stop(owner)
        await asyncio.sleep(FOREVER)


@sync_and_async
def test_hanging_on_stop_is_ended_within_the_bounds(use_async: bool) -> None:
    callback = HangingOnStop(use_async_callback=use_async)
    with serving_clients(callback, 2) as (server, _clients):
        with takes(most=0.2 + SECOND_BOUND):
            server.shutdown(timeout=0.2)
        assert_all_closed(callback, PsCloseReason.SHUTDOWN, 2)
        assert server.wait_for(0) is True


@pytest.mark.logs_errors
def test_on_stop_that_never_ends_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    class Callback(RecordingCallback):
        def on_stop(self, owner: Any) -> None:
            super().on_stop(owner)
            swallow_kills(go_on)

    go_on = Event()
    callback = Callback()
    server = local_server(callback)
    for _ in range(2):
        server.start()
        with takes(most=0.2 + SECOND_BOUND):
            server.shutdown(timeout=0.2)
        assert server.wait_for(0) is True
    assert any("PsServer" in error for error in errors_of(caplog))
    assert len(callback.named("on_stop")) == 2
    go_on.set()


@pytest.mark.logs_errors
@pytest.mark.parametrize("error", [ZeroDivisionError, GreenletExit, gevent.Timeout])
def test_exception_in_on_stop_is_logged_and_not_raised(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class Callback(RecordingCallback):
        def on_stop(self, owner: Any) -> None:
            super().on_stop(owner)
            raise error

    callback = Callback()
    with local_server(callback) as server:
        server.shutdown()
        assert not server.started
        assert server.wait_for(0) is True
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info
    assert record.exc_info[0] is error


def test_start_in_on_stop_is_an_error() -> None:
    class Callback(RecordingCallback):
        def on_stop(self, owner: Any) -> None:
            super().on_stop(owner)
            with pytest.raises(PsServerError):
                owner.start()
            self.was_refused = True

    callback = Callback()
    with local_server(callback) as server:
        server.shutdown()
        assert callback.was_refused
        assert not server.started


# A log that fails


class FailingHandler(logging.Handler):
    """As one that writes to a full disk, and whose `logging.Handler.handleError` was replaced."""

    def handle(self, record: logging.LogRecord) -> bool:
        raise OSError(28, "No space left on device")


@pytest.fixture
def failing_log() -> Iterator[Callable[[int], None]]:
    """Makes the library's log fail from the given level on."""
    logger = logging.getLogger("psofa_gevent")
    before = logger.level
    handler = FailingHandler()

    def fail_from(level: int) -> None:
        logger.setLevel(level)
        logger.addHandler(handler)

    yield fail_from
    logger.removeHandler(handler)
    logger.setLevel(before)


class FailingInTheEnd(Resisting):
    """Its on_close and its on_stop raise; its on_message hangs, and resists when asked to."""

    def on_message(self, session: PsSession, message: bytes) -> None:
        if message == b"resist":
            super().on_message(session, message)
        else:
            RecordingCallback.on_message(self, session, message)
            gevent.sleep(FOREVER)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        raise ZeroDivisionError

    def on_stop(self, owner: Any) -> None:
        super().on_stop(owner)
        raise ZeroDivisionError


@pytest.mark.logs_errors
@pytest.mark.hub_errors
@pytest.mark.parametrize("level", ["ERROR", "DEBUG"])
@pytest.mark.parametrize("kills", [0, 3, 1_000_000], ids=["none-resists", "one-resists", "stuck"])
def test_log_handler_that_raises_costs_a_shutdown_nothing(
    kills: int, level: str, failing_log: Callable[[int], None]
) -> None:
    callback = FailingInTheEnd(kills)
    with serving_clients(callback, 6) as (server, clients):
        clients[1].send("hang")
        clients[2].send("resist" if kills else "hang")
        callback.wait_for("on_message", 2)
        failing_log(logging.getLevelNamesMapping()[level])
        with takes(0.1, most=0.1 + SECOND_BOUND):
            server.shutdown(timeout=0.1)
        assert not server.started
        assert server.get_session_count() == 0
        stuck = 1 if kills > 3 else 0
        assert close_reasons(callback) == [PsCloseReason.SHUTDOWN] * (len(clients) - stuck)
        assert callback.events[-1].name == "on_stop"
        for client in clients:
            client.receive_until_eof()
        callback.go_on.set()


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


# Who may call it


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
