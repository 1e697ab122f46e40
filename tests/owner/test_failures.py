"""Point 4 of the design: an exception ends its session with FAILED, and no other one notices."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import gevent
import gevent.event
import pytest

from acting import STALLING, ActingCallback, sending, wait_until_stalled
from helpers import run_python, stalled_peer
from psofa_gevent import PsCallback, PsClient, PsCloseReason, PsSendError, PsServer, PsSession
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)

FOREVER = 600.0

pytestmark = pytest.mark.logs_errors


class OwnError(BaseException):
    pass


EXCEPTIONS: list[Callable[[], BaseException]] = [
    ValueError,
    lambda: OSError(32, "Broken pipe"),
    TimeoutError,
    StopIteration,
    GeneratorExit,
    RecursionError,
    MemoryError,
    asyncio.CancelledError,
    gevent.GreenletExit,
    gevent.Timeout,
    OwnError,
    lambda: BaseExceptionGroup("several", [ValueError(), OwnError()]),
    lambda: PsSendError("of another session"),
]
SYSTEM_EXCEPTIONS: list[type[BaseException]] = [KeyboardInterrupt, SystemExit]


class Failing(RecordingCallback):
    """Echoes; raises `error`, once, in the callback `where` of a session that sent "fail"."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__(lambda message: message)
        self._where = where
        self._error = error
        self._raised = False

    def on_open(self, session: PsSession) -> None:
        super().on_open(session)
        self._act("on_open")

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        if message == b"fail":
            self._act("on_message")

    def on_eof(self, session: PsSession) -> None:
        super().on_eof(session)
        self._act("on_eof")

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        self._act("on_close")

    def _act(self, where: str) -> None:
        if where == self._where and not self._raised and len(self.named("on_open")) > 1:
            self._raised = True
            raise self._error


def send_fail_and_eof(client: ScriptedClient) -> None:
    """Have each callback called for the client's session, up to on_eof, unless one fails before."""
    with contextlib.suppress(OSError):
        client.send("fail")
        client.eof()


def error_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


def assert_serving(server: PsServer, *clients: ScriptedClient) -> None:
    """Sessions of before are untouched, and new ones are served."""
    for client in clients:
        client.send("still here")
        client.expect("still here")
    with ScriptedClient(server.address) as client:
        client.send("and new")
        client.expect("and new")
        client.eof()
        client.expect_eof()


# Exceptions in callbacks


@pytest.mark.parametrize("where", ["on_open", "on_message", "on_eof"])
@pytest.mark.parametrize("make_error", EXCEPTIONS)
def test_an_exception_in_a_callback_fails_its_session_and_no_other(
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
    where: str,
    make_error: Callable[[], BaseException],
) -> None:
    error = make_error()
    callback = Failing(where, error)
    server = ps_server(callback, allow_half_open=True)
    other = ps_client(server)
    callback.wait_for("on_open")
    client = ps_client(server)
    send_fail_and_eof(client)
    [closed] = callback.wait_for("on_close")
    session = closed.session
    assert session is not None
    assert closed.value is PsCloseReason.FAILED
    assert session.close_cause is error
    calls = [event.name for event in callback.events if event.session is session]
    expected = ["on_open", "on_message", "on_eof"]
    assert calls == [*expected[: expected.index(where) + 1], "on_close"]
    [record] = error_records(caplog)
    assert record.name == "psofa_gevent"
    assert str(session.connection_id) in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    with ScriptedClient(server.address) as new:
        other.send("still here")
        other.expect("still here")
        new.send("and new")
        new.expect("and new")
    assert server.started


class FailingAsync(PsCallback):
    """The same, async, and always in `where`."""

    use_async_callback = True

    def __init__(self, where: str, error: BaseException) -> None:
        self.reasons: list[PsCloseReason] = []
        self.causes: list[BaseException | None] = []
        self._where = where
        self._error = error

    async def on_open_async(self, session: PsSession) -> None:
        await self._act("on_open")

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await self._act("on_message")

    async def on_eof_async(self, session: PsSession) -> None:
        await self._act("on_eof")

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.reasons.append(close_reason)
        self.causes.append(session.close_cause)

    async def _act(self, where: str) -> None:
        await asyncio.sleep(0)
        if where == self._where:
            raise self._error


