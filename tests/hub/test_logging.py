"""What the library logs: enough for who looks for a fault, nothing for who does not."""

from __future__ import annotations

import asyncio
import contextlib
import linecache
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import gevent
import pytest
from gevent import GreenletExit
from gevent.event import Event

import psofa_gevent
from helpers import Keeping, attached, echo, run_python, stalled_peer
from psofa_gevent import PsCallback, PsClient, PsCloseReason, PsMultiClient, PsServer, PsSession
from psofa_gevent.framing import FixedSize, Line
from psofa_gevent.testing import (
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)

NAME = "psofa_gevent"


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """All records of the library, of all levels."""
    keeping = Keeping()
    with attached(keeping):
        yield keeping.records


def of_level(records: list[logging.LogRecord], level: int) -> list[logging.LogRecord]:
    return [record for record in records if record.levelno >= level]


# The logger


def test_import_adds_a_null_handler_and_configures_nothing_else() -> None:
    outcome = run_python(
        """
        import logging

        def configuration():
            root = logging.getLogger()
            others = [name for name in logging.root.manager.loggerDict if "psofa" not in name]
            return (root.level, list(root.handlers), logging.lastResort, logging.raiseExceptions,
                    [list(logging.getLogger(name).handlers) for name in others
                     if isinstance(logging.root.manager.loggerDict[name], logging.Logger)
                     and logging.getLogger(name).handlers])

        before = configuration()
        import psofa_gevent
        assert configuration() == before, configuration()
        logger = logging.getLogger("psofa_gevent")
        print([type(handler).__name__ for handler in logger.handlers], logger.level,
              logger.propagate, logger.disabled)
        """
    )
    assert outcome.stderr == ""
    assert outcome.stdout == "['NullHandler'] 0 True False\n"


EVERYTHING_THAT_GOES_WRONG = """
import asyncio, socket, struct, sys
import gevent
from gevent.event import Event
from psofa_gevent import *

go_on = Event()

class Fails(PsCallback):
    def on_open(self, session):
        if session.owner.get_session_count() == 1:
            raise ValueError("in on_open")
    def on_message(self, session, message):
        if message == b"resist":
            while not go_on.is_set():
                try:
                    go_on.wait(20)
                except BaseException:
                    pass
        if message == b"hang":
            gevent.sleep(20)
        if message == b"big":
            session.send(bytes(50_000_000), timeout=0.05)
        raise ValueError("in on_message")
    def on_close(self, session, close_reason):
        raise ValueError("in on_close")
    def on_stop(self, owner):
        raise ValueError("in on_stop")

class FailsAsync(Fails):
    use_async_callback = True
    async def on_open_async(self, session):
        self.on_open(session)
    async def on_message_async(self, session, message):
        if message in (b"hang", b"resist"):
            await asyncio.sleep(20)
        self.on_message(session, message)
    async def on_close_async(self, session, close_reason):
        self.on_close(session, close_reason)
    async def on_stop_async(self, owner):
        self.on_stop(owner)

def talk(address, message, close):
    sock = gevent.socket.socket()
    sock.connect(address)
    sock.send(message)
    gevent.sleep(0.02)
    if close == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    return sock

for callback in (Fails(), FailsAsync()):
    for timeout in (None, 0.1):
        server = PsServer(callback, host="127.0.0.1", port=0, callback_timeout=timeout,
                          idle_milliseconds=500)
        with server:
            socks = [talk(server.address, message, close)
                     for message in (b"x", b"hang", b"big", b"resist")
                     for close in ("later", "reset")]
            gevent.sleep(0.2)
            server.shutdown(timeout=0.1)
        for sock in socks:
            sock.close()
        go_on.set()
        gevent.sleep(0.05)
        go_on.clear()

for host, port in (("127.0.0.1", 1), ("a..b", 1), ("x" * 100, 1), ("224.0.0.1", 1)):
    try:
        PsClient(PsCallback(), host, port).connect()
    except PsClientError:
        pass
try:
    PsServer(PsCallback(), host="a..b").start()
except PsServerError:
    pass
try:
    with PsMultiClient(PsCallback()) as bundle:
        bundle.connect("127.0.0.1", 1)
except PsMultiClientError:
    pass
"""


