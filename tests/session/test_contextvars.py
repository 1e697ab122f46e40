"""Context variables: a session has a context of its own, and everything of it runs there.

All its callbacks, its work, and the records of the log about it; and nobody else's.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import gevent
import pytest

from helpers import NativeThread, local_server
from marks import sync_and_async
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsReconnect,
    PsServer,
    PsSession,
    run_coroutine,
    spawn_coroutine,
)
from psofa_gevent.session import tasks
from psofa_gevent.testing import ClientFactory, ServerFactory, eventually

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("NAME", default="-")
HELD: contextvars.ContextVar[object] = contextvars.ContextVar("HELD", default=None)


@pytest.fixture(autouse=True)
def nothing_is_set_here() -> Iterator[None]:
    """What a test sets in its own greenlet, it takes back; and what runs elsewhere sets nothing."""
    assert NAME.get() == "-"
    yield
    assert NAME.get() == "-"


class Naming(PsCallback):
    """Gives each session a name, and notes in each call what that is there."""

    def __init__(self, use_async_callback: bool) -> None:
        self.use_async_callback = use_async_callback
        self.seen: list[tuple[str, str]] = []
        self.names = iter(["ann", "bob", "cid", "dora"])

    def note(self, what: str) -> None:
        self.seen.append((what, NAME.get()))

    def of(self, name: str) -> list[str]:
        return [what for what, seen in self.seen if seen == name]

    def on_open(self, session: PsSession) -> None:
        self.note("on_open")
        NAME.set(next(self.names))
        session.spawn(self.work).join()
        session.spawn(self.work_async).join()

    def on_message(self, session: PsSession, message: bytes) -> None:
        self.note("on_message")
        if message == b"fail":
            raise LookupError(message)
        session.send(message)

    def on_eof(self, session: PsSession) -> None:
        self.note("on_eof")
        session.close()

    def on_idle(self, session: PsSession) -> None:
        self.note("on_idle")
        session.change_idle_milliseconds(None)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.note("on_close")

    def work(self) -> None:
        self.note("work")

    async def work_async(self) -> None:
        await asyncio.sleep(0)
        self.note("work_async")

    async def on_open_async(self, session: PsSession) -> None:
        self.note("on_open")
        NAME.set(next(self.names))
        session.spawn(self.work)
        session.spawn(self.work_async)
        while len(self.of(NAME.get())) < 2:
            await asyncio.sleep(0.001)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        self.on_message(session, message)

    async def on_eof_async(self, session: PsSession) -> None:
        self.on_eof(session)

    async def on_idle_async(self, session: PsSession) -> None:
        self.on_idle(session)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        await asyncio.sleep(0)
        self.on_close(session, close_reason)


@sync_and_async
def test_all_that_a_session_runs_sees_what_its_on_open_has_set(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Naming(use_async_callback)
    server = ps_server(callback, allow_half_open=True)
    first, second = ps_client(server), ps_client(server)
    for client in (first, second):
        client.send("hello")
        client.expect("hello")
    for session in server.sessions:
        session.change_idle_milliseconds(1)
    eventually(lambda: [what for what, _ in callback.seen].count("on_idle") == 2)
    for client in (second, first):
        client.eof()
        client.expect_eof()
    eventually(lambda: [what for what, _ in callback.seen].count("on_close") == 2)
    everything = ["on_message", "on_idle", "on_eof", "on_close"]
    for name in ("ann", "bob"):
        assert sorted(callback.of(name)[:2]) == ["work", "work_async"]
        assert callback.of(name)[2:] == everything
    assert callback.of("-") == ["on_open"] * 2


@sync_and_async
def test_what_one_callback_sets_another_one_can_reset(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    # A token is of use in the very context in which it was made, and in no copy.
    seen: list[str] = []

    class Setting(PsCallback):
        def __init__(self) -> None:
            self.use_async_callback = use_async_callback

        def on_open(self, session: PsSession) -> None:
            session.set_value("token", NAME.set("opened"))
            session.spawn(NAME.set, "spawned").join()

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            seen.append(NAME.get())
            NAME.reset(session.get_value("token"))
            seen.append(NAME.get())

        async def on_open_async(self, session: PsSession) -> None:
            session.set_value("token", NAME.set("opened"))
            session.spawn(NAME.set, "spawned")

        async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
            self.on_close(session, close_reason)

    server = ps_server(Setting())
    client = ps_client(server)
    eventually(lambda: server.sessions and not server.sessions[0]._tasks)
    client.close()
    eventually(lambda: seen)
    assert seen == ["spawned", "-"]


@sync_and_async
def test_callbacks_of_several_sessions_that_wait_do_not_mix(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Waiting(PsCallback):
        def __init__(self) -> None:
            self.use_async_callback = use_async_callback

        def on_message(self, session: PsSession, message: bytes) -> None:
            NAME.set(message.decode())
            gevent.sleep(0.01)
            session.send(NAME.get())

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            NAME.set(message.decode())
            await asyncio.sleep(0.01)
            session.send(NAME.get())

    server = ps_server(Waiting())
    clients = [ps_client(server) for _ in range(5)]
    for _ in range(3):
        for number, client in enumerate(clients):
            client.send(f"name {number}")
        for number, client in enumerate(clients):
            client.expect(f"name {number}")


@sync_and_async
def test_on_accept_runs_in_the_context_of_the_session_to_come(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    seen: list[str] = []

    class Accepting(PsCallback):
        def __init__(self) -> None:
            self.use_async_callback = use_async_callback

        def on_accept(self, peer: object) -> None:
            seen.append(NAME.get())
            NAME.set("accepted")

        def on_open(self, session: PsSession) -> None:
            seen.append(NAME.get())

        async def on_accept_async(self, peer: object) -> None:
            self.on_accept(peer)

        async def on_open_async(self, session: PsSession) -> None:
            self.on_open(session)

    server = ps_server(Accepting())
    for count in (1, 2):
        ps_client(server)
        eventually(lambda count=count: len(seen) == 2 * count)  # type: ignore[misc]  # its default
    assert seen == ["-", "accepted"] * 2


def test_a_handler_has_a_context_too(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    closed: list[str] = []

    class Handler(PsHandler[bytes]):
        def handle(self, session: PsSession[bytes]) -> None:
            NAME.set("handler")
            for message in session:
                session.send(message + NAME.get().encode())

        def on_close(self, session: PsSession[bytes], close_reason: PsCloseReason) -> None:
            closed.append(NAME.get())

    with ps_client(ps_server(Handler())) as client:
        client.send("x")
        client.expect("xhandler")
    eventually(lambda: closed)
    assert closed == ["handler"]


def test_a_heartbeat_is_made_in_the_context_of_its_session(ps_client: ClientFactory) -> None:
    async def beat(_session: PsSession) -> bytes:
        counted = NAME.get()
        NAME.set("again")
        return counted.encode() + b"."

    class Naming(PsCallback):
        def on_open(self, session: PsSession) -> None:
            NAME.set("first")

    with local_server(Naming(), heartbeat=(10, beat)) as server:
        ps_client(server).expect("first.again.again.")


# Where it comes from


@sync_and_async
def test_the_context_of_a_session_is_a_copy_of_that_of_who_started_the_server(
    use_async_callback: bool, ps_client: ClientFactory
) -> None:
    callback = Naming(use_async_callback)
    stopped: list[str] = []

    class Stopping(Naming):
        def on_stop(self, owner: object) -> None:
            stopped.append(NAME.get())

        async def on_stop_async(self, owner: object) -> None:
            self.on_stop(owner)

    callback = Stopping(use_async_callback)
    server = local_server(callback)
    token = NAME.set("starter")
    try:
        server.start()
    finally:
        NAME.reset(token)
    for _ in range(2):
        with ps_client(server) as client:
            client.send("x")
            client.expect("x")
    server.shutdown()
    assert callback.of("starter") == ["on_open"] * 2
    assert stopped == ["starter"]


def test_the_context_of_a_client_s_session_is_a_copy_of_that_of_who_connects(
    ps_server: ServerFactory,
) -> None:
    address = ps_server(PsCallback()).address
    callback = Naming(use_async_callback=False)
    with PsMultiClient(callback) as bundle:
        for name in ("one", "two"):
            token = NAME.set(name)
            try:
                bundle.connect(*address)
            finally:
                NAME.reset(token)
        eventually(lambda: len(callback.of("one") + callback.of("two")) == 2)
    assert callback.of("one") == callback.of("two") == ["on_open"]


def test_each_session_of_a_client_that_stays_connected_begins_with_the_same_context() -> None:
    callback = Naming(use_async_callback=False)
    asked: list[str] = []

    def should_retry(_failures: int, _error: object) -> None:
        asked.append(NAME.get())

    reconnect = PsReconnect(first_delay=0.01, longest_delay=0.01, should_retry=should_retry)
    with local_server(PsCallback()) as server:
        client = PsClient(callback, *server.address, reconnect=reconnect)
        token = NAME.set("connector")
        try:
            client.connect()
        finally:
            NAME.reset(token)
        for count in (1, 2):
            eventually(lambda count=count: len(callback.of("connector")) == count)  # type: ignore[misc]  # its default
            eventually(lambda: client.session).close()  # type: ignore[union-attr]  # it is true
        eventually(lambda: len(callback.of("connector")) == 3)
        client.disconnect()
    assert callback.of("connector") == ["on_open"] * 3
    assert set(asked) == {"connector"}


# Coroutines and greenlets


def test_coroutines_see_a_copy_of_the_caller_s_context() -> None:
    async def get_and_set() -> str:
        await asyncio.sleep(0)
        found = NAME.get()
        NAME.set("coroutine's")
        return found

    token = NAME.set("caller's")
    try:
        assert run_coroutine(get_and_set()) == "caller's"
        spawned = spawn_coroutine(get_and_set())
        NAME.set("later")
        assert spawned.get(timeout=5) == "caller's"
        assert NAME.get() == "later"
    finally:
        NAME.reset(token)


def test_a_callback_s_coroutines_see_what_its_session_has_set(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    async def get_and_set() -> str:
        found = NAME.get()
        NAME.set("coroutine's")
        return found

    class Running(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            NAME.set("session's")
            session.send(run_coroutine(get_and_set()))
            session.send(spawn_coroutine(get_and_set()).get())
            session.send(NAME.get())

    client = ps_client(ps_server(Running()))
    client.send("x")
    client.expect("session's" * 3)


def test_work_in_a_copy_keeps_to_itself(ps_server: ServerFactory, ps_client: ClientFactory) -> None:
    def work(name: str) -> str:
        NAME.set(name)
        gevent.sleep(0)
        return NAME.get()

    class Spawning(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            NAME.set("session's")
            several = [
                session.spawn(contextvars.copy_context().run, work, name) for name in ("a", "b")
            ]
            session.send("".join(each.get() for each in several) + NAME.get())

    client = ps_client(ps_server(Spawning()))
    client.send("x")
    client.expect("absession's")


# Records


class Recorded(logging.Handler):
    """Notes with each record what a filter sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.addFilter(self.note)

    def note(self, record: logging.LogRecord) -> bool:
        self.seen.append((record.getMessage(), NAME.get()))
        return True

    def emit(self, record: logging.LogRecord) -> None:
        pass

    def names(self, containing: str) -> list[str]:
        return [name for message, name in self.seen if containing in message]


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    handler = Recorded()
    logger = logging.getLogger("psofa_gevent")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.logs_errors