@pytest.mark.parametrize("where", ["on_open", "on_message", "on_eof"])
@pytest.mark.parametrize("make_error", [each for each in EXCEPTIONS if each is not StopIteration])
def test_an_exception_in_an_async_callback_fails_its_session(
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
    where: str,
    make_error: Callable[[], BaseException],
) -> None:
    error = make_error()
    callback = FailingAsync(where, error)
    server = ps_server(callback, allow_half_open=True)
    for _ in range(2):
        send_fail_and_eof(ps_client(server))
    eventually(lambda: len(callback.reasons) == 2)
    assert callback.reasons == [PsCloseReason.FAILED] * 2
    assert callback.causes == [error] * 2
    records = [record for record in error_records(caplog) if record.name == "psofa_gevent"]
    assert [record.exc_info[1] for record in records if record.exc_info] == [error] * 2


@pytest.mark.parametrize("make_error", EXCEPTIONS)
def test_an_exception_in_on_close_is_logged_and_the_next_on_close_runs(
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    caplog: pytest.LogCaptureFixture,
    make_error: Callable[[], BaseException],
) -> None:
    error = make_error()
    callback = Failing("on_close", error)
    server = ps_server(callback)
    clients = [ps_client(server) for _ in range(3)]
    callback.wait_for("on_open", 3)
    for client in clients:
        client.eof()
    closed = callback.wait_for("on_close", 3)
    assert {event.value for event in closed} == {PsCloseReason.PEER_CLOSE}
    eventually(lambda: any(r.exc_info and r.exc_info[1] is error for r in caplog.records))
    [record] = [r for r in caplog.records if r.exc_info and r.exc_info[1] is error]
    assert record.name == "psofa_gevent"
    session = closed[0].session
    assert session is not None
    assert str(session.connection_id) in record.getMessage()
    assert session.close_cause is None
    assert_serving(server)


@pytest.mark.parametrize("where", ["on_open", "on_message", "on_eof", "on_close"])
@pytest.mark.parametrize("kind", SYSTEM_EXCEPTIONS)
def test_keyboard_interrupt_and_system_exit_reach_the_main_greenlet_and_the_server_goes_on(
    ps_server: ServerFactory, ps_client: ClientFactory, where: str, kind: type[BaseException]
) -> None:
    error = kind("of a callback")
    callback = Failing(where, error)
    server = ps_server(callback, allow_half_open=True)
    other = ps_client(server)
    callback.wait_for("on_open")

    def provoke() -> None:
        client = ps_client(server)
        send_fail_and_eof(client)
        if where == "on_close":
            [eof] = callback.wait_for("on_eof")
            assert eof.session is not None
            eof.session.close()
        gevent.sleep(10)

    with pytest.raises(kind) as info:
        provoke()
    assert info.value is error
    [closed] = callback.wait_for("on_close")
    assert closed.session is not None
    if where == "on_close":
        assert closed.value is PsCloseReason.SELF_CLOSE
    else:
        assert closed.value is PsCloseReason.FAILED
        assert closed.session.close_cause is error
    other.send("still here")
    other.expect("still here")
    assert len(callback.named("on_close")) == 1


def test_an_exception_in_a_clients_callback_fails_its_session(ps_server: ServerFactory) -> None:
    def fail(session: PsSession) -> None:
        raise error

    error = ValueError("of a client")
    server = ps_server(RecordingCallback())
    callback = ActingCallback(on_open=fail)
    client = PsClient(callback, "127.0.0.1", server.address[1])
    session = client.connect()
    assert callback.closed(session) is PsCloseReason.FAILED
    assert session.close_cause is error
    assert client.session is None
    client.disconnect()


