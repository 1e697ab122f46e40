"""How a record comes to be: when, where, how long, how often, and what it costs who logs."""

from __future__ import annotations

import ast
import contextlib
import contextvars
import gc
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gevent
import pytest
from gevent import monkey
from gevent.event import Event
from greenlet import greenlet

import psofa_gevent
from helpers import Keeping, NativeThread, attached, local_server, run_python, stalled_peer
from marks import sync_and_async
from psofa_gevent import PsCloseReason, PsRefusal, PsSession
from psofa_gevent.framing import Line
from psofa_gevent.hub import logs
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

LONGEST = 1_000
HUGE = 1_000_000


class Holding(logging.Handler):
    """Waits in its first record until `go_on` is set. Notes each record's beginning and end."""

    def __init__(self, level: int = logging.DEBUG) -> None:
        super().__init__(level)
        self.go_on = Event()
        self.begun: list[logging.LogRecord] = []
        self.ended: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.begun.append(record)
        self.go_on.wait()
        self.ended.append(record)

    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.ended]


@pytest.fixture
def keeping() -> Iterator[Keeping]:
    """A handler that keeps all records of the library."""
    handler = Keeping()
    with attached(handler):
        yield handler


@pytest.fixture
def holding() -> Iterator[Holding]:
    """A handler that waits."""
    handler = Holding()
    with attached(handler):
        yield handler
        handler.go_on.set()
        logs.flush()


def messages(keeping: Keeping, least: int = logging.DEBUG) -> list[str]:
    return [record.getMessage() for record in keeping.records if record.levelno >= least]


# One place


def test_only_one_module_makes_records() -> None:
    folder = Path(psofa_gevent.__file__).parent
    methods = {"debug", "info", "warning", "error", "exception", "critical", "log"}
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="logger" | "logging"), attr=name)
                ) if name in methods:
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


# Length