@sync_and_async
def test_records_about_a_session_are_made_in_its_context(
    use_async_callback: bool,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    recorded: Recorded,
) -> None:
    class Failing(Naming):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            raise ArithmeticError("on_close")

    server = ps_server(Failing(use_async_callback))
    clients = [ps_client(server) for _ in range(2)]
    for client in clients:
        client.send("hello")
        client.expect("hello")
    for client in clients:
        client.send("fail")
        client.expect_eof()
    eventually(lambda: len(recorded.names("on_close failed")) == 2)
    eventually(lambda: server.get_session_count() == 0)
    assert sorted(recorded.names("LookupError")) == ["ann", "bob"]
    assert sorted(recorded.names("on_close failed")) == ["ann", "bob"]
    assert sorted(recorded.names(": closed")) == ["ann", "bob"]


@pytest.mark.logs_errors
@sync_and_async
def test_records_that_are_made_elsewhere_are_made_in_the_session_s_context_too(
    use_async_callback: bool,
    ps_client: ClientFactory,
    recorded: Recorded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "KILL_PERIOD", 0.01)

    def swallow(count: int) -> None:
        while count:
            try:
                gevent.sleep(60)
            except gevent.GreenletExit:
                count -= 1

    class Slow(Naming):
        def on_message(self, session: PsSession, message: bytes) -> None:
            session.spawn(swallow, 10)
            gevent.sleep(60)

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            session.spawn(swallow, 10)
            await asyncio.sleep(60)

    with local_server(Slow(use_async_callback), callback_timeout=0.5) as server:
        clients = [ps_client(server) for _ in range(2)]
        for client in clients:
            client.send("x")
        for client in clients:
            client.expect_eof()
        eventually(lambda: server.get_session_count() == 0)
    assert set(recorded.names("ran longer than callback_timeout")) == {"ann", "bob"}
    assert set(recorded.names("greenlets")) == {"ann", "bob"}