@pytest.mark.parametrize("patched", [False, True])
def test_nothing_is_printed_whatever_goes_wrong(patched: bool) -> None:
    patch = "from gevent import monkey\nmonkey.patch_all()\n" if patched else ""
    outcome = run_python(patch + EVERYTHING_THAT_GOES_WRONG)
    assert (outcome.stdout, outcome.stderr, outcome.returncode) == ("", "", 0)


def test_at_info_a_program_prints_where_it_listens_and_that_it_stopped() -> None:
    outcome = run_python(
        """
        import logging
        import gevent
        from psofa_gevent import PsCallback, PsClient, PsServer

        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
        with PsServer(PsCallback(), host="127.0.0.1", port=0) as server:
            print(server.address[1])
            for _ in range(5):
                with PsClient(PsCallback(), *server.address) as client:
                    client.session.send("hello")
                    gevent.sleep(0.01)
        """
    )
    port = outcome.stdout.strip()
    started, stopped = outcome.stderr.splitlines()
    for line in (started, stopped):
        assert line.startswith(f"INFO {NAME}")
        assert f"127.0.0.1:{port}" in line
    assert "listening" in started
    assert "stopped" in stopped


# INFO in production


def talk_and_leave(server: PsServer) -> None:
    """Sessions that end in every way that is no fault of the server's."""
    with ScriptedClient(server.address) as client:
        client.send("hello")
        client.expect("hello")
    client = ScriptedClient(server.address)
    client.send("hello")
    client.expect("hello")
    client.reset()
    with ScriptedClient(server.address) as client:
        client.eof()
        client.expect_eof()
    ScriptedClient(server.address).close()
    with PsClient(PsCallback(), *server.address) as library_client:
        assert library_client.session is not None
        library_client.session.send("hello")
    with PsMultiClient(PsCallback()) as bundle:
        bundle.disconnect(bundle.connect(*server.address))
        bundle.connect(*server.address).session.abort()


def test_sessions_log_nothing_at_info(records: list[logging.LogRecord]) -> None:
    callback = echo()
    with serving(callback, idle_milliseconds=200) as server:
        for _ in range(5):
            talk_and_leave(server)
        with ScriptedClient(server.address) as idle, ScriptedClient(server.address):
            idle.expect_eof()
            callback.wait_for("on_close", len(callback.named("on_open")))
        with ScriptedClient(server.address):
            eventually(server.get_session_count)
            server.shutdown()
    started, stopped = of_level(records, logging.INFO)
    assert started.levelno == stopped.levelno == logging.INFO
    assert "listening" in started.getMessage()
    assert "stopped" in stopped.getMessage()


def test_each_start_and_stop_is_logged_once(records: list[logging.LogRecord]) -> None:
    server = PsServer(echo(), host="127.0.0.1", port=0)
    for _ in range(3):
        with server:
            server.shutdown()
        server.shutdown()
    assert len(of_level(records, logging.INFO)) == 6


# Records about sessions


class Scenario:
    """One session that ends in some way, under a server of its own."""

    settings: Mapping[str, Any] = MappingProxyType({})
    level = logging.DEBUG
    """The most serious record that it makes."""

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        raise NotImplementedError

    def callback(self) -> RecordingCallback:
        return echo()


class PeerCloses(Scenario):
    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address) as client:
            client.send("hello")
            client.expect("hello")
        callback.wait_for("on_close")


class PeerResets(Scenario):
    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        client = ScriptedClient(server.address)
        callback.wait_for("on_open")
        client.reset()
        callback.wait_for("on_close")


class ClosesItself(Scenario):
    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address):
            callback.wait_for("on_open")
            next(iter(server.sessions)).close()
            callback.wait_for("on_close")


class Aborts(Scenario):
    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address):
            callback.wait_for("on_open")
            next(iter(server.sessions)).abort()
            callback.wait_for("on_close")


class IsIdle(Scenario):
    settings = MappingProxyType({"idle_milliseconds": 10})

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address):
            callback.wait_for("on_close")


class IsShutDown(Scenario):
    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address):
            callback.wait_for("on_open")
            server.shutdown()