class UnbearableError(Exception):
    """As a `UnicodeDecodeError`: what it says of a message has all of it, several times over."""

    def __str__(self) -> str:
        return "x\0\n" * (HUGE // 10)  # lines that traceback goes through one by one

    __repr__ = __str__


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


def with_note() -> Exception:
    error = ValueError("short")
    error.add_note("y" * HUGE)
    return error


def with_notes() -> Exception:
    error = ValueError("short")
    for number in range(500):
        error.add_note(f"{number} " + "y" * 900)
    return error


def with_cause() -> Exception:
    error = ValueError("short")
    error.__cause__ = UnbearableError()
    return error


def of_syntax() -> Exception:
    try:
        compile("(" + "z" * HUGE + "]", "what a peer sent", "eval")
    except SyntaxError as error:
        return error
    raise AssertionError


ERRORS: list[Callable[[], BaseException]] = [
    UnbearableError,
    UnspeakableError,
    with_note,
    with_notes,
    with_cause,
    of_syntax,
    lambda: ExceptionGroup("several", [UnbearableError(), ValueError("w" * HUGE)]),
    lambda: ValueError("v" * 900),
]


@pytest.mark.logs_errors
@pytest.mark.parametrize("make_error", ERRORS)
def test_a_failure_is_told_shortly_whatever_the_exception_says(
    make_error: Callable[[], BaseException],
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    keeping: Keeping,
) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            raise error

    error = make_error()
    callback = Callback()
    client = ps_client(ps_server(callback))
    client.send("x")
    (closed,) = callback.wait_for("on_close")
    (record,) = (each for each in keeping.records if each.levelno == logging.ERROR)
    assert closed.session is not None
    assert str(closed.session.connection_id) in record.getMessage()
    assert len(record.getMessage()) <= LONGEST
    assert record.getMessage().isprintable()
    text = logging.Formatter().format(record)
    assert "Traceback (most recent call last)" in text
    assert "in on_message" in text
    assert len(text) < 6_000
    assert type(error).__name__ in text
    # Neither the record nor the session has lost anything.
    assert record.exc_info is not None
    assert record.exc_info[1] is error is closed.session.close_cause


@pytest.mark.logs_errors
def test_a_traceback_of_many_frames_keeps_both_its_ends(
    ps_server: ServerFactory, ps_client: ClientFactory, keeping: Keeping
) -> None:
    class Callback(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            self.down(400)

        def down(self, left: int) -> None:
            if left:
                self.again(left - 1)
            raise ValueError("at the bottom")

        def again(self, left: int) -> None:
            self.down(left)

    callback = Callback()
    client = ps_client(ps_server(callback))
    client.send("x")
    callback.wait_for("on_close")
    (record,) = (each for each in keeping.records if each.levelno == logging.ERROR)
    text = logging.Formatter().format(record)
    assert "in on_message" in text
    assert text.endswith("ValueError: at the bottom")
    assert "more\n" in text
    assert len(text) < 50_000


def test_a_malformed_message_is_told_shortly_and_its_cause_is_complete(
    ps_server: ServerFactory, ps_client: ClientFactory, keeping: Keeping
) -> None:
    def decode(message: bytes) -> object:
        if message.startswith(b"\xff"):
            return json.loads(message)
        raise ValueError(message.decode())

    callback = RecordingCallback()
    server = ps_server(callback, framing=Line().typed(decode, bytes))
    for noise in (b"\xff" * 900_000, b"\x1b[2J\rforged" + b"x" * 900_000):
        ps_client(server).send(noise + b"\n")
    closed = callback.wait_for("on_close", 2)
    told = [each for each in messages(keeping) if "malformed message" in each]
    assert len(told) == 2
    for message in told:
        assert len(message) <= LONGEST
        assert message.isprintable()
    assert r"\x1b[2J\rforged" in "".join(told)
    causes = [each.session.close_cause.__cause__ for each in closed if each.session is not None]  # type: ignore[union-attr]  # each has a cause
    assert {type(cause) for cause in causes} == {UnicodeDecodeError, ValueError}
    for cause in causes:
        assert max(len(str(part)) for part in cause.args) >= 900_000  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [10, LONGEST, LONGEST + 1, 3 * LONGEST, HUGE])
@pytest.mark.parametrize("letter", ["x", "\0", "\U0001f40d"])
def test_a_message_has_both_ends_of_what_was_too_long(
    size: int, letter: str, keeping: Keeping
) -> None:
    logs.log(logging.INFO, "begins %s ends", letter * size)
    (message,) = messages(keeping)
    assert message.startswith("begins ")
    assert message.endswith(" ends")
    assert len(message) <= LONGEST
    assert ("…" in message) == (len(f"begins {ascii(letter)[1:-1] * size} ends") > LONGEST) or (
        letter == "\U0001f40d"
    )


def test_a_short_message_keeps_its_format_for_those_who_group_by_it(keeping: Keeping) -> None:
    logs.log(logging.INFO, "%r: %d", "someone", 7)
    (record,) = keeping.records
    assert (record.msg, record.args) == ("%r: %d", ("someone", 7))
    assert record.getMessage() == "'someone': 7"


# Who logs goes on


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


# Threads, processes


def test_a_thread_without_a_hub_logs_by_itself_under_its_own_name(keeping: Keeping) -> None:
    def act() -> None:
        logs.log(logging.INFO, "there")

    native = monkey.get_original("threading", "Thread")
    if native is not threading.Thread:
        pytest.skip("threads have no names of their own in a patched process")
    thread = threading.Thread(target=act, name="a thread of its own")
    thread.start()
    thread.join()
    (record,) = keeping.records
    assert record.threadName == "a thread of its own"
    assert record.funcName == "act"


AT_THE_END = """
    import logging
    import sys

    if "patched" in sys.argv:
        from gevent import monkey
        monkey.patch_all()
    import gevent
    from psofa_gevent import PsCallback, PsServer
    from psofa_gevent.testing import ScriptedClient

    class Slow(logging.Handler):
        def emit(self, record):
            gevent.sleep(0.02)
            print(record.getMessage().split(": ")[-1].split(",")[0], flush=True)

    logging.getLogger("psofa_gevent").addHandler(Slow())
    logging.getLogger("psofa_gevent").setLevel(logging.INFO)
    if "with" in sys.argv:
        with PsServer(PsCallback(), host="127.0.0.1", port=0):
            pass
    else:
        PsServer(PsCallback(), host="127.0.0.1", port=0).start()
"""


@pytest.mark.parametrize("mode", ["unpatched", "patched"])
@pytest.mark.parametrize("how", ["with", "left"])
def test_what_waits_at_the_end_of_the_process_is_handed_over(mode: str, how: str) -> None:
    done = run_python(AT_THE_END, mode, how)
    expected = ["listening", *(["stopped"] if how == "with" else [])]
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (expected, "", 0)


FORKED = """
    import logging
    import os
    import gevent
    from psofa_gevent.hub import logs

    class Slow(logging.Handler):
        def emit(self, record):
            gevent.sleep(0.05)
            os.write(1, f"{os.getpid() == first} {record.getMessage()}\\n".encode())

    first = os.getpid()
    hub = gevent.get_hub()
    logging.getLogger("psofa_gevent").addHandler(Slow())
    logging.getLogger("psofa_gevent").setLevel(logging.INFO)
    for number in range(4):
        logs.log(logging.INFO, "%d", number)
    child = os.fork()
    if child == 0:
        hub.loop.reinit()
        logs.log(logging.INFO, "mine")
        logs.flush(10)
        os._exit(0)
    logs.flush(10)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(os.environ.get("GEVENT_LOOP") == "libuv", reason="its loop can't be forked")
def test_a_forked_child_hands_over_its_own_records_only() -> None:
    done = run_python(FORKED, environment={"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("True")] == [f"True {n}" for n in range(4)]
    assert "False mine" in lines
    assert not {f"False {n}" for n in (1, 2, 3)} & set(lines)


# Context


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="nothing")


class Seeing(logging.Filter):
    """Notes what a context variable is where a record is filtered."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.seen = VARIABLE.get()
        return True


def test_filters_see_the_callers_context_variables_or_those_it_gives(holding: Holding) -> None:
    holding.addFilter(Seeing())
    context = contextvars.copy_context()
    context.run(VARIABLE.set, "given")
    for _ in range(2):  # one that is handed over at once, and one that waits
        logs.log(logging.INFO, "", context=context)
        context.run(logs.log, logging.INFO, "")
        logs.log(logging.INFO, "")
        context.run(logs.log, logging.INFO, "", context=context)  # while it is entered
    holding.go_on.set()
    eventually(lambda: len(holding.ended) == 8)
    seen = [record.seen for record in holding.ended]  # type: ignore[attr-defined]  # the filter's
    assert seen == ["given", "given", "nothing", "given"] * 2


@pytest.mark.logs_errors
@sync_and_async
def test_filters_see_the_context_variables_of_the_session_that_a_record_is_about(
    use_async_callback: bool, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Callback(RecordingCallback):
        def on_open(self, session: PsSession) -> None:
            VARIABLE.set(str(session.connection_id))
            super().on_open(session)

        def on_message(self, session: PsSession, message: bytes) -> None:
            raise ValueError("mine")

        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            raise ValueError("mine")

        async def on_open_async(self, session: PsSession) -> None:
            VARIABLE.set(str(session.connection_id))
            await super().on_open_async(session)

        async def on_message_async(self, session: PsSession, message: bytes) -> None:
            raise ValueError("mine")

        async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
            await super().on_close_async(session, close_reason)
            raise ValueError("mine")

    handler = Keeping()
    handler.addFilter(Seeing())
    callback = Callback(use_async_callback=use_async_callback)
    with attached(handler):
        server = ps_server(callback)
        clients = [ps_client(server) for _ in range(3)]
        callback.wait_for("on_open", 3)
        for client in clients:
            client.send("x")
        callback.wait_for("on_close", 3)
        eventually(lambda: len([m for m in messages(handler) if "on_close failed" in m]) == 3)
    for ending in (": failed: ", ": closed", ": on_close failed"):
        about = [each for each in handler.records if ending in each.getMessage()]
        assert len(about) == 3
        for record in about:
            assert record.seen in record.getMessage()  # type: ignore[attr-defined]


# What peers do


PEERS = 20


class Noise:
    """One kind of thing that peers do."""

    settings: Mapping[str, Any] = MappingProxyType({})
    text = ""

    def make(self, address: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def callback(self) -> RecordingCallback:
        return RecordingCallback()


class Malformed(Noise):
    settings = MappingProxyType({"framing": Line().typed(json.loads, json.dumps)})
    text = "malformed message"

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client:
            client.send("no json\n")
            client.expect_eof()


class Trickling(Noise):
    settings = MappingProxyType({"framing": Line(), "frame_timeout": 0.02, "divide": 50})
    text = "message timed out"

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client:
            client.send("half a line")
            client.expect_eof()


class LeavesWithin(Noise):
    settings = MappingProxyType({"framing": Line()})
    text = "closed after"

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client:
            client.send("half a line")
            client.eof()
            client.expect_eof()


class BadHeader(Noise):
    settings = MappingProxyType({"proxy_protocol": True})
    text = "bad PROXY header"

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client, contextlib.suppress(ConnectionError):
            client.send("no header at all\r\n")
            client.socket.recv(100)


class Refused(Noise):
    settings = MappingProxyType({"denied_networks": ["127.0.0.0/8"]})
    text = "its address is not allowed"

    def make(self, address: tuple[Any, ...]) -> None:
        with contextlib.suppress(ConnectionError), ScriptedClient(address) as client:
            client.socket.recv(100)


class Overflowing(Noise):
    settings = MappingProxyType({"high_water": 1_000})
    text = "beyond high_water"

    def callback(self) -> RecordingCallback:
        class Posting(RecordingCallback):
            def on_open(self, session: PsSession) -> None:
                super().on_open(session)
                while session.post(bytes(100_000)):
                    pass

        return Posting()

    def make(self, address: tuple[Any, ...]) -> None:
        with stalled_peer(address) as client, contextlib.suppress(ConnectionError):
            while client.socket.recv(1_000_000):
                pass


class ReadsNothing(Noise):
    settings = MappingProxyType({"callback_timeout": 0.02, "linger_timeout": 0})
    text = "it waited in a send"
    is_async = False
    _callback: RecordingCallback

    def callback(self) -> RecordingCallback:
        class Sending(RecordingCallback):
            def on_open(self, session: PsSession) -> None:
                super().on_open(session)
                session.send(bytes(32 * 1024 * 1024), timeout=None)

            async def on_open_async(self, session: PsSession) -> None:
                RecordingCallback.on_open(self, session)
                await session.send_async(bytes(32 * 1024 * 1024), timeout=None)

        self._callback = Sending(use_async_callback=self.is_async)
        return self._callback

    def make(self, address: tuple[Any, ...]) -> None:
        ended = len(self._callback.named("on_close"))
        with stalled_peer(address):
            (*_, closed) = self._callback.wait_for("on_close", ended + 1)
        assert closed.session is not None
        assert isinstance(closed.session.close_cause, TimeoutError)


class ReadsNothingOfCoroutines(ReadsNothing):
    is_async = True


class ReadsNothingOfMany(ReadsNothing):
    """What callbacks send for the messages of one read is collected, and leaves together."""

    settings = MappingProxyType({**ReadsNothing.settings, "framing": Line()})

    def callback(self) -> RecordingCallback:
        class Sending(RecordingCallback):
            def on_message(self, session: PsSession, message: Any) -> None:
                super().on_message(session, message)
                for _ in range(1_000):
                    session.send(bytes(32 * 1024), timeout=None)

            async def on_message_async(self, session: PsSession, message: Any) -> None:
                RecordingCallback.on_message(self, session, message)
                for _ in range(1_000):
                    await session.send_async(bytes(32 * 1024), timeout=None)

        self._callback = Sending(use_async_callback=self.is_async)
        return self._callback

    def make(self, address: tuple[Any, ...]) -> None:
        ended = len(self._callback.named("on_close"))
        with stalled_peer(address) as peer:
            peer.send("many\n")
            self._callback.wait_for("on_close", ended + 1)


class ReadsNothingOfManyCoroutines(ReadsNothingOfMany):
    is_async = True


class ScansTls(Noise):
    text = "TLS handshake failed"

    def __init__(self, context: object) -> None:
        self.settings = {"ssl_context": context}

    def make(self, address: tuple[Any, ...]) -> None:
        with ScriptedClient(address) as client, contextlib.suppress(ConnectionError):
            client.send("GET / HTTP/1.0\r\n\r\n")
            client.socket.recv(100)
            client.socket.recv(100)


NOISES: Mapping[str, Callable[..., Noise]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            Malformed,
            Trickling,
            LeavesWithin,
            BadHeader,
            Refused,
            Overflowing,
            ReadsNothing,
            ReadsNothingOfCoroutines,
            ReadsNothingOfMany,
            ReadsNothingOfManyCoroutines,
            ScansTls,
        )
    }
)


@pytest.fixture(params=list(NOISES))
def noise(request: pytest.FixtureRequest) -> Noise:
    if request.param == "ScansTls":
        trustme = pytest.importorskip("trustme")
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("localhost").configure_cert(context)
        return ScansTls(context)
    return NOISES[request.param]()


def test_what_many_peers_do_is_one_warning_and_a_count(
    noise: Noise, keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    def about(level: int) -> list[str]:
        return [
            each.getMessage()
            for each in keeping.records
            if each.levelno == level and noise.text in each.getMessage()
        ]

    with local_server(noise.callback(), **noise.settings) as server:
        for _ in range(PEERS):
            noise.make(server.address)
        eventually(lambda: len(about(logging.DEBUG)) == PEERS - 1)
        assert len(about(logging.WARNING)) == 1
        assert not [each for each in keeping.records if each.levelno > logging.WARNING]
        # When the minute is over it says how many others there were, and who was the first.
        monkeypatch.setattr(logs, "WARNING_PERIOD", 0.0)
        [(kind, window)] = server._peer_log._windows.items()
        window.stop_timer()
        window.start_timer(server._peer_log._end_window, kind)
        _first, count = eventually(lambda: about(logging.WARNING)[1:] and about(logging.WARNING))
        assert f"{PEERS - 1} more in the last" in count
        assert noise.text in count.partition("the first of them: ")[2]
        monkeypatch.undo()
        # And the next minute begins.
        for _ in range(2):
            noise.make(server.address)
        eventually(lambda: len(about(logging.DEBUG)) == PEERS + 1)
        assert len(about(logging.WARNING)) == 2
    (last,) = about(logging.INFO)
    assert "2 more in the last" in last
    assert len(about(logging.WARNING)) == 2


def test_the_minute_goes_on_over_a_restart(keeping: Keeping) -> None:
    server = local_server(denied_networks=["127.0.0.0/8"])
    for number in range(1, 4):
        with server:
            Refused().make(server.address)
            eventually(lambda: server.refused[PsRefusal.NETWORK] == number)  # noqa: B023 - at once
    assert len([each for each in messages(keeping, logging.WARNING) if "refused" in each]) == 1
    assert len([each for each in messages(keeping, logging.INFO) if "1 more" in each]) == 2


def test_each_kind_of_thing_has_its_own_warning(keeping: Keeping) -> None:
    with local_server(framing=Line().typed(json.loads, json.dumps)) as server:
        for _ in range(3):
            Malformed().make(server.address)
            LeavesWithin().make(server.address)
        eventually(lambda: server.get_session_count() == 0)
    assert len(messages(keeping, logging.WARNING)) == 2


def test_a_minute_without_others_ends_without_a_word(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "WARNING_PERIOD", 0.0)
    with local_server(framing=Line()) as server:
        for _ in range(3):
            LeavesWithin().make(server.address)
        eventually(lambda: server.get_session_count() == 0)
    assert len(messages(keeping, logging.WARNING)) == 3
    assert not [each for each in messages(keeping) if "more in the last" in each]


def test_the_clock_of_a_warning_keeps_neither_its_server_nor_the_hub() -> None:
    done = run_python(
        """
        import logging, sys, weakref
        import gevent
        from psofa_gevent import PsCallback, PsServer
        from psofa_gevent.hub.logs import PeerLog

        owner = PsServer(PsCallback())
        peer_log = PeerLog()
        for _ in range(3):
            peer_log.tell(owner, "kind", "text")
        gone = weakref.ref(owner)
        del owner
        assert gone() is None
        print("over", gevent.wait(timeout=5))
        """
    )
    assert (done.stdout, done.stderr) == ("over True\n", "")


def test_where_warnings_are_off_nothing_is_counted() -> None:
    logger = logging.getLogger("psofa_gevent")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        peer_log = logs.PeerLog()
        for _ in range(3):
            peer_log.tell(object(), "kind", "text")
        assert peer_log._windows == {}
    finally:
        logger.setLevel(before)


def test_the_greenlet_that_logs_is_none_of_gevents() -> None:
    """So nothing that counts, lists or joins an application's greenlets finds it."""
    assert issubclass(logs.LogGreenlet, greenlet)
    assert not issubclass(logs.LogGreenlet, gevent.Greenlet)
