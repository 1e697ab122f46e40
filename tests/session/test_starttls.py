"""STARTTLS: a session that goes over to TLS when it is open."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from acting import sending
from helpers import NativeThread, close_reasons, takes
from marks import sync_and_async
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsHandler,
    PsMultiClient,
    PsSendError,
    PsServer,
    PsSession,
    PsTlsError,
    await_greenlet,
    run_coroutine,
)
from psofa_gevent.framing import Line
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually
from tls_peers import BIG, VERSIONS, TlsPeer, client_context, server_context


class StartTls(RecordingCallback):
    """A server that goes over to TLS when asked."""

    timeout: float | None = 2.0

    def __init__(self, *, use_async_callback: bool = False) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self.errors: list[BaseException] = []

    def on_message(self, session: PsSession[Any], message: bytes) -> None:
        super().on_message(session, message)
        if not message.startswith(b"STARTTLS"):
            session.send(message)
            return
        session.send("go ahead")
        with self.noting_errors():
            session.start_tls(server_context(), server_side=True, timeout=self.timeout)

    async def on_message_async(self, session: PsSession[Any], message: bytes) -> None:
        await super().on_message_async(session, message)
        if not message.startswith(b"STARTTLS"):
            await session.send_async(message)
            return
        await session.send_async("go ahead")
        with self.noting_errors():
            await session.start_tls_async(server_context(), server_side=True, timeout=self.timeout)

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.errors.append(error)
            raise


@contextlib.contextmanager
def asking_for_tls(server: PsServer[Any]) -> Iterator[TlsPeer]:
    """A client that has been told to go ahead, and speaks no TLS yet."""
    client = TlsPeer.__new__(TlsPeer)
    ScriptedClient.__init__(client, server.address)
    with client:
        client.send("STARTTLS\n")
        client.expect("go ahead\n")
        yield client


@sync_and_async
@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_goes_over_to_tls(
    version: ssl.TLSVersion, use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    server = ps_server(callback, framing=Line())
    came: list[bytes] = []

    def talk(session: PsSession[bytes]) -> None:
        session.send("plain")
        came.append(session.receive(timeout=5))
        session.send("STARTTLS")
        came.append(session.receive(timeout=5))
        context = client_context(version)
        session.start_tls(context, server_side=False, server_hostname="localhost")
        assert session.tls is not None
        for _ in range(3):
            session.send("secret")
            came.append(session.receive(timeout=5))

    with PsMultiClient(PsHandler(talk), framing=Line()) as bundle:
        bundle.connect(*server.address[:2])
        eventually(lambda: len(came) == 5)
    assert came == [b"plain", b"go ahead", b"secret", b"secret", b"secret"]
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]


@pytest.mark.logs_errors
@sync_and_async
@pytest.mark.parametrize("framing", [Line(), None], ids=["lines", "raw"])
def test_plaintext_before_the_handshake_is_refused(
    framing: Line | None, use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    server = ps_server(callback, framing=framing)
    with ScriptedClient(server.address) as client:
        client.send(b"STARTTLS\nINJECTED\n" if framing else b"STARTTLS")
        client.receive(len("go ahead"))
        if framing is None:
            client.send(b"INJECTED\n")
        (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, PsTlsError)
    why = "bytes came before" if framing else "WRONG_VERSION_NUMBER"
    assert why in str(closed.session.close_cause)
    assert callback.received() == b"STARTTLS"


@sync_and_async
def test_what_was_sent_before_leaves_unencrypted_before_the_handshake(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    context = client_context()

    class Much(StartTls):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            session.post(bytes(BIG), raw=True)
            session.post("go ahead")
            # As the client, which speaks first.
            session.start_tls(context, server_side=False, server_hostname="localhost")

        async def on_message_async(self, session: PsSession[Any], message: bytes) -> None:
            session.post(bytes(BIG), raw=True)
            session.post("go ahead")
            await session.start_tls_async(context, server_side=False, server_hostname="localhost")

    callback = Much(use_async_callback=use_async_callback)
    server = ps_server(callback, framing=Line(), high_water=2 * BIG)
    with ScriptedClient(server.address) as client:
        client.send("x\n")
        assert client.receive(BIG) == bytes(BIG)
        client.expect(b"go ahead\n\x16\x03")


@sync_and_async
def test_what_others_send_in_the_handshake_leaves_encrypted_after_it(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    server = ps_server(StartTls(use_async_callback=use_async_callback), framing=Line())
    with asking_for_tls(server) as client:
        (session,) = server.sessions
        server.broadcast("posted")
        sender = gevent.spawn(session.send, "sent")
        client.expect_nothing()
        client.go_over(client_context())
        assert client.hear(12) == b"posted\nsent\n"
        sender.get(timeout=5)


@sync_and_async
def test_who_waits_for_a_handshake_is_not_timed_out(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    server = ps_server(StartTls(use_async_callback=use_async_callback), framing=Line())
    with asking_for_tls(server) as client:
        (session,) = server.sessions
        sender = sending(session, b"sent", timeout=0.2)
        client.expect_nothing(0.6)
        client.go_over(client_context())
        assert client.hear(5) == b"sent\n"
        assert sender.get(timeout=5) is None


def test_bytes_before_starttls_do_not_hide_what_the_peer_takes_after_it(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(StartTls(), framing=Line(max_size=BIG), linger_timeout=0.0)
    client = TlsPeer.__new__(TlsPeer)
    ScriptedClient.__init__(client, server.address, receive_buffer_size=32_768)
    with client:
        (session,) = eventually(lambda: server.sessions)
        plain = sending(session, bytes(BIG))
        client.expect(bytes(BIG) + b"\n")
        assert plain.get(timeout=5) is None
        client.send("STARTTLS\n")
        client.expect("go ahead\n")
        sender = sending(session, bytes(BIG), timeout=1.0)
        client.expect_nothing()
        client.go_over(client_context())
        for _ in range(30):
            client.hear(7_500)
            gevent.sleep(0.05)
            assert session.is_open
        sender.kill()


@sync_and_async
@pytest.mark.parametrize("end", ["timeout", "close", "shutdown", "garbage"])
def test_what_others_send_in_a_handshake_that_fails_never_leaves(
    end: str, use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    callback.timeout = 0.3 if end == "timeout" else None
    server = ps_server(callback, framing=Line(), linger_timeout=1.0)
    with asking_for_tls(server) as client:
        (session,) = server.sessions
        server.broadcast("SECRET")
        sender = sending(session, b"SECRET")
        client.expect_nothing(0.05)
        if end == "garbage":
            client.send("no record\n")
        elif end != "timeout":
            server.shutdown() if end == "shutdown" else session.close()
        assert isinstance(sender.get(timeout=5), PsSendError)
        received = b""
        with contextlib.suppress(OSError):
            while data := client.socket.recv(65_536):
                received += data
        assert b"SECRET" not in received
    assert [type(error) for error in callback.errors] == [PsTlsError]


@sync_and_async
@pytest.mark.parametrize("end", ["timeout", "close", "abort", "shutdown", "thread", "FIN", "RST"])
def test_a_session_that_does_not_get_over_to_tls_fails_without_noise(
    end: str,
    use_async_callback: bool,
    ps_server: ServerFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    callback.timeout = 0.3 if end == "timeout" else None
    server = ps_server(callback, framing=Line())
    with asking_for_tls(server) as client:
        (session,) = server.sessions
        ends: dict[str, Callable[[], object]] = {
            "timeout": lambda: None,
            "close": session.close,
            "abort": session.abort,
            "shutdown": server.shutdown,
            "thread": lambda: NativeThread(session.close).wait(),
            "FIN": client.close,
            "RST": client.reset,
        }
        with takes(most=1.5):
            ends[end]()
            (closed,) = callback.wait_for("on_close")
    assert [type(error) for error in callback.errors] == [PsTlsError]
    levels = [record.levelno for record in caplog.records if record.levelno >= logging.WARNING]
    is_failure = end in ("timeout", "FIN", "RST")
    assert levels == ([logging.WARNING] if is_failure else [])
    expected = PsCloseReason.SHUTDOWN if end == "shutdown" else PsCloseReason.SELF_CLOSE
    assert closed.value is (PsCloseReason.FAILED if is_failure else expected)
    if is_failure:
        assert isinstance(session.close_cause, PsTlsError)


@sync_and_async
def test_a_handshake_that_is_broken_off_closes_the_session(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    class Impatient(StartTls):
        def on_message(self, session: PsSession[Any], message: bytes) -> None:
            with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.2):
                super().on_message(session, message)
            is_open.append(session.is_open)

        async def on_message_async(self, session: PsSession[Any], message: bytes) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await super().on_message_async(session, message)
            is_open.append(session.is_open)

    is_open: list[bool] = []
    callback = Impatient(use_async_callback=use_async_callback)
    server = ps_server(callback, framing=Line())
    with asking_for_tls(server) as client:
        server.broadcast("SECRET")
        client.expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert is_open == [False]
    assert closed.value is PsCloseReason.FAILED
    assert len(callback.errors) == 1


@pytest.mark.logs_errors
@sync_and_async
def test_callback_timeout_ends_a_handshake(
    use_async_callback: bool, ps_server: ServerFactory
) -> None:
    callback = StartTls(use_async_callback=use_async_callback)
    callback.timeout = None
    server = ps_server(callback, framing=Line(), callback_timeout=0.2)
    with asking_for_tls(server) as client:
        client.expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert "callback_timeout" in str(closed.session.close_cause)


def test_start_tls_async_does_not_hold_up_the_loop(ps_server: ServerFactory) -> None:
    callback = StartTls(use_async_callback=True)
    server = ps_server(callback, framing=Line())
    with asking_for_tls(server), asking_for_tls(server) as other:
        with ScriptedClient(server.address) as client:
            client.send("hello\n")
            client.expect("hello\n")
        other.go_over(client_context())
        other.say(b"hello\n")
        assert other.hear(6) == b"hello\n"
    eventually(lambda: not server.get_session_count())


def test_starttls_is_for_callbacks_and_for_once(ps_server: ServerFactory) -> None:
    errors: list[str] = []

    class Twice(PsCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            with pytest.raises(RuntimeError, match="has TLS already") as caught:
                session.start_tls(server_context(), server_side=True)
            errors.append(str(caught.value))

    server = ps_server(Twice(), ssl_context=server_context())
    with TlsPeer(server.address, client_context()) as client:
        (session,) = eventually(lambda: server.sessions)
        with pytest.raises(RuntimeError, match="sync callback"):
            session.start_tls(server_context(), server_side=True)
        client.say(b"x")
        eventually(lambda: errors)


def test_start_tls_async_is_for_async_callbacks_of_the_session_itself_and_for_once(
    ps_server: ServerFactory,
) -> None:
    refused: list[str] = []

    async def start(session: PsSession[Any]) -> None:
        with pytest.raises(RuntimeError) as caught:
            await session.start_tls_async(server_context(), server_side=True)
        refused.append(str(caught.value))

    class Everywhere(PsCallback[bytes]):
        use_async_callback = True

        async def on_message_async(self, session: PsSession[bytes], message: bytes) -> None:
            with pytest.raises(RuntimeError, match="sync callback"):
                session.start_tls(server_context(), server_side=True)
            await asyncio.create_task(start(session))
            for other in server.sessions:
                if other is not session:
                    await start(other)
            await await_greenlet(session.spawn(start, session))
            await session.send_async("go ahead")
            await session.start_tls_async(server_context(), server_side=True)
            with pytest.raises(RuntimeError, match="has TLS already"):
                await session.start_tls_async(server_context(), server_side=True)
            refused.append("the last")

    server = ps_server(Everywhere(), framing=Line())
    with ScriptedClient(server.address):
        eventually(lambda: len(server.sessions) == 1)
        with asking_for_tls(server) as client:
            run_coroutine(start(server.sessions[0]))
            client.go_over(client_context())
            eventually(lambda: "the last" in refused)
    assert len(refused) == 5
    assert all("async callback of the session" in each for each in refused[:-1])


def test_start_tls_async_works_in_a_coroutine_that_a_handler_runs(
    ps_server: ServerFactory,
) -> None:
    def handle(session: PsSession[bytes]) -> None:
        for message in session:
            if message == b"STARTTLS":
                session.send("go ahead")
                run_coroutine(session.start_tls_async(server_context(), server_side=True))
            else:
                session.send(message)

    server = ps_server(PsHandler(handle), framing=Line())
    with asking_for_tls(server) as client:
        client.go_over(client_context())
        client.say(b"hello\n")
        assert client.hear(6) == b"hello\n"
