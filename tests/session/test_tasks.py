"""Work that belongs to a session (`PsSession.spawn`): it ends before the session's ``on_close``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import pytest
from gevent import GreenletExit

from helpers import NativeThread, close_reasons, takes
from psofa_gevent import (
    PsCallback,
    PsClosedError,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsRequester,
    PsServer,
    PsSession,
)
from psofa_gevent.framing import Line
from psofa_gevent.session import tasks
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

BIG = 8 * 1024 * 1024
"""Bytes: more than the buffers of a connection take."""
Act = Callable[[PsSession[Any]], object]


class Spawning(RecordingCallback):
    """Does with a new session what a test says; notes in order what happens."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act
        self.log: list[str] = []

    def on_open(self, session: PsSession[Any]) -> None:
        super().on_open(session)
        self.act(session)

    def on_close(self, session: PsSession[Any], close_reason: PsCloseReason) -> None:
        self.log.append("on_close")
        super().on_close(session, close_reason)


def opened(server: PsServer[Any]) -> PsSession[Any]:
    (session,) = eventually(lambda: server.sessions)
    return session


def begun(server: PsServer[Any], count: int = 1) -> PsSession[Any]:
    """The one session, when so much work of it runs."""
    session = opened(server)

    def runs() -> bool:
        work = session._tasks or ()
        return len(work) == count and all(each.gr_frame is not None for each in work)

    eventually(runs)
    return session


