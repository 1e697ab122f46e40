"""Point 10 of the design: a session that nobody keeps goes at once, without the garbage collector.

While each test runs the collector is off, so a reference cycle that holds a session holds it to the
test's end. Nothing is logged, as pytest would keep the records, and with them the sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import logging
import ssl
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import NoReturn

import gevent
import gevent.event
import pytest

from acting import STALLING, wait_until_stalled
from helpers import NativeThread, ScriptedServer, black_hole, free_port, stalled_peer
from marks import sync_and_async
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsClientError,
    PsCloseReason,
    PsMultiClient,
    PsReconnect,
    PsSendError,
    PsServer,
    PsSession,
    run_coroutine,
)
from psofa_gevent.framing import LengthPrefix
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


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    logger = logging.getLogger("psofa_gevent")
    gc.collect()
    gc.disable()
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False
        gc.enable()


class Forgetful(PsCallback):
    """Keeps of its sessions no more than weak references, to each and to what runs on_open."""

    def __init__(
        self,
        *,
        on_message: Callable[[PsSession], object] | None = None,
        on_close: Callable[[PsSession], object] | None = None,
    ) -> None:
        self.references: list[weakref.ref[object]] = []
        self.reasons: list[PsCloseReason] = []
        self._on_message = on_message
        self._on_close = on_close

    def on_open(self, session: PsSession) -> None:
        session.set_value("name", [session.connection_id])
        self.references += [weakref.ref(session), weakref.ref(self.runner())]

    def runner(self) -> object:
        return gevent.getcurrent()

    def on_message(self, session: PsSession, message: bytes) -> None:
        if self._on_message is not None:
            self._on_message(session)

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.reasons.append(close_reason)
        if self._on_close is not None:
            self._on_close(session)

    @property
    def session(self) -> PsSession:
        """The first session, which has been opened or is about to be. Keep it in no variable."""
        session = eventually(lambda: self.references)[0]()
        assert isinstance(session, PsSession)
        return session

    def assert_freed(self, count: int = 1) -> None:
        """Wait for `count` sessions to be closed and gone; no garbage collector helps."""
        eventually(lambda: len(self.reasons) == count)
        # The greenlets that run now must end: the session's, the closing one's turn, a sender's.
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.alive(), timeout=1.0)
        alive = self.alive()
        assert alive == [], [gc.get_referrers(each) for each in alive]

    def alive(self) -> list[object]:
        return [each for reference in self.references if (each := reference()) is not None]


# Each reason to close


def raise_value_error(session: PsSession) -> NoReturn:
    raise ValueError


def raise_from_another(session: PsSession) -> None:
    """An error with a cause and a context, whose frames all hold the session."""

    def deeper(_session: PsSession, kind: type[Exception]) -> NoReturn:
        raise kind

    try:
        deeper(session, IndexError)
    except IndexError as error:
        cause = error
    try:
        deeper(session, KeyError)
    except KeyError:
        raise ValueError from cause


def raise_group(session: PsSession) -> None:
    errors = []
    try:
        raise_value_error(session)
    except ValueError as error:
        errors.append(error)
    raise ExceptionGroup("several", errors)


def raise_cyclic(session: PsSession) -> None:
    error, another = ValueError(), KeyError()
    another.__cause__ = error
    raise error from another


def raise_with_session(session: PsSession) -> NoReturn:
    """The error's own attributes are the user's affair; a name in the message is harmless."""
    raise ValueError(f"{session!r}")


def send_too_much(session: PsSession) -> None:
    session.send(STALLING, 0.05)


def send_too_much_and_go_on(session: PsSession) -> None:
    try:
        session.send(STALLING, 0.05)
    except PsSendError:
        pass
    gevent.sleep(0)


def send_file_that_is_too_short(session: PsSession) -> None:
    session.send_file(io.BytesIO(b"abc"), count=5)


def send_file_and_fail(session: PsSession) -> None:
    def progress(sent: int, total: int | None) -> None:
        raise_with_session(session)

    session.send_file(io.BytesIO(b"abcdef"), count=6, piece_size=1, progress=progress)


Ending = Callable[[PsServer, PsSession, ScriptedClient], object]


def kill(session: PsSession) -> None:
    for each in gc.get_objects():
        if isinstance(each, gevent.Greenlet) and getattr(each, "session", None) is session:
            each.kill(block=False)


ENDINGS: dict[str, tuple[PsCloseReason, Ending]] = {
    "peer's FIN": (PsCloseReason.PEER_CLOSE, lambda server, session, client: client.eof()),
    "peer's RST": (PsCloseReason.FAILED, lambda server, session, client: client.reset()),
    "close": (PsCloseReason.SELF_CLOSE, lambda server, session, client: session.close()),
    "abort": (PsCloseReason.SELF_CLOSE, lambda server, session, client: session.abort()),
    "idle": (
        PsCloseReason.TIMEOUT,
        lambda server, session, client: session.change_idle_milliseconds(1),
    ),
    "shutdown": (PsCloseReason.SHUTDOWN, lambda server, session, client: server.shutdown()),
    "kill": (PsCloseReason.FAILED, lambda server, session, client: kill(session)),
}
CALLBACKS = [
    raise_value_error,
    raise_from_another,
    raise_group,
    raise_cyclic,
    raise_with_session,
    send_too_much,
    send_too_much_and_go_on,
    send_file_that_is_too_short,
    send_file_and_fail,
]


@pytest.mark.parametrize("how", ENDINGS)
@pytest.mark.parametrize("lingers", [False, True])
@pytest.mark.parametrize("framing", [None, LengthPrefix(1)], ids=["raw", "framed"])
def test_a_closed_session_goes_at_once(
    ps_server: ServerFactory,
    ps_client: ClientFactory,
    how: str,
    lingers: bool,
    framing: LengthPrefix | None,
) -> None:
    reason, end = ENDINGS[how]
    callback = Forgetful(
        on_message=lambda session: session.send(STALLING[: lingers * 1_000_000], raw=True)
    )
    server = ps_server(callback, linger_timeout=0.05, framing=framing)
    with stalled_peer(server.address) as client:
        client.send(b"\1x\2half"[: 7 if framing else 2])
        eventually(lambda: callback.session.messages_received)
        end(server, callback.session, client)
        callback.assert_freed()
    assert callback.reasons == [reason]


@pytest.mark.parametrize("on_message", CALLBACKS)
def test_a_session_whose_callback_failed_goes_at_once(
    ps_server: ServerFactory, on_message: Callable[[PsSession], object]
) -> None:
    callback = Forgetful(on_message=on_message)
    with stalled_peer(ps_server(callback).address) as client:
        client.send("x")
        callback.assert_freed()
    assert callback.reasons == [PsCloseReason.FAILED]


def test_a_session_that_is_kept_has_the_cause_of_its_failure_and_then_goes_with_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    kept: list[PsSession] = []
    callback = Forgetful(on_message=raise_from_another, on_close=kept.append)
    ps_client(ps_server(callback)).send("x")
    eventually(lambda: kept)
    gevent.sleep(0.01)
    cause = kept[0].close_cause
    assert isinstance(cause, ValueError)
    assert isinstance(cause.__cause__, IndexError)
    assert isinstance(cause.__context__, KeyError)
    # Keeping the error alone keeps no session either.
    kept.clear()
    callback.assert_freed()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_session_goes_at_once_whose_exception_went_to_the_main_greenlet(
    ps_server: ServerFactory, ps_client: ClientFactory, kind: type[BaseException]
) -> None:
    def fail(session: PsSession) -> None:
        raise kind

    callback = Forgetful(on_message=fail)
    ps_client(ps_server(callback)).send("x")
    try:
        gevent.sleep(10)
    except kind:
        pass
    else:
        pytest.fail("nothing was raised")
    callback.assert_freed()


@pytest.mark.parametrize("swallow", [False, True])
def test_a_session_whose_callback_took_too_long_goes_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory, swallow: bool
) -> None:
    def take_long(session: PsSession) -> None:
        try:
            gevent.sleep(FOREVER)
        except TimeoutError:
            if not swallow:
                raise

    callback = Forgetful(on_message=take_long)
    ps_client(ps_server(callback, callback_timeout=0.05)).send("x")
    callback.assert_freed()
    assert callback.reasons == [PsCloseReason.FAILED]


@sync_and_async
@pytest.mark.parametrize("swallow", [False, True])
def test_a_session_whose_on_accept_took_too_long_goes_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory, use_async_callback: bool, swallow: bool
) -> None:
    async def wait_async() -> None:
        with contextlib.suppress(*([asyncio.CancelledError] if swallow else [])):
            await asyncio.sleep(FOREVER)

    def wait() -> None:
        with contextlib.suppress(*([TimeoutError] if swallow else [])):
            gevent.sleep(FOREVER)

    class Slow(PsCallback):
        def on_accept(self, peer: object) -> None:
            note_sessions()
            wait()

        async def on_accept_async(self, peer: object) -> None:
            note_sessions()
            await wait_async()

    def note_sessions() -> None:
        assert server._manager is not None
        references.extend(weakref.ref(session) for session in server._manager.sessions)

    Slow.use_async_callback = use_async_callback
    references: list[weakref.ref[object]] = []
    server = ps_server(Slow(), callback_timeout=0.05)
    ps_client(server)
    eventually(lambda: references and references[0]() is None)


def test_a_session_whose_callbacks_have_a_time_limit_goes_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Forgetful(on_message=lambda session: gevent.sleep(0.001))
    client = ps_client(ps_server(callback, callback_timeout=FOREVER))
    client.send("x")
    client.eof()
    callback.assert_freed()
    assert callback.reasons == [PsCloseReason.PEER_CLOSE]


@pytest.mark.parametrize("kind", [ValueError, gevent.GreenletExit, gevent.Timeout])
def test_a_session_whose_on_close_failed_goes_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory, kind: type[BaseException]
) -> None:
    def fail(session: PsSession) -> None:
        raise kind

    callback = Forgetful(on_close=fail)
    server = ps_server(callback)
    ps_client(server).eof()
    callback.assert_freed()


def test_a_session_half_closed_both_ways_goes_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = Forgetful()
    client = ps_client(ps_server(callback, allow_half_open=True))
    callback.session.send_eof()
    client.expect_eof()
    client.eof()
    callback.assert_freed()
    assert callback.reasons == [PsCloseReason.PEER_CLOSE]


def test_the_session_of_a_client_goes_at_once_when_nobody_keeps_it(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(RecordingCallback())
    callback = Forgetful(on_message=raise_value_error)
    with PsMultiClient(callback) as bundle:
        bundle.connect("127.0.0.1", server.address[1])
        callback.session.close()
        callback.assert_freed()


# Senders


@pytest.mark.parametrize("how", ["close", "abort", "peer's FIN", "peer's RST", "shutdown"])
def test_a_session_whose_senders_were_interrupted_goes_at_once(
    ps_server: ServerFactory, how: str
) -> None:
    def send() -> None:
        try:
            callback.session.send(STALLING, None)
        except PsSendError:
            pass
        go_on.wait()

    go_on = gevent.event.Event()
    callback = Forgetful()
    server = ps_server(callback, linger_timeout=0.05)
    with stalled_peer(server.address) as client:
        senders = [gevent.spawn(send) for _ in range(3)]
        wait_until_stalled(callback.session)
        ENDINGS[how][1](server, callback.session, client)
        callback.assert_freed()
        go_on.set()
        gevent.joinall(senders)


def test_a_session_whose_senders_all_succeeded_after_a_wait_goes_at_once(
    ps_server: ServerFactory,
) -> None:
    def send() -> None:
        callback.session.send(STALLING, None)

    callback = Forgetful()
    with stalled_peer(ps_server(callback).address) as client:
        senders = [gevent.spawn(send) for _ in range(2)]
        wait_until_stalled(callback.session)
        client.receive(2 * len(STALLING))
        gevent.joinall(senders, raise_error=True)
        client.eof()
        callback.assert_freed()


@pytest.mark.parametrize("way", ["send timeout", "gevent.Timeout", "kill"])
def test_a_session_goes_when_the_greenlet_has_ended_whose_send_broke_it(
    ps_server: ServerFactory, way: str
) -> None:
    """That greenlet catches the error, and lives on with the session in a variable."""

    def send(session: PsSession) -> None:
        try:
            with gevent.Timeout(0.05 if way == "gevent.Timeout" else None):
                session.send(STALLING, 0.05 if way == "send timeout" else None)
        except (PsSendError, gevent.Timeout, gevent.GreenletExit):
            pass
        go_on.wait()

    go_on = gevent.event.Event()
    callback = Forgetful()
    with stalled_peer(ps_server(callback, linger_timeout=0.0).address):
        sender = gevent.spawn(send, callback.session)
        wait_until_stalled(callback.session)
        if way == "kill":
            sender.kill(block=False)
        eventually(lambda: callback.reasons)
        gevent.sleep(0.01)
        go_on.set()
        sender.join()
        del sender
        callback.assert_freed()
    assert callback.reasons == [PsCloseReason.FAILED]


@pytest.mark.parametrize("fail", [send_too_much, send_file_that_is_too_short])
def test_a_session_goes_though_the_error_of_its_send_is_raised_on_after_on_close(
    fail: Callable[[PsSession], object], ps_server: ServerFactory
) -> None:
    """Each frame that an error passes is added to its traceback, whoever else holds the error."""

    def send(session: PsSession) -> None:
        try:
            fail(session)
        except PsSendError:
            eventually(lambda: callback.reasons)
            gevent.sleep(0.01)
            raise

    def catch(session: PsSession) -> None:
        try:
            send(session)
        except PsSendError:
            pass

    callback = Forgetful()
    with stalled_peer(ps_server(callback).address):
        gevent.spawn(catch, callback.session).join()
        callback.assert_freed()


def test_a_session_goes_whose_send_of_another_os_thread_failed(ps_server: ServerFactory) -> None:
    def send() -> None:
        try:
            callback.session.send(STALLING, 0.05)
        except PsSendError:
            pass

    callback = Forgetful()
    with stalled_peer(ps_server(callback, linger_timeout=0.0).address):
        eventually(lambda: callback.references)
        NativeThread(send).wait()
        callback.assert_freed()


@pytest.mark.parametrize("what", ["message", "file"])
def test_a_session_goes_whose_send_of_a_loop_in_another_os_thread_failed(
    ps_server: ServerFactory, what: str
) -> None:
    async def send() -> None:
        with contextlib.suppress(PsSendError):
            if what == "message":
                await callback.session.send_async(STALLING, 0.05)
            else:
                await callback.session.send_file_async(io.BytesIO(STALLING), timeout=0.05)

    callback = Forgetful()
    with stalled_peer(ps_server(callback, linger_timeout=0.0).address):
        eventually(lambda: callback.references)
        NativeThread(asyncio.run, send()).wait()
        callback.assert_freed()


def test_a_session_goes_whose_peer_sends_a_bad_record_while_it_lingers(
    ps_server: ServerFactory,
) -> None:
    trustme = pytest.importorskip("trustme")
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = trustme.CA()
    authority.issue_cert("localhost").configure_cert(server_side)
    callback = Forgetful(on_message=PsSession.close)
    with ScriptedClient(ps_server(callback, ssl_context=server_side).address) as client:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(client_side)
        tls = client_side.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while tls.version() is None:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            client.send(outgoing.read())
            if tls.version() is None:
                incoming.write(client.socket.recv(65536))
        tls.write(b"close")
        client.send(outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        callback.assert_freed()
    assert callback.reasons == [PsCloseReason.SELF_CLOSE]


def test_a_session_goes_whose_send_was_refused_in_the_hub(ps_server: ServerFactory) -> None:
    def send() -> None:
        try:
            callback.session.send(STALLING)
        except PsSendError as error:
            errors.append(str(error))

    errors: list[str] = []
    callback = Forgetful()
    with stalled_peer(ps_server(callback, linger_timeout=0.0).address):
        eventually(lambda: callback.references)
        gevent.get_hub().loop.run_callback(send)
        eventually(lambda: errors)
        callback.assert_freed()


def test_a_session_goes_whose_send_timed_out_after_another_reason(
    ps_server: ServerFactory,
) -> None:
    def send_for_longer_than_it_takes_to_ask_for_the_shutdown(session: PsSession) -> None:
        with contextlib.suppress(PsSendError):
            session.send(STALLING, 1.0)

    callback = Forgetful(on_message=send_for_longer_than_it_takes_to_ask_for_the_shutdown)
    server = ps_server(callback, linger_timeout=0.0)
    with stalled_peer(server.address) as client:
        client.send("x")
        wait_until_stalled(callback.session)
        server.shutdown()
        callback.assert_freed()
    assert callback.reasons == [PsCloseReason.SHUTDOWN]


# Async callbacks


class ForgetfulAsync(Forgetful):
    use_async_callback = True

    def runner(self) -> object:
        return asyncio.current_task()

    async def on_open_async(self, session: PsSession) -> None:
        self.on_open(session)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await asyncio.sleep(0)
        self.on_message(session, message)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.on_close(session, close_reason)


@pytest.mark.parametrize("how", [how for how in ENDINGS if how != "idle"])
def test_a_closed_session_with_async_callbacks_goes_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory, how: str
) -> None:
    reason, end = ENDINGS[how]
    callback = ForgetfulAsync()
    server = ps_server(callback, linger_timeout=0.05)
    client = ps_client(server)
    client.send("x")
    eventually(lambda: callback.session.messages_received)
    gevent.sleep(0.01)
    end(server, callback.session, client)
    callback.assert_freed()
    assert callback.reasons == [reason]


@pytest.mark.parametrize(
    "on_message", [raise_value_error, raise_from_another, raise_group, raise_cyclic]
)
def test_a_session_whose_async_callback_failed_goes_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory, on_message: Callable[[PsSession], object]
) -> None:
    callback = ForgetfulAsync(on_message=on_message)
    ps_client(ps_server(callback)).send("x")
    callback.assert_freed()
    assert callback.reasons == [PsCloseReason.FAILED]


# A handshake in the middle


class Starting(Forgetful):
    def on_message(self, session: PsSession, message: bytes) -> None:
        session.start_tls(CLIENT_CONTEXT, server_side=False)


class StartingAsync(ForgetfulAsync):
    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await session.start_tls_async(CLIENT_CONTEXT, server_side=False)


CLIENT_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
CLIENT_CONTEXT.check_hostname = False


@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("make", [Starting, StartingAsync], ids=["sync", "async"])
def test_a_session_that_was_closed_in_a_handshake_goes_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory, make: type[Forgetful], end: str
) -> None:
    callback = make()
    client = ps_client(ps_server(callback, linger_timeout=0.1))
    client.send("x")
    client.receive(1)  # it has begun
    getattr(callback.session, end)()
    callback.assert_freed()
    assert callback.reasons == [PsCloseReason.SELF_CLOSE]


# What else is held


def test_a_thousand_sessions_leave_nothing_behind(ps_client: ClientFactory) -> None:
    callback = Forgetful(on_message=lambda session: session.send("reply"))
    with serving(callback) as server:
        for number in range(1_000):
            with ScriptedClient(server.address) as client:
                client.send("x")
                client.expect("reply")
                if number % 2:
                    client.reset()
        callback.assert_freed(1_000)


@pytest.mark.parametrize("kind", [Forgetful, ForgetfulAsync])
def test_an_idle_session_keeps_none_that_was_ready_with_it(
    ps_server: ServerFactory, ps_client: ClientFactory, kind: type[Forgetful]
) -> None:
    """One that waits again goes over to the next one that is ready, and so has its greenlet."""
    callback = kind()
    server = ps_server(callback)
    clients = [ps_client(server) for _ in range(10)]
    eventually(lambda: len(server.sessions) == 10)
    for client in clients:  # the hub does not run meanwhile: all are ready in one round
        client.send("x")
    eventually(lambda: all(session.messages_received for session in server.sessions))
    for number, client in enumerate(clients):
        if number % 2:
            client.eof()
    eventually(lambda: len(callback.reasons) == 5)
    eventually(lambda: sessions_alive(callback) == 5)


def sessions_alive(callback: Forgetful) -> int:
    return sum(isinstance(each, PsSession) for each in callback.alive())


def test_an_idle_session_keeps_no_message(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """Up to read_buffer_size bytes each: a gigabyte for 15,000 sessions that once had traffic."""

    class Keeping(PsCallback):
        def __init__(self) -> None:
            self.messages: list[bytes] = []

        def on_message(self, session: PsSession, message: bytes) -> None:
            self.messages.append(message)

    callback = Keeping()
    client = ps_client(ps_server(callback))
    client.send("the first and only")
    eventually(lambda: callback.messages)
    mine = [bytes(bytearray(b"the same, made here"))]
    eventually(lambda: sys.getrefcount(callback.messages[0]) == sys.getrefcount(mine[0]))


def test_a_session_keeps_no_message_that_was_sent(
    ps_server: ServerFactory,
) -> None:
    callback = Forgetful()
    message = bytearray(STALLING)
    with stalled_peer(ps_server(callback).address) as client:
        sender = gevent.spawn(lambda: callback.session.send(message, None))
        wait_until_stalled(callback.session)
        client.receive(len(message))
        sender.get()
        message.clear()  # raises BufferError while a view of it is left


def test_a_user_who_keeps_a_closed_session_keeps_no_other_and_no_greenlet(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    kept: list[PsSession] = []
    callback = Forgetful(on_close=lambda session: kept.append(session) if not kept else None)
    server = ps_server(callback)
    clients = [ps_client(server) for _ in range(3)]
    eventually(lambda: len(callback.references) == 6)
    for client in clients:
        client.eof()
    eventually(lambda: len(callback.reasons) == 3)
    # No more than that one, when the greenlets that run now have ended.
    eventually(lambda: [each for ref in callback.references if (each := ref())] == kept)


def test_a_client_that_stayed_connected_goes_at_once() -> None:
    """And so do its sessions, each as the next one comes, and what its attempts left."""
    callback = Forgetful()
    policy = PsReconnect(first_delay=0.001, longest_delay=0.001)
    with ScriptedServer() as scripted:
        nobody = ("127.0.0.1", free_port())
        client = PsClient(callback, *nobody, endpoints=[scripted.address], reconnect=policy)
        client.connect_in_background()
        for _ in range(20):
            scripted.accept().close()
        last = scripted.accept()
        eventually(lambda: len(callback.references) == 42 and len(callback.alive()) == 2)
        scripted.close()
        last.reset()
        eventually(lambda: len(callback.reasons) == 21)
        with pytest.raises(PsClientError, match=r"refused.*refused"):
            client.wait_connected(0.2)
        client.disconnect()
    reference = weakref.ref(client)
    del client
    callback.assert_freed(21)
    eventually(lambda: reference() is None)


@pytest.mark.parametrize("end", ["timeout", "disconnect"])
def test_a_client_that_did_not_get_connected_goes_at_once(end: str) -> None:
    def connect() -> None:
        client = PsClient(PsCallback(), *scripted.address, ssl_context=CLIENT_CONTEXT)
        references.append(weakref.ref(client))
        with contextlib.suppress(PsClientError):
            client.connect(timeout=0.5 if end == "timeout" else None)

    references: list[weakref.ref[PsClient]] = []
    with ScriptedServer() as scripted:
        connecting = gevent.spawn(connect)
        scripted.accept().receive(1)  # it waits for an answer
        client = references[0]()
        if client is not None and end == "disconnect":
            client.disconnect()
        del client
        connecting.join()
        eventually(lambda: references[0]() is None)


def test_a_connection_of_a_multi_client_that_stayed_connected_goes_at_once() -> None:
    callback = Forgetful()
    with ScriptedServer() as scripted, PsMultiClient(callback, reconnect=True) as bundle:
        connection = bundle.connect(*scripted.address)
        reference = weakref.ref(connection._link)
        bundle.disconnect(connection)
        eventually(lambda: callback.reasons)
        del connection
        callback.assert_freed()
        eventually(lambda: reference() is None)


@pytest.mark.parametrize("ending", ["timeout", "disconnect"])
def test_a_connect_that_was_ended_keeps_nothing_of_its_caller(ending: str) -> None:
    class Marker:
        pass

    def attempt(address: tuple[str, int]) -> weakref.ref[Marker]:
        marker = Marker()
        client = PsClient(PsCallback(), *address)
        if ending == "disconnect":
            disconnecting = gevent.spawn_later(0.05, client.disconnect)
        try:
            client.connect(timeout=0.05 if ending == "timeout" else None)
        except PsClientError:
            if ending == "disconnect":
                disconnecting.join()
            return weakref.ref(marker)
        pytest.fail("somebody is there")

    with black_hole() as address:
        reference = attempt(address)
        assert reference() is None


def test_a_coroutine_that_took_too_long_keeps_nothing_of_who_ran_it() -> None:
    class Marker:
        pass

    def attempt() -> weakref.ref[Marker]:
        marker = Marker()
        try:
            run_coroutine(asyncio.sleep(FOREVER), timeout=0.01)
        except TimeoutError:
            return weakref.ref(marker)
        pytest.fail("it ended")

    reference = attempt()
    assert reference() is None
