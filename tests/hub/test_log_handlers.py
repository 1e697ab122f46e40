"""What a log handler costs who logs: nothing, whether it waits, raises, or logs itself."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from typing import Any

import gevent
import pytest
from greenlet import greenlet

import psofa_gevent
from helpers import Keeping, NativeThread, attached, local_server
from log_handlers import Holding, messages
from psofa_gevent import PsSession
from psofa_gevent.hub import logs
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)


def test_who_logs_goes_on_at_once_where_a_handler_waits(holding: Holding) -> None:
    others: list[str] = []
    gevent.spawn(others.append, "another greenlet ran")
    for number in range(3):
        logs.log(logging.INFO, "%d", number)
    assert others == []
    assert len(holding.begun) == 1
    holding.go_on.set()
    eventually(lambda: holding.messages() == ["0", "1", "2"])
    assert others


@pytest.mark.parametrize("where", ["hub", "coroutine", "thread"])
def test_a_handler_may_wait_wherever_something_is_logged(where: str, holding: Holding) -> None:
    went_on = []

    def act() -> None:
        for number in range(3):
            logs.log(logging.INFO, "%d", number)
        went_on.append(where)

    async def act_async() -> None:
        act()

    if where == "hub":
        gevent.get_hub().loop.run_callback(act)
    elif where == "coroutine":
        psofa_gevent.run_coroutine(act_async())
    else:
        holding.go_on = NativelySet()  # type: ignore[assignment]
        NativeThread(act).wait()
    eventually(lambda: went_on)
    assert len(holding.begun) == 1 or where == "thread"
    holding.go_on.set()
    eventually(lambda: holding.messages() == ["0", "1", "2"])


class NativelySet:
    """For a handler that a thread without a hub calls: nothing to wait for."""

    def wait(self) -> None:
        """Go on."""

    def set(self) -> None:
        """Nobody waits."""


def test_a_record_says_when_it_was_logged_and_what_was_so_then(holding: Holding) -> None:
    class Changing:
        state = "first"

        def __repr__(self) -> str:
            return self.state

    subject = Changing()
    logs.log(logging.INFO, "something else")
    logs.log(logging.INFO, "%r", subject)
    logged_at = time.time()
    subject.state = "second"
    gevent.sleep(0.01)
    holding.go_on.set()
    eventually(lambda: len(holding.ended) == 2)
    assert holding.ended[1].created <= logged_at
    assert holding.messages()[1] == "first"


def test_while_a_handler_waits_a_record_stays_what_it_was_for_the_others(
    holding: Holding,
) -> None:
    class Changing:
        state = "first"

        def __repr__(self) -> str:
            return self.state

    subject = Changing()
    later = Keeping()
    with attached(later):
        logs.log(logging.INFO, "%r", subject)
        subject.state = "second"
        assert later.records == []
        holding.go_on.set()
        eventually(lambda: later.records)
        assert messages(later) == holding.messages() == ["first"]


def test_a_handler_that_waits_does_not_keep_the_session_of_its_record(
    holding: Holding, ps_server: ServerFactory
) -> None:
    holding.go_on.set()
    callback = RecordingCallback()
    server = ps_server(callback)
    logs.flush()
    holding.go_on.clear()
    ScriptedClient(server.address).close()
    callback.wait_for("on_close")
    assert holding.begun[-1].getMessage().endswith(": opened")
    session = weakref.ref(callback.named("on_open")[0].session or callback)
    callback.events.clear()
    server.shutdown()
    eventually(lambda: session() is None)
    holding.go_on.set()


def test_what_waits_does_not_keep_a_session(holding: Holding, ps_server: ServerFactory) -> None:
    logs.log(logging.INFO, "held")
    callback = RecordingCallback()
    server = ps_server(callback)
    ScriptedClient(server.address).close()
    callback.wait_for("on_close")
    session = weakref.ref(callback.named("on_open")[0].session or callback)
    callback.events.clear()
    server.shutdown()
    eventually(lambda: session() is None)
    holding.go_on.set()


def test_records_of_the_hub_and_of_greenlets_come_in_the_order_of_the_calls(
    keeping: Keeping,
) -> None:
    def log_next() -> None:
        logs.log(logging.INFO, "%d", len(calls))
        calls.append(len(calls))

    calls: list[int] = []
    loop = gevent.get_hub().loop
    for _ in range(20):
        loop.run_callback(log_next)
        gevent.spawn(log_next)
        log_next()
    eventually(lambda: len(calls) == 60)
    assert messages(keeping) == [str(number) for number in range(60)]
    created = [record.created for record in keeping.records]
    assert created == sorted(created)


def test_no_greenlet_is_left_when_nothing_waits(keeping: Keeping) -> None:
    logs.log(logging.INFO, "something")
    gevent.get_hub().loop.run_callback(logs.log, logging.INFO, "something else")
    eventually(lambda: len(keeping.records) == 2)
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, logs.LogGreenlet)]


def test_a_shutdown_returns_when_its_records_were_handed_over() -> None:
    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            gevent.sleep(0.02)
            told.append(record.getMessage())

    told: list[str] = []
    with attached(Slow()), local_server() as server:
        for _ in range(3):
            ScriptedClient(server.address).close()
        eventually(lambda: len(told) > 1)
        server.shutdown()
        assert "stopped" in told[-1]


def test_a_shutdown_does_not_wait_long_for_a_handler(holding: Holding) -> None:
    began = time.monotonic()
    with local_server():
        pass
    assert time.monotonic() - began < 10
    assert holding.ended == []


def test_what_waits_is_bounded_and_what_is_lost_is_counted(
    holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_WAITING", 10)
    for number in range(100):
        logs.log(logging.INFO, "%d", number)
    holding.go_on.set()
    eventually(lambda: len(holding.ended) == 12)
    *kept, last = holding.messages()
    assert kept == [str(number) for number in range(11)]
    assert "89 records are lost" in last


def test_while_much_is_handed_over_others_have_their_turn(holding: Holding) -> None:
    for number in range(1_000):
        logs.log(logging.INFO, "%d", number)
    turns = 0
    holding.go_on.set()
    while len(holding.ended) < 1_000:
        gevent.sleep(0)
        turns += 1
    assert turns > 100


@pytest.mark.logs_errors
@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
def test_a_kill_while_a_handler_waits_loses_no_record_and_leaves_no_cycle(
    use_async: bool,
    holding: Holding,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            raise ValueError("mine")

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            self.on_message(session, message)

    monkeypatch.setattr(logging.getLogger("psofa_gevent"), "propagate", False)  # pytest keeps all
    callback = Callback(use_async_callback=use_async)
    server = ps_server(callback)
    holding.go_on.set()
    client = ps_client(server)
    session = callback.wait_for("on_open")[0].session
    assert session is not None
    logs.flush()
    holding.go_on.clear()
    session_greenlet: Any = session.greenlet
    gone = weakref.ref(session)
    gc.disable()
    try:
        client.send("x")
        eventually(lambda: "failed" in holding.begun[-1].getMessage())
        gevent.kill(session_greenlet)
        client.expect_eof()
        callback.wait_for("on_close")
        session = session_greenlet = None
        callback.events.clear()
        holding.go_on.set()
        eventually(lambda: "closed" in holding.messages()[-1])
        held = [holding.begun, holding.ended]
        for records in held:
            records.clear()
        eventually(lambda: gone() is None, message="the garbage collector is needed")
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", [gevent.GreenletExit, gevent.Timeout, ValueError])
def test_what_a_handler_or_a_stranger_throws_costs_one_record(
    kind: type[BaseException],
) -> None:
    class Throwing(Keeping):
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            if record.msg == "bad":
                raise kind
            if record.msg == "waits":
                gevent.sleep(60)

    keeping = Throwing()
    with attached(keeping):
        for message in ("bad", "good", "waits", "after"):
            logs.log(logging.INFO, message)
        (waiting,) = (
            each
            for each in gc.get_objects()
            if isinstance(each, logs.LogGreenlet) and not each.dead
        )
        gevent.kill(waiting, kind)
        del waiting
        eventually(lambda: messages(keeping) == ["bad", "good", "waits", "after"])


def test_ctrl_c_in_a_handler_comes_to_who_logs() -> None:
    class Interrupted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyboardInterrupt

    with attached(Interrupted()), pytest.raises(KeyboardInterrupt):
        logs.log(logging.INFO, "something")
    logs.log(logging.INFO, "and it goes on")


def test_a_handler_that_logs_with_the_library_is_not_called_within_itself(keeping: Keeping) -> None:
    class Logging(logging.Handler):
        depth = deepest = 0

        def emit(self, record: logging.LogRecord) -> None:
            self.depth += 1
            self.deepest = max(self.depth, self.deepest)
            if record.msg == "first":
                logs.log(logging.INFO, "second")
            self.depth -= 1

    handler = Logging()
    with attached(handler):
        logs.log(logging.INFO, "first")
        eventually(lambda: messages(keeping) == ["first", "second"])
    assert handler.deepest == 1


def test_a_handler_that_shuts_the_server_down_waits_for_nothing(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Stopping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if ": opened" in record.getMessage():
                server.shutdown()
                returned.append([event.name for event in callback.events])

    returned: list[list[str]] = []
    callback = RecordingCallback()
    server = ps_server(callback)
    with attached(Stopping()):
        ps_client(server)
        assert server.wait_for(5)
    assert returned == [["on_start"]]
    assert [event.name for event in callback.events] == [
        "on_start",
        "on_open",
        "on_close",
        "on_stop",
    ]


def test_a_handler_may_send_through_a_session_of_ours(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """Also one whose peer is slow, so that it waits, where a coroutine logs."""

    class Shipping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg == "ship":
                session.send(b"x" * 20_000_000, timeout=20)
                shipped.append(record)

    async def log_it() -> None:
        logs.log(logging.INFO, "ship")

    shipped: list[logging.LogRecord] = []
    callback = RecordingCallback()
    server = ps_server(callback)
    client = ps_client(server)
    (opened,) = callback.wait_for("on_open")
    assert opened.session is not None
    session = opened.session
    with attached(Shipping()):
        psofa_gevent.run_coroutine(log_it())
        assert not shipped
        received = 0
        while received < 20_000_000:
            received += len(client.socket.recv(1_000_000))
        eventually(lambda: shipped)


def test_the_greenlet_that_logs_is_none_of_gevents() -> None:
    """So nothing that counts, lists or joins an application's greenlets finds it."""
    assert issubclass(logs.LogGreenlet, greenlet)
    assert not issubclass(logs.LogGreenlet, gevent.Greenlet)
