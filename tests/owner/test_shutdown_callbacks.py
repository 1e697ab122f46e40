"""`shutdown` while callbacks run: they finish, or are ended in time, and all sessions hear."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from gevent import GreenletExit
from gevent.event import Event

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
from helpers import LOOPBACK, close_reasons, local_server, stalled_peer, takes
from psofa_gevent import PsCloseReason, PsServer, PsServerError, PsSession, run_coroutine
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

sync_and_async = pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])


def swallow_kills(until: Event, kills: list[object] | None = None) -> None:
    """Wait for `until`, whatever is thrown in meanwhile."""
    while not until.is_set():
        try:
            until.wait(FOREVER)
        except GreenletExit as kill:
            if kills is not None:
                kills.append(kill)


def resisting_for_ever(*, use_async: bool = False) -> Resisting:
    return Resisting(1_000_000, use_async_callback=use_async)


def errors_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


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