def test_a_client_that_stays_connected_tells_of_each_session_in_its_context(
    recorded: Recorded,
) -> None:
    reconnect = PsReconnect(first_delay=0.01, longest_delay=0.01)
    callback = Naming(use_async_callback=False)
    with (
        local_server(PsCallback()) as server,
        PsClient(callback, *server.address, reconnect=reconnect) as client,
    ):
        for name in ("ann", "bob", "cid"):
            eventually(lambda name=name: len(callback.of(name)) == 2)  # type: ignore[misc]  # its default
            eventually(lambda: client.session).close()  # type: ignore[union-attr]  # it is true
        eventually(lambda: len(recorded.names("ended: SELF_CLOSE")) == 3)
    assert recorded.names("ended: SELF_CLOSE") == ["ann", "bob", "cid"]


# What is left of it


@sync_and_async
def test_a_session_that_is_kept_in_its_own_context_needs_no_garbage_collector(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Holding(PsCallback):
        def __init__(self) -> None:
            self.use_async_callback = use_async_callback

        def on_open(self, session: PsSession) -> None:
            HELD.set(session)
            session.send("held")

        async def on_open_async(self, session: PsSession) -> None:
            self.on_open(session)

    server = ps_server(Holding())
    client = ps_client(server)
    (session,) = eventually(lambda: server.sessions)
    gone = weakref.ref(session)
    client.expect("held")
    gc.collect()
    gc.disable()
    try:
        del session
        client.close()
        eventually(lambda: gone() is None)
    finally:
        gc.enable()


def test_calls_of_other_threads_leave_the_contexts_alone(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Naming(use_async_callback=False)
    server: PsServer[Any] = ps_server(callback)
    client = ps_client(server)
    client.send("x")
    client.expect("x")
    (session,) = server.sessions

    def close() -> None:
        NAME.set("thread")
        session.send("y")
        session.close()

    NativeThread(close).wait()
    client.expect("y")
    eventually(lambda: "on_close" in callback.of("ann"))
    assert not callback.of("thread")