class Misbehaving(RecordingCallback):
    """Does in each method what the test says."""

    def __init__(self, **actions: Callable[[PsSession], object]) -> None:
        super().__init__()
        self._actions = actions

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self._actions.get("on_open", id)(session)

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        self._actions.get("on_message", id)(session)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        self._actions.get("on_close", id)(session)


def fail(_session: PsSession) -> None:
    raise ValueError("two\nlines")


def hang(_session: PsSession) -> None:
    gevent.sleep(60)


class Resisting:
    """Swallows its kills until `go_on` is set."""

    def __init__(self) -> None:
        self.go_on = Event()

    def __call__(self, _session: PsSession) -> None:
        while not self.go_on.is_set():
            with contextlib.suppress(GreenletExit):
                self.go_on.wait(60)


class OnMessageFails(Scenario):
    level = logging.ERROR

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_message=fail)

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address) as client:
            client.send("hello")
            callback.wait_for("on_close")


class OnOpenFails(OnMessageFails):
    def callback(self) -> RecordingCallback:
        return Misbehaving(on_open=fail)


class OnCloseFails(PeerCloses):
    level = logging.ERROR

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_message=lambda session: session.send("hello"), on_close=fail)


class OnMessageTakesTooLong(OnMessageFails):
    settings = MappingProxyType({"callback_timeout": 0.05})

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_message=hang)


class OnCloseTakesTooLong(OnCloseFails):
    settings = MappingProxyType({"callback_timeout": 0.05})

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_message=lambda session: session.send("hello"), on_close=hang)


class SendTimesOut(Scenario):
    """The peer's doing: its PsSendError is no fault of the callback's, and told at DEBUG."""

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_open=lambda session: session.send(bytes(50_000_000), timeout=0.05))

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with stalled_peer(server.address):
            callback.wait_for("on_close")


class MessageIsMalformed(Scenario):
    settings = MappingProxyType({"framing": FixedSize(5).typed(int, str)})
    level = logging.WARNING

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address) as client:
            client.send("hello")
            callback.wait_for("on_close")


class MessageTrickles(MessageIsMalformed):
    settings = MappingProxyType({"framing": Line(), "frame_timeout": 0.05, "divide": 1})


class PeerLeavesWithinAMessage(MessageIsMalformed):
    settings = MappingProxyType({"framing": Line()})

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address) as client:
            client.send("hello")
        callback.wait_for("on_close")


class PostsOverflow(Scenario):
    settings = MappingProxyType({"high_water": 1_000})
    level = logging.WARNING

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_open=post_until_it_closes)

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with stalled_peer(server.address):
            callback.wait_for("on_close")


def post_until_it_closes(session: PsSession) -> None:
    while session.post(bytes(100_000)):
        pass


class StrangerKillsIt(Scenario):
    level = logging.ERROR

    def __init__(self) -> None:
        self.greenlets: list[Any] = []

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_open=lambda _session: self.greenlets.append(gevent.getcurrent()))

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address):
            eventually(lambda: self.greenlets)
            gevent.killall(self.greenlets)
            callback.wait_for("on_close")


class IsKilledAtShutdown(Scenario):
    level = logging.WARNING

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_message=hang)

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        with ScriptedClient(server.address) as client:
            client.send("hello")
            callback.wait_for("on_message")
            server.shutdown(timeout=0)


class OnCloseIsKilledAtShutdown(IsKilledAtShutdown):
    def callback(self) -> RecordingCallback:
        return Misbehaving(on_close=hang)


class IsLeftBehindAtShutdown(IsKilledAtShutdown):
    level = logging.ERROR

    def __init__(self) -> None:
        self.resisting = Resisting()

    def callback(self) -> RecordingCallback:
        return Misbehaving(on_message=self.resisting)

    def play(self, server: PsServer, callback: RecordingCallback) -> None:
        super().play(server, callback)
        self.resisting.go_on.set()


class OnCloseIsLeftBehindAtShutdown(IsLeftBehindAtShutdown):
    def callback(self) -> RecordingCallback:
        return Misbehaving(on_close=self.resisting)