def test_work_runs_beside_the_callbacks_with_its_arguments(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def greet(session: PsSession[Any], name: str, *, mark: str) -> str:
        gevent.sleep(0.01)
        session.send(f"hello {name}{mark}")
        return name

    callback = Spawning(lambda session: session.spawn(greet, session, "ann", mark="!"))
    client = ps_client(ps_server(callback))
    client.expect("hello ann!")
    client.send("x")
    callback.wait_for("on_message")


def test_the_greenlet_gives_what_the_function_returns(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())
    ps_client(server)
    session = opened(server)

    async def add(one: int, two: int) -> int:
        await asyncio.sleep(0.001)
        return one + two

    assert session.spawn(max, 1, 2).get(timeout=5) == 2
    assert session.spawn(add, 1, two=2).get(timeout=5) == 3
    eventually(lambda: not session._tasks)


def shut_down(session: PsSession[Any]) -> None:
    assert isinstance(session.owner, PsServer)
    session.owner.shutdown()


ENDS: dict[str, tuple[Callable[[PsSession[Any], ScriptedClient], object], PsCloseReason]] = {
    "FIN": (lambda _, client: client.close(), PsCloseReason.PEER_CLOSE),
    "RST": (lambda _, client: client.reset(), PsCloseReason.FAILED),
    "close": (lambda session, _: session.close(), PsCloseReason.SELF_CLOSE),
    "abort": (lambda session, _: session.abort(), PsCloseReason.SELF_CLOSE),
    "shutdown": (lambda session, _: shut_down(session), PsCloseReason.SHUTDOWN),
    "idle": (lambda session, _: session.change_idle_milliseconds(1), PsCloseReason.TIMEOUT),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["greenlet", "coroutine"])
@pytest.mark.parametrize("end", ENDS)
def test_work_ends_before_on_close(
    end: str, is_async: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def work_on() -> None:
        try:
            gevent.sleep(600)
        finally:
            gevent.sleep(0.05)
            callback.log.append("work ended")

    async def work_on_async() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.05)
            callback.log.append("work ended")

    function: Callable[[], object] = work_on_async if is_async else work_on
    callback = Spawning(lambda session: [session.spawn(function) for _ in range(3)])
    server = ps_server(callback)
    client = ps_client(server)
    session = begun(server, 3)
    act, reason = ENDS[end]
    act(session, client)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [reason]
    assert callback.log == ["work ended"] * 3 + ["on_close"]
    assert not session._tasks


def test_a_session_counts_until_its_work_has_ended(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    gate = gevent.event.Event()

    def work_on() -> None:
        try:
            gevent.sleep(600)
        except GreenletExit:
            gate.wait()

    callback = Spawning(lambda session: session.spawn(work_on))
    server = ps_server(callback)
    client = ps_client(server)
    begun(server)
    client.close()
    eventually(lambda: not server.sessions)
    assert server.get_session_count() == 1
    assert not callback.named("on_close")
    gate.set()
    callback.wait_for("on_close")
    assert server.get_session_count() == 0


def test_work_that_has_not_begun_never_does(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    began: list[int] = []

    def act(session: PsSession[Any]) -> None:
        session.spawn(began.append, 1)
        session.close()

    callback = Spawning(act)
    ps_client(ps_server(callback))
    callback.wait_for("on_close")
    assert not began


@pytest.mark.logs_errors
@pytest.mark.parametrize("is_async", [False, True], ids=["greenlet", "coroutine"])
def test_what_work_raises_is_logged_and_fails_the_session(
    is_async: bool,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise LookupError("work")

    async def fail_async() -> None:
        await asyncio.sleep(0)
        raise LookupError("work")

    function: Callable[[], object] = fail_async if is_async else fail
    callback = Spawning(lambda session: session.spawn(function))
    ps_client(ps_server(callback))
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, LookupError)
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert record.exc_info is not None


def test_work_that_is_killed_by_hand_harms_nobody(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(RecordingCallback(lambda message: message))
    client = ps_client(server)
    session = opened(server)
    greenlet = session.spawn(gevent.sleep, 600)
    begun(server)
    greenlet.kill()
    eventually(lambda: not session._tasks)
    client.send("still here")
    client.expect("still here")


def test_a_heartbeat_that_runs_into_the_close_makes_no_noise(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    def beat(session: PsSession[Any]) -> None:
        while True:
            session.send("beat ")
            gevent.sleep(0.001)

    callback = Spawning(lambda session: session.spawn(beat, session))
    client = ps_client(ps_server(callback))
    client.expect("beat beat ")
    client.close()
    callback.wait_for("on_close")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_work_may_close_its_session_and_shut_its_server_down(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def close(session: PsSession[Any]) -> None:
        session.close()

    callback = Spawning(lambda session: session.spawn(close, session))
    ps_client(ps_server(callback))
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]

    def end_all(session: PsSession[Any]) -> None:
        shut_down(session)  # returns at once
        callback.log.append("returned")
        gevent.sleep(600)

    callback = Spawning(lambda session: session.spawn(end_all, session))
    server = ps_server(callback)
    ps_client(server)
    with takes(most=1.0):
        assert server.wait_for(timeout=5)
    assert callback.log == ["returned", "on_close"]


def test_work_may_ask_its_own_session(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    requester: PsRequester[bytes] = PsRequester()

    def ask(session: PsSession[Any]) -> None:
        session.send(b"you said " + requester.request(session, "?"))

    class Asking(PsCallback):
        def on_open(self, session: PsSession) -> None:
            session.spawn(ask, session)

        def on_message(self, session: PsSession, message: bytes) -> None:
            requester.resolve(session, message)

    client = ps_client(ps_server(Asking(), framing=Line()))
    client.expect("?\n")
    client.send("hello\n")
    client.expect("you said hello\n")


def test_a_handler_has_work_too(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    log: list[str] = []

    def beat(session: PsSession[Any]) -> None:
        try:
            session.send("beat\n")
            gevent.sleep(600)
        finally:
            log.append("ended")

    class Handler(PsHandler[bytes]):
        def handle(self, session: PsSession[bytes]) -> None:
            session.spawn(beat, session)
            session.receive()

        def on_close(self, session: PsSession[bytes], close_reason: PsCloseReason) -> None:
            log.append("on_close")

    client = ps_client(ps_server(Handler()))
    client.expect("beat\n")
    client.send("x")
    client.expect_eof()
    eventually(lambda: log == ["ended", "on_close"])


def test_an_async_callback_spawns_coroutines(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    log: list[str] = []

    async def beat(session: PsSession) -> None:
        try:
            while True:
                await session.send_async("beat ")
                await asyncio.sleep(0.01)
        finally:
            log.append("ended")

    class Async(PsCallback):
        use_async_callback = True

        async def on_open_async(self, session: PsSession) -> None:
            session.spawn(beat, session)

        async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
            log.append("on_close")

    client = ps_client(ps_server(Async()))
    client.expect("beat beat ")
    client.close()
    eventually(lambda: log == ["ended", "on_close"])


# What does not want to end


def swallow_some(count: int) -> None:
    while count:
        try:
            gevent.sleep(600)
        except GreenletExit:
            count -= 1


def test_work_that_swallows_its_end_is_killed_again(
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tasks, "KILL_PERIOD", 0.02)
    callback = Spawning(lambda session: session.spawn(swallow_some, 20))
    server = ps_server(callback)
    client = ps_client(server)
    begun(server)
    client.close()
    callback.wait_for("on_close")
    assert "spawned greenlets have not ended" in caplog.text


@pytest.mark.logs_errors
def test_a_shutdown_leaves_work_behind_that_never_ends(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    gate = gevent.event.Event()

    def swallow_all() -> None:
        while not gate.is_set():
            try:
                gate.wait()
            except GreenletExit:
                continue

    callback = Spawning(lambda session: session.spawn(swallow_all))
    server = ps_server(callback)
    ps_client(server)
    begun(server)
    with takes(1.0, most=2.5):
        server.shutdown(timeout=0.1)
    assert "1 callbacks did not end: abandoned" in caplog.text
    assert server.get_session_count() == 0
    assert not callback.named("on_close")
    gate.set()


def test_a_kill_of_the_session_is_passed_on_to_its_work(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Spawning(lambda session: session.spawn(swallow_some, 3))
    server = ps_server(callback)
    client = ps_client(server)
    session = begun(server)
    client.close()
    eventually(lambda: session._released)
    for _ in range(3):
        if session.greenlet is not None:
            session.greenlet.kill(block=False)
        gevent.sleep(0.01)
    callback.wait_for("on_close", timeout=0.5)


@pytest.mark.parametrize("end", ["close", "shutdown"])
def test_work_that_swallows_its_end_in_a_send_holds_up_nobody(
    end: str,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "KILL_PERIOD", 0.1)

    def send_on(session: PsSession[Any]) -> None:
        with contextlib.suppress(GreenletExit):
            session.send(bytes(BIG), None)
        session.send(bytes(BIG), None)

    callback = Spawning(lambda session: session.spawn(send_on, session))
    server = ps_server(callback, send_timeout=None, linger_timeout=0.2)
    ps_client(server)
    session = begun(server)
    eventually(lambda: session._send_queue is not None)
    with takes(most=1.0):
        if end == "close":
            session.close()
            callback.wait_for("on_close")
        else:
            server.shutdown(timeout=20)


def test_a_greenlet_that_is_kept_does_not_keep_its_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    server = ps_server(PsCallback())
    client = ps_client(server)
    session = opened(server)
    gone = weakref.ref(session)
    gc.collect()
    gc.disable()
    try:
        greenlets = [session.spawn(gevent.sleep, 600), session.spawn(asyncio.sleep, 600)]
        begun(server, 2)
        del session
        client.close()
        eventually(lambda: gone() is None)
        assert all(isinstance(greenlet.value, GreenletExit) for greenlet in greenlets)
    finally:
        gc.enable()


# Where it is refused


def test_a_closed_session_gets_no_more_work(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    errors: list[BaseException] = []

    class Late(PsCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            with pytest.raises(PsClosedError, match="cannot spawn") as caught:
                session.spawn(gevent.sleep)
            errors.append(caught.value)

    client = ps_client(ps_server(Late()))
    client.close()
    eventually(lambda: errors)


def test_what_makes_no_sense_is_refused(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    server = ps_server(PsCallback())
    ps_client(server)
    session = opened(server)
    with pytest.raises(TypeError, match="function must be a function"):
        session.spawn(5)  # type: ignore[arg-type]  # the point
    with pytest.raises(RuntimeError, match="thread"):
        NativeThread(session.spawn, gevent.sleep).wait()


def test_work_of_a_session_that_never_began_ends(ps_server: ServerFactory) -> None:
    log: list[str] = []

    def work_on() -> None:
        try:
            gevent.sleep(600)
        finally:
            log.append("ended")

    server = ps_server(PsCallback())
    with ScriptedClient(server.address):
        opened(server).spawn(work_on)
        begun(server)
        server.shutdown()
    assert log == ["ended"]


# However the session ends


class Ticking(Spawning):
    """Its work notes that it goes on, for as long as it does."""

    def on_message(self, session: PsSession[Any], message: bytes) -> None:
        session.spawn(self.tick)
        gevent.sleep(0)  # it has begun
        self.act_on_message(session)

    def act_on_message(self, session: PsSession[Any]) -> None:
        raise NotImplementedError

    def tick(self) -> None:
        while True:
            self.log.append("tick")
            gevent.sleep(0.001)

    def check(self, server: PsServer[Any]) -> None:
        """Check that ``on_close`` came last, and that a shutdown leaves no work behind."""
        (closed,) = self.wait_for("on_close")
        server.shutdown()
        assert closed.session is not None
        assert not closed.session._tasks
        assert self.log[-1] == "on_close"


def kill_me() -> None:
    greenlet: Any = gevent.getcurrent()
    greenlet.kill(block=False)


def test_work_ends_when_a_kill_comes_between_the_close_of_another_thread_and_its_arrival(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Closed(Ticking):
        def act_on_message(self, session: PsSession[Any]) -> None:
            NativeThread(session.close).join()
            kill_me()

    callback = Closed(lambda _: None)
    server = ps_server(callback)
    ps_client(server).send("x")
    callback.check(server)
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@pytest.mark.logs_errors
def test_work_ends_when_a_kill_hits_a_log_handler_that_tells_of_the_failure(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Failing(Ticking):
        def act_on_message(self, session: PsSession[Any]) -> None:
            raise LookupError("callback")

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "LookupError" in record.getMessage():
                kill_me()
                gevent.sleep(5)

    logger = logging.getLogger("psofa_gevent")
    handler = Waiting()
    logger.addHandler(handler)
    try:
        callback = Failing(lambda _: None)
        server = ps_server(callback)
        ps_client(server).send("x")
        callback.check(server)
    finally:
        logger.removeHandler(handler)
    assert close_reasons(callback) == [PsCloseReason.FAILED]


def test_a_session_that_is_killed_before_it_began_counts_until_its_work_has_ended(
    ps_server: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "KILL_PERIOD", 0.02)
    callback = Spawning(lambda _: None)
    with PsMultiClient(callback) as client:
        session = client.connect(*ps_server(PsCallback()).address).session
        greenlet: Any = session.greenlet
        spawned = session.spawn(swallow_some, 5)
        greenlet.kill(block=False)
        eventually(lambda: not session.is_open)
        assert client.get_session_count() == 1
        eventually(lambda: client.get_session_count() == 0)
        assert spawned.dead
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]


@pytest.mark.logs_errors
def test_a_shutdown_leaves_no_work_of_a_callback_that_never_ends(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    gate = gevent.event.Event()

    class Stuck(Ticking):
        def act_on_message(self, session: PsSession[Any]) -> None:
            while not gate.is_set():
                with contextlib.suppress(GreenletExit):
                    gate.wait()

    callback = Stuck(lambda _: None)
    server = ps_server(callback)
    ps_client(server).send("x")
    session = begun(server)
    server.shutdown(timeout=0.1)
    assert not session._tasks
    gate.set()


@pytest.mark.hub_errors
def test_a_session_whose_socket_a_stranger_closed_ends_with_its_work(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Robbed(Ticking):
        def act_on_message(self, session: PsSession[Any]) -> None:
            session.close()
            os.close(session._sock.fileno())

    callback = Robbed(lambda _: None)
    server = ps_server(callback)
    client = ps_client(server)
    client.send("x")
    callback.check(server)
    assert server.get_session_count() == 0