@pytest.mark.parametrize("wrap", [False, True])
def test_an_exception_that_is_its_own_cause_hangs_nobody(
    ps_server: ServerFactory, ps_client: ClientFactory, wrap: bool
) -> None:
    """Nothing in the language forbids it, and whoever walks along the causes must end, too."""

    def fail(session: PsSession, message: bytes) -> None:
        error = ValueError()
        if not wrap:
            raise error from error
        another = KeyError()
        another.__cause__ = error
        raise error from another

    callback = ActingCallback(on_message=fail)
    ps_client(ps_server(callback)).send("x")
    assert callback.closed(callback.opened()) is PsCloseReason.FAILED
    gevent.sleep(0)


def test_bytes_sent_before_the_exception_arrive_and_no_reset(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def send_and_fail(session: PsSession, message: bytes) -> None:
        session.send(b"x" * 100_000, None)
        raise ValueError

    client = ps_client(ps_server(ActingCallback(on_message=send_and_fail)))
    client.send("go")
    assert client.receive_until_eof() == b"x" * 100_000


def test_a_process_ends_with_the_exit_code_that_a_callback_asks_for() -> None:
    result = run_python("""
        import gevent
        from psofa_gevent import PsCallback, PsServer
        from psofa_gevent.testing import ScriptedClient

        class Exiting(PsCallback):
            def on_message(self, session, message):
                raise SystemExit(3)

        with PsServer(Exiting(), host="127.0.0.1", port=0) as server:
            gevent.spawn(lambda: ScriptedClient(server.address).send("x"))
            server.wait_for()
    """)
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr


def test_a_process_that_never_waits_for_its_server_is_interrupted_all_the_same() -> None:
    """The main greenlet waits in something of its own, and handles what is raised there."""
    result = run_python("""
        import gevent
        from psofa_gevent import PsCallback, PsServer
        from psofa_gevent.testing import ScriptedClient

        class Interrupting(PsCallback):
            def on_open(self, session):
                raise KeyboardInterrupt

            def on_close(self, session, close_reason):
                print(close_reason.name)

        with PsServer(Interrupting(), host="127.0.0.1", port=0) as server:
            for _ in range(2):
                try:
                    client = ScriptedClient(server.address)
                    gevent.sleep(10)
                except KeyboardInterrupt:
                    print("interrupted")
    """)
    assert sorted(result.stdout.split()) == ["FAILED"] * 2 + ["interrupted"] * 2, result
    assert result.returncode == 0, result.stderr


# Other failures


def test_a_reset_fails_the_session_and_is_no_error_of_ours(
    ps_server: ServerFactory, ps_client: ClientFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = ActingCallback()
    client = ps_client(ps_server(callback))
    session = callback.opened()
    client.reset()
    assert callback.closed(session) is PsCloseReason.FAILED
    assert isinstance(session.close_cause, ConnectionResetError)
    assert not error_records(caplog)


@pytest.mark.parametrize("messages", [1, 2])
def test_a_reset_that_comes_with_the_last_bytes_is_seen_after_them(
    messages: int, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    callback.wait_for("on_open")
    for number in range(1, messages):
        client.send("x")
        callback.wait_for("on_message", number)
    # Nothing here waits, so the session finds both at once.
    client.send("the last words")
    client.reset()
    (close,) = callback.wait_for("on_close")
    assert close.value is PsCloseReason.FAILED
    assert callback.named("on_message")[-1].value == b"the last words"


def test_bytes_that_wait_for_a_busy_callback_do_not_keep_the_hub_busy(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Waits(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            go_on.wait()

    go_on = gevent.event.Event()
    turns: list[None] = []
    callback = Waits()
    client = ps_client(ps_server(callback))
    client.send("first")
    callback.wait_for("on_message")
    client.send("second")
    watcher = gevent.get_hub().loop.check()
    watcher.start(turns.append, None)
    gevent.sleep(0.3)  # how long it is watched
    watcher.stop()
    watcher.close()
    go_on.set()
    callback.wait_for("on_message", 2)
    assert len(turns) < 100


def test_a_reset_while_a_callback_runs_fails_the_session_when_that_has_returned(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    go_on = gevent.event.Event()
    callback = ActingCallback(on_open=lambda session: go_on.wait())
    client = ps_client(ps_server(callback))
    session = callback.opened()
    client.reset()
    gevent.sleep(0.02)
    assert session.is_open
    go_on.set()
    assert callback.closed(session) is PsCloseReason.FAILED
    assert isinstance(session.close_cause, ConnectionResetError)


def test_a_timeout_that_a_callback_left_running_fails_its_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """It strikes when the callback has long returned, in the wait for bytes."""
    with contextlib.closing(gevent.Timeout(0.05)) as timeout:
        callback = ActingCallback(on_open=lambda session: timeout.start())
        ps_client(ps_server(callback))
        session = callback.opened()
        assert callback.closed(session) is PsCloseReason.FAILED
        assert session.close_cause is timeout


def test_a_send_to_a_peer_that_has_reset_fails_the_session(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    go_on = gevent.event.Event()
    errors: list[PsSendError] = []

    def send(session: PsSession, message: bytes) -> None:
        go_on.wait()
        for _ in range(2):
            try:
                session.send("x")
            except PsSendError as error:
                errors.append(error)

    callback = ActingCallback(on_message=send)
    client = ps_client(ps_server(callback))
    client.send("x")
    callback.wait_for("on_message")
    client.reset()
    go_on.set()
    session = callback.opened()
    assert callback.closed(session) is PsCloseReason.FAILED
    assert isinstance(session.close_cause, ConnectionError)
    assert len(errors) == 2
    assert str(session.connection_id) in str(errors[0])


def test_a_send_that_times_out_fails_the_session_with_that_error(ps_server: ServerFactory) -> None:
    callback = ActingCallback()
    with stalled_peer(ps_server(callback).address):
        session = callback.opened()
        error = sending(session, timeout=0.1).get()
        assert isinstance(error, PsSendError)
        assert callback.closed(session) is PsCloseReason.FAILED
        assert isinstance(session.close_cause, PsSendError)
        assert str(session.close_cause) == str(error)


@pytest.mark.hub_errors
@pytest.mark.parametrize("exception", [gevent.GreenletExit, gevent.Timeout, ValueError])
def test_a_sender_thrown_out_in_the_middle_of_its_message_fails_the_session(
    ps_server: ServerFactory, exception: type[BaseException]
) -> None:
    """The rest of the message will never come: what else is sent would be taken for it."""
    callback = ActingCallback()
    with stalled_peer(ps_server(callback, linger_timeout=0.0).address):
        session = callback.opened()
        sender = sending(session)
        wait_until_stalled(session)
        sender.kill(exception())
        assert callback.closed(session) is PsCloseReason.FAILED
        assert isinstance(session.close_cause, exception)


@pytest.mark.parametrize("kind", SYSTEM_EXCEPTIONS)
@pytest.mark.parametrize("where", ["waiting", "in a callback", "lingering"])
def test_an_interrupt_that_hits_the_sessions_greenlet_is_not_lost(
    ps_server: ServerFactory, where: str, kind: type[BaseException]
) -> None:
    """A real SIGINT hits the greenlet that runs, whatever that does."""
    greenlets: list[object] = []

    def act(session: PsSession, message: bytes) -> None:
        if message == b"wait":
            gevent.sleep(FOREVER)

    callback = ActingCallback(
        on_open=lambda session: greenlets.append(gevent.getcurrent()), on_message=act
    )
    server = ps_server(callback, linger_timeout=FOREVER)
    with stalled_peer(server.address) as client:
        session = callback.opened()
        reason = PsCloseReason.FAILED
        if where == "in a callback":
            client.send("wait")
            callback.wait_for("on_message")
        elif where == "lingering":
            sender = sending(session)
            wait_until_stalled(session)
            session.close()
            sender.join()
            reason = PsCloseReason.SELF_CLOSE
        [greenlet] = greenlets
        assert isinstance(greenlet, gevent.Greenlet)
        error = kind("from outside")
        greenlet.kill(error, block=False)
        with pytest.raises(kind) as info:
            gevent.sleep(10)
        assert info.value is error
        assert callback.closed(session) is reason


def test_close_cause_is_none_for_every_reason_but_failed(
    ps_client: ClientFactory,
) -> None:
    callback = ActingCallback()
    with serving(callback) as server:
        clients = []
        for number in range(4):
            clients.append(ps_client(server))
            assert callback.opened(number).close_cause is None
        sessions = [callback.opened(number) for number in range(4)]
        clients[0].eof()
        sessions[1].close()
        sessions[2].change_idle_milliseconds(1)
        callback.wait_for("on_close", 3)
        server.shutdown()
        reasons = [callback.closed(session) for session in sessions]
    assert reasons == [
        PsCloseReason.PEER_CLOSE,
        PsCloseReason.SELF_CLOSE,
        PsCloseReason.TIMEOUT,
        PsCloseReason.SHUTDOWN,
    ]
    assert [session.close_cause for session in sessions] == [None] * 4


def test_close_cause_is_known_before_and_in_and_after_on_close(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def fail(session: PsSession, message: bytes) -> None:
        raise error

    error = ValueError("the cause")
    causes: list[BaseException | None] = []
    callback = ActingCallback(
        on_message=fail, on_close=lambda session, reason: causes.append(session.close_cause)
    )
    ps_client(ps_server(callback)).send("x")
    session = callback.opened()
    callback.closed(session)
    gevent.sleep(0)
    assert causes == [error]
    assert session.close_cause is error


def test_a_session_whose_own_values_raise_in_repr_is_closed_like_any_other(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """Logging a failure must not depend on what the user keeps with the session or raises."""

    class NastyError(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

        __str__ = __repr__

    def fail(session: PsSession, message: bytes) -> None:
        session.set_value("nasty", NastyError())
        raise NastyError

    callback = ActingCallback(on_message=fail)
    ps_client(ps_server(callback)).send("x")
    assert callback.closed(callback.opened()) is PsCloseReason.FAILED


def test_a_log_handler_that_raises_costs_no_session_its_on_close(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise OSError(28, "No space left on device")

    def fail(session: PsSession, message: bytes) -> None:
        raise ValueError

    callback = ActingCallback(on_message=fail)
    server = ps_server(callback)
    client = ps_client(server)
    session = callback.opened()
    logger = logging.getLogger("psofa_gevent")
    handler = Broken()
    logger.addHandler(handler)
    try:
        client.send("x")
        assert callback.closed(session) is PsCloseReason.FAILED
        assert isinstance(session.close_cause, ValueError)
        assert server.get_session_count() == 0
    finally:
        logger.removeHandler(handler)


def test_a_log_handler_that_switches_greenlets_does_not_disturb_the_order(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """As one that writes to the network does, in a patched process."""

    class Switching(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            if gevent.getcurrent() is not gevent.get_hub():
                gevent.sleep(0.01)
            return True

    def fail(session: PsSession, message: bytes) -> None:
        raise ValueError

    callback = ActingCallback(on_message=fail)
    server = ps_server(callback)
    logger = logging.getLogger("psofa_gevent")
    handler = Switching(logging.DEBUG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        clients = [ps_client(server) for _ in range(4)]
        callback.wait_for("on_open", 4)
        clients[0].send("fail")
        clients[1].reset()
        clients[2].eof()
        callback.wait_for("on_close", 3)
        server.shutdown()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    for event in callback.named("on_open"):
        assert event.session is not None
        names = callback.names(event.session)
        assert names[0] == "on_open"
        assert names[-1] == "on_close"
        assert len(names) <= 3


def test_a_stalled_send_in_a_failing_callback_does_not_hold_its_end(
    ps_server: ServerFactory,
) -> None:
    """Another greenlet still sends when the callback raises: that send is over, too."""

    def fail(session: PsSession, message: bytes) -> None:
        raise ValueError

    callback = ActingCallback(on_message=fail)
    with stalled_peer(ps_server(callback, linger_timeout=0.05).address) as client:
        session = callback.opened()
        sender = sending(session, STALLING)
        wait_until_stalled(session)
        client.send("x")
        assert isinstance(sender.get(), PsSendError)
        assert callback.closed(session) is PsCloseReason.FAILED