SCENARIOS = [
    PeerCloses,
    PeerResets,
    ClosesItself,
    Aborts,
    IsIdle,
    IsShutDown,
    OnOpenFails,
    OnMessageFails,
    OnCloseFails,
    OnMessageTakesTooLong,
    OnCloseTakesTooLong,
    SendTimesOut,
    MessageIsMalformed,
    MessageTrickles,
    PeerLeavesWithinAMessage,
    PostsOverflow,
    StrangerKillsIt,
    IsKilledAtShutdown,
    OnCloseIsKilledAtShutdown,
    IsLeftBehindAtShutdown,
    OnCloseIsLeftBehindAtShutdown,
]


@pytest.mark.logs_errors
@pytest.mark.parametrize("kind", SCENARIOS)
def test_every_record_says_which_line_of_the_library_logged_it(
    kind: type[Scenario], records: list[logging.LogRecord]
) -> None:
    scenario = kind()
    callback = scenario.callback()
    with serving(callback, **scenario.settings) as server:
        scenario.play(server, callback)
    assert len(records) >= 4
    for record in records:
        assert Path(record.pathname).is_relative_to(Path(psofa_gevent.__file__).parent)
        assert record.filename != "logs.py"
        assert "log" in linecache.getline(record.pathname, record.lineno)
        assert record.funcName not in ("_log", "_log_peer", "tell")
    assert {"start", "_live"} <= {record.funcName for record in records}


@pytest.mark.logs_errors
@pytest.mark.parametrize("kind", SCENARIOS)
def test_every_record_about_a_session_has_its_id_in_one_line(
    kind: type[Scenario], records: list[logging.LogRecord]
) -> None:
    scenario = kind()
    callback = scenario.callback()
    with serving(callback, **scenario.settings) as server:
        scenario.play(server, callback)
    [opened] = callback.named("on_open")
    assert opened.session is not None
    about_the_session = [
        record for record in records if not record.getMessage().startswith("<PsServer ")
    ]
    assert len(about_the_session) >= 2, "at DEBUG at least its beginning and end are told"
    for record in about_the_session:
        assert str(opened.session.connection_id) in record.getMessage()
    for record in records:
        assert record.name == NAME
        assert "\n" not in record.getMessage()
    assert max(record.levelno for record in about_the_session) == scenario.level


# Failures


FAILURES: list[Callable[[], BaseException]] = [
    lambda: ValueError("mine"),
    gevent.Timeout,
    GreenletExit,
    asyncio.CancelledError,
]


def traceback_of(record: logging.LogRecord) -> str:
    return logging.Formatter().format(record)


@pytest.mark.logs_errors
@pytest.mark.parametrize("make_error", FAILURES, ids=["Exception", "Timeout", "exit", "cancelled"])
@pytest.mark.parametrize("method", ["on_open", "on_message"])
def test_exception_of_a_callback_is_logged_once_at_error_with_its_traceback(
    method: str, make_error: Callable[[], BaseException], records: list[logging.LogRecord]
) -> None:
    def name_to_look_for(_session: PsSession) -> None:
        raise error

    error = make_error()
    callback = Misbehaving(**{method: name_to_look_for})
    with serving(callback) as server, ScriptedClient(server.address) as client:
        client.send("hello")
        [closed] = callback.wait_for("on_close")
        assert closed.value is PsCloseReason.FAILED
        [record] = of_level(records, logging.WARNING)
        assert record.levelno == logging.ERROR
        assert record.exc_info
        assert record.exc_info[1] is error
        assert "name_to_look_for" in traceback_of(record)


@pytest.mark.logs_errors
@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
def test_exception_in_on_close_is_logged_once_at_error_with_its_traceback(
    use_async: bool, records: list[logging.LogRecord]
) -> None:
    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            super().on_close(session, close_reason)
            raise error

    error = ValueError("mine")
    callback = Callback(use_async_callback=use_async)
    with serving(callback) as server:
        ScriptedClient(server.address).close()
        callback.wait_for("on_close")
        [record] = eventually(lambda: of_level(records, logging.WARNING))
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert record.exc_info[1] is error
    assert "on_close" in traceback_of(record)


@pytest.mark.logs_errors
@pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
def test_exception_in_on_stop_names_the_server(
    use_async: bool, records: list[logging.LogRecord]
) -> None:
    class Callback(RecordingCallback):
        def on_stop(self, owner: Any) -> None:
            super().on_stop(owner)
            raise error

    error = ValueError("mine")
    with serving(Callback(use_async_callback=use_async)):
        pass
    [record] = of_level(records, logging.WARNING)
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert record.exc_info[1] is error
    assert record.getMessage().startswith("<PsServer 127.0.0.1:")


def test_failed_connect_is_raised_and_not_logged(records: list[logging.LogRecord]) -> None:
    client = PsClient(PsCallback(), "224.0.0.1", 9)
    with contextlib.suppress(Exception):
        client.connect()
    assert of_level(records, logging.INFO) == []


@pytest.mark.logs_errors
def test_shutdown_that_kills_says_how_many_and_whose(records: list[logging.LogRecord]) -> None:
    callback = Misbehaving(on_message=hang)
    with serving(callback) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(ScriptedClient(server.address)).send("hello")
        callback.wait_for("on_message", 3)
        server.shutdown(timeout=0)
    [announced] = [
        record
        for record in of_level(records, logging.WARNING)
        if record.getMessage().startswith("<PsServer ")
    ]
    assert announced.levelno == logging.WARNING
    assert "3 sessions" in announced.getMessage()


# Handlers


class Waiting(logging.Handler):
    """Waits in each record, as one does that sends them somewhere with patched sockets."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.begun: list[logging.LogRecord] = []
        self.ended: list[logging.LogRecord] = []
        self.problems: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.begun.append(record)
        if gevent.getcurrent() is gevent.get_hub():
            self.problems.append(f"in the hub, which must not wait: {record.getMessage()}")
            return
        for session in filter(is_a_session, record.args or ()):
            if session.waiting_since:
                self.problems.append(f"while the session waits: {record.getMessage()}")
        gevent.sleep(0.005)
        self.ended.append(record)


def is_a_session(value: object) -> TypeGuard[PsSession]:
    return isinstance(value, PsSession)


@pytest.mark.logs_errors
@pytest.mark.parametrize("kind", SCENARIOS)
def test_handler_that_waits_gets_every_record_in_order_and_costs_no_session_a_callback(
    kind: type[Scenario],
) -> None:
    scenario = kind()
    callback = scenario.callback()
    handler, keeping = Waiting(), Keeping()
    with attached(keeping), attached(handler):
        with serving(callback, **scenario.settings) as server:
            scenario.play(server, callback)
        eventually(lambda: len(handler.ended) == len(handler.begun) == len(keeping.records))
    assert handler.problems == []
    assert handler.begun == handler.ended == keeping.records
    created = [record.created for record in handler.ended]
    assert created == sorted(created)
    assert max(record.levelno for record in handler.ended) == max(scenario.level, logging.INFO)
    names = [event.name for event in callback.events if event.name != "on_message"]
    left_behind = kind is IsLeftBehindAtShutdown
    closes = [] if left_behind else ["on_close"]
    assert names == ["on_start", "on_open", *closes, "on_stop"]


@pytest.mark.logs_errors
def test_handler_that_waits_does_not_save_sessions_from_the_shutdown() -> None:
    callback = Misbehaving(on_message=hang)
    handler = Waiting()
    with (
        attached(handler),
        serving(callback) as server,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(20):
            stack.enter_context(ScriptedClient(server.address)).send("hello")
        callback.wait_for("on_message", 20)
        server.shutdown(timeout=0)
        assert len(callback.named("on_close")) == 20
        assert callback.events[-1].name == "on_stop"
        eventually(lambda: "stopped" in handler.ended[-1].getMessage())
    endings = [record for record in handler.ended if "a callback was ended" in record.getMessage()]
    assert len(endings) == 20
    assert handler.problems == []


def test_levels_that_are_off_cost_no_record(ps_server: ServerFactory) -> None:
    """Nor the repr of a session, which is most of what a record costs."""

    class Counting(logging.Filter):
        count = 0

        def filter(self, record: logging.LogRecord) -> bool:
            self.count += 1
            return True

    counting = Counting()
    logger = logging.getLogger(NAME)
    logger.addFilter(counting)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        server = ps_server(echo())
        made = counting.count
        talk_and_leave(server)
        eventually(lambda: server.get_session_count() == 0)
        assert counting.count == made
    finally:
        logger.setLevel(before)
        logger.removeFilter(counting)
