"""Calls from other OS threads (design, point 7): they arrive, they return, they never deadlock.

The threads are real ones, in a monkey-patched process too. ``wait`` lets the hub go on until a
thread has ended. ``join`` blocks the hub as the main thread of an unpatched program does: a call
that joins in time has returned without the hub's help.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import gevent
import gevent.event
import pytest

from helpers import (
    NativeThread,
    ScriptedServer,
    close_reasons,
    native_sleep,
    run_python,
    stalled_peer,
    takes,
)
from marks import needs_tracing
from psofa_gevent import (
    PsClient,
    PsClientError,
    PsCloseReason,
    PsMultiClient,
    PsMultiClientError,
    PsSendError,
    PsServer,
    PsServerError,
    PsSession,
)
from psofa_gevent.hub.thread import HubThread, NativeEvent
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
    serving,
)

AT_ONCE = 2.0
"""Seconds that a native join may take of a call that returns at once."""


def in_native_thread(function: Callable[..., Any], *args: Any) -> Any:
    return NativeThread(function, *args).wait()


def in_thread_pool(function: Callable[..., Any], *args: Any) -> Any:
    def outcome() -> tuple[Any, Exception | None]:
        # What is raised in the pool itself, gevent prints.
        try:
            return function(*args), None
        except Exception as error:
            return None, error

    value, error = gevent.get_hub().threadpool.apply(outcome)
    if error is not None:
        raise error
    return value


in_each_kind_of_thread = pytest.mark.parametrize("call", [in_native_thread, in_thread_pool])

InThread = Callable[..., Any]


def only_session(callback: RecordingCallback) -> PsSession:
    session = callback.wait_for("on_open")[0].session
    assert session is not None
    return session


# Sending


@in_each_kind_of_thread
@pytest.mark.parametrize("size", [0, 1, 8 * 1024 * 1024])
def test_send_from_a_thread_arrives_and_returns(
    size: int, call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)
    sending = gevent.spawn(call, session.send, bytes(size), None)
    assert client.receive(size) == bytes(size)
    sending.get(timeout=5)
    assert session.bytes_sent == size
    client.expect_nothing(0.01)


@in_each_kind_of_thread
def test_errors_of_send_reach_the_thread(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    ps_client(ps_server(callback, linger_timeout=0.0))
    session = only_session(callback)
    with pytest.raises(TypeError):
        call(session.send, 1)
    with pytest.raises(ValueError, match="timeout"):
        call(session.send, "x", -1)
    with pytest.raises(PsSendError, match=r"accepted no data for 0\.2 s"):
        call(session.send, bytes(64 * 1024 * 1024), 0.2)
    assert callback.wait_for("on_close")[0].value is PsCloseReason.FAILED
    with pytest.raises(PsSendError, match="closed"):
        call(session.send, "x")


def test_sends_of_many_threads_never_interleave_and_keep_each_threads_order(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback), receive_buffer_size=16_384)
    session = only_session(callback)
    size, count = 20_000, 10

    def send_all(letter: str) -> None:
        for number in range(count):
            session.send(f"{letter}{number}" * (size // 2), timeout=None)

    letters = "abcdefgh"
    threads = [NativeThread(send_all, letter) for letter in letters]
    received = client.receive(size * count * len(letters)).decode()
    for thread in threads:
        thread.wait()
    messages = [received[start : start + size] for start in range(0, len(received), size)]
    for letter in letters:
        mine = [message for message in messages if message.startswith(letter)]
        assert mine == [f"{letter}{number}" * (size // 2) for number in range(count)]


def test_send_from_a_thread_on_a_closed_session_needs_no_hub(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    ps_client(ps_server(callback))
    session = only_session(callback)
    session.close()
    with pytest.raises(PsSendError):
        NativeThread(session.send, "x").join(AT_ONCE)


def test_thread_whose_send_waits_is_released_by_the_close(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    ps_client(ps_server(callback, linger_timeout=0.0))
    session = only_session(callback)
    thread = NativeThread(session.send, bytes(64 * 1024 * 1024), None)
    eventually(lambda: session.bytes_sent > 0)
    session.close()
    with pytest.raises(PsSendError):
        thread.wait()
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_thread_whose_send_waits_is_released_by_the_shutdown_and_may_be_joined_natively(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=0.0)
    ps_client(server)
    session = only_session(callback)
    thread = NativeThread(session.send, bytes(64 * 1024 * 1024), None)
    eventually(lambda: session.bytes_sent > 0)
    server.shutdown()
    with pytest.raises(PsSendError):
        thread.join(AT_ONCE)
    assert close_reasons(callback) == [PsCloseReason.SHUTDOWN]


# Calls that return at once, whatever the hub does


@in_each_kind_of_thread
def test_close_from_a_thread_closes(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)

    def close() -> bool:
        session.close()
        return session.is_open

    assert call(close) is False
    client.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@in_each_kind_of_thread
def test_abort_from_a_thread_resets(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)
    call(session.abort)
    client.expect_reset()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@in_each_kind_of_thread
def test_send_eof_from_a_thread_half_closes_after_its_sends(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)

    def send_and_end() -> None:
        session.send("last")
        session.send_eof()
        with pytest.raises(PsSendError):
            session.send("more")

    call(send_and_end)
    assert client.receive_until_eof() == b"last"
    assert session.is_open
    client.send("heard")
    callback.wait_for("on_message")


def test_send_eof_of_a_thread_does_not_overtake_a_send_that_another_has_begun(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    client = ps_client(ps_server(callback))
    session = only_session(callback)
    # The hub stands still meanwhile, so nothing of both is done yet.
    sending = NativeThread(session.send, "begun before")
    native_sleep(0.1)  # nothing tells, without the hub, that it has begun
    NativeThread(session.send_eof).join(AT_ONCE)
    assert client.receive_until_eof() == b"begun before"
    sending.wait()


def test_calls_that_never_wait_return_while_the_hub_stands_still(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    session = only_session(callback)
    for call in (
        server.stop_accepting,
        server.resume_accepting,
        session.send_eof,
        session.close,
        session.close,
        session.abort,
        session.abort,
    ):
        NativeThread(call).join(AT_ONCE)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_disconnect_of_a_multi_client_from_a_thread_returns_at_once() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as listener, PsMultiClient(callback) as bundle:
        connection = bundle.connect(*listener.address)
        kept = bundle.connect(*listener.address)
        NativeThread(bundle.disconnect, connection).join(AT_ONCE)
        assert not connection.session.is_open
        callback.wait_for("on_close", session=connection.session)
        assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]
        assert kept.session.is_open


class ActsInMessage(RecordingCallback):
    """Does what it is told in ``on_message``, in the session's own greenlet."""

    def __init__(self, action: Callable[[PsSession], object]) -> None:
        super().__init__()
        self._action = action

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        self._action(session)


@pytest.mark.logs_errors
def test_close_from_a_thread_wins_over_what_fails_after_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    def close_and_fail(session: PsSession) -> None:
        NativeThread(session.close).join(AT_ONCE)
        assert not session.is_open
        raise ValueError("later than the close")

    callback = ActsInMessage(close_and_fail)
    client = ps_client(ps_server(callback))
    client.send("x")
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_close_from_a_thread_wins_over_a_shutdown_after_it(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    session = only_session(callback)
    NativeThread(session.close).join(AT_ONCE)
    server.shutdown()
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


def test_abort_from_a_thread_resets_also_when_the_callback_returns_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsInMessage(lambda session: NativeThread(session.abort).join(AT_ONCE))
    client = ps_client(ps_server(callback))
    client.send("x")
    client.expect_reset()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@in_each_kind_of_thread
def test_accepting_stops_and_resumes_from_threads(
    call: InThread, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback(reply=bytes)
    server = ps_server(callback)
    before = ps_client(server)
    callback.wait_for("on_open")
    for round_number in range(1, 4):
        call(server.stop_accepting)
        waiting = ps_client(server)
        waiting.send("x")
        waiting.expect_nothing(0.05)
        before.send("x")
        before.expect("x")
        assert len(callback.named("on_open")) == round_number
        call(server.resume_accepting)
        waiting.expect("x")


# Calls that wait


@in_each_kind_of_thread
@pytest.mark.parametrize("use_async_callback", [False, True])
def test_shutdown_from_a_thread_returns_when_all_is_done(
    use_async_callback: bool,
    call: InThread,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
) -> None:
    callback = RecordingCallback(use_async_callback=use_async_callback)
    server = ps_server(callback)
    clients = [ps_client(server) for _ in range(5)]
    callback.wait_for("on_open", 5)
    seen_by_the_thread: list[Any] = []

    def shut_down() -> None:
        server.shutdown()
        seen_by_the_thread.append((close_reasons(callback), len(callback.named("on_stop"))))
        seen_by_the_thread.append((server.started, server.get_session_count()))

    call(shut_down)
    assert seen_by_the_thread == [([PsCloseReason.SHUTDOWN] * 5, 1), (False, 0)]
    for client in clients:
        client.expect_eof()
    assert server.wait_for(0)
    call(server.shutdown)


def test_thread_that_shuts_down_may_be_joined_natively_as_soon_as_wait_for_returned(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    callback.wait_for("on_open")
    threads = [NativeThread(server.shutdown) for _ in range(5)]
    assert server.wait_for()
    for thread in threads:
        thread.join(AT_ONCE)


def test_shutdown_from_threads_greenlets_and_a_callback_at_once(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = ActsInMessage(lambda _session: server.shutdown())
    server = ps_server(callback)
    client = ps_client(server)
    ps_client(server)
    callback.wait_for("on_open", 2)
    client.send("x")
    threads = [NativeThread(server.shutdown) for _ in range(5)]
    greenlets = [gevent.spawn(server.shutdown) for _ in range(5)]
    assert server.wait_for(5)
    for thread in threads:
        thread.join(AT_ONCE)
    gevent.joinall(greenlets, timeout=5, raise_error=True)
    assert close_reasons(callback) == [PsCloseReason.SHUTDOWN] * 2
    assert len(callback.named("on_stop")) == 1


def test_shutdown_from_a_thread_that_a_callback_waits_for_returns_at_the_timeout(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    # A deadlock of the user's own making ends with the shutdown's timeout.
    has_ended: list[bool] = []

    def wait_for_the_shutdown(session: PsSession) -> None:
        try:
            in_native_thread(server.shutdown, 0.2)
        finally:
            has_ended.append(True)

    callback = ActsInMessage(wait_for_the_shutdown)
    server = ps_server(callback)
    client = ps_client(server)
    with takes(0.2, most=1.2):
        client.send("x")
        assert server.wait_for(30)
    assert has_ended


@in_each_kind_of_thread
def test_disconnect_of_a_client_from_a_thread_returns_after_on_close(call: InThread) -> None:
    callback = RecordingCallback()
    with ScriptedServer() as listener:
        client = PsClient(callback, *listener.address)
        for count in (1, 2):
            client.connect()
            call(client.disconnect)
            assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE] * count
            assert len(callback.named("on_stop")) == count
        call(client.disconnect)


def test_thread_that_disconnects_may_be_joined_natively_as_soon_as_the_client_has() -> None:
    callback = RecordingCallback()
    with ScriptedServer() as listener:
        client = PsClient(callback, *listener.address)
        client.connect()
        threads = [NativeThread(client.disconnect) for _ in range(3)]
        client.disconnect()
        for thread in threads:
            thread.join(AT_ONCE)
        assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE]


@in_each_kind_of_thread
def test_destroy_bundle_from_a_thread_returns_after_every_on_close(call: InThread) -> None:
    callback = RecordingCallback()
    with ScriptedServer() as listener:
        bundle = PsMultiClient(callback)
        bundle.init_bundle()
        for _ in range(5):
            bundle.connect(*listener.address)
        call(bundle.destroy_bundle)
        assert close_reasons(callback) == [PsCloseReason.SELF_CLOSE] * 5
        assert bundle.get_session_count() == 0


def test_disconnect_from_a_thread_ends_an_attempt_to_connect() -> None:
    callback = RecordingCallback()
    with ScriptedServer(backlog=0) as listener:
        with_full_backlog = [ScriptedClient(listener.address)]
        client = PsClient(callback, *listener.address)

        def connect_until_it_waits() -> None:
            while True:
                with_full_backlog.append(ScriptedClient(listener.address, timeout=0.3))

        with pytest.raises(TimeoutError):
            connect_until_it_waits()
        connecting = gevent.spawn(expect_client_error, client)
        callback.wait_for("on_start")
        in_native_thread(client.disconnect)
        connecting.get(timeout=5)
        for each in with_full_backlog:
            each.close()


def expect_client_error(client: PsClient) -> None:
    with pytest.raises(PsClientError):
        client.connect()


# Calls that wait for a hub that runs no more


@pytest.mark.parametrize("drain", [0.0, 0.5])
def test_shutdown_from_a_thread_returns_at_the_end_of_its_time_if_the_hub_stands_still(
    drain: float, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    callback.wait_for("on_open")
    with takes(1.0 + drain, most=1.0 + drain):
        NativeThread(server.shutdown, 1.0, drain=drain).join()
    assert server.get_session_count() == 1
    assert server.wait_for(5), "the stop goes on when the hub runs again"
    assert close_reasons(callback) == [PsCloseReason.SHUTDOWN]


def test_clients_are_given_up_from_a_thread_if_the_hub_stands_still(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(RecordingCallback())
    client = PsClient(RecordingCallback(), *server.address)
    client.connect()
    with PsMultiClient(RecordingCallback()) as bundle, client:
        bundle.connect(*server.address)
        with takes(most=2.5):
            NativeThread(client.disconnect, 0.1).join()
            NativeThread(bundle.destroy_bundle, 0.1).join()
        assert client.session is not None
        assert bundle.get_session_count() == 1


def test_shutdown_from_a_thread_goes_on_waiting_for_a_hub_that_runs(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    """A killed ``on_close`` has a second beyond the timeout, and it takes it here."""
    ended: list[str] = []

    class Callback(RecordingCallback):
        def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
            try:
                gevent.sleep(60)
            finally:
                gevent.sleep(0.3)
                ended.append("on_close")

        def on_stop(self, owner: object) -> None:
            ended.append("on_stop")

    callback = Callback()
    server = ps_server(callback)
    ps_client(server)
    callback.wait_for("on_open")
    NativeThread(server.shutdown, 0.0).wait()
    assert ended[-1] == "on_stop"
    assert not server.started


def test_shutdown_returns_at_once_when_the_thread_of_the_hub_has_ended() -> None:
    done = run_python("""
        from helpers import LOOPBACK, NativeThread, accepts_connections
        from psofa_gevent import PsCallback, PsServer

        class Leaving(NativeThread):
            destroys_hub = False

        def serve():
            server = PsServer(PsCallback(), host=LOOPBACK, port=0)
            server.start()
            return server

        server = Leaving(serve).join()
        server_thread_has_left = lambda: server._manager.thread.is_over()
        from psofa_gevent.testing import eventually
        eventually(server_thread_has_left)
        address = server.address
        server.shutdown(timeout=None)
        print(server.started, accepts_connections(address))
        """)
    assert (done.stdout, done.stderr) == ("False False\n", "")


@pytest.mark.parametrize("kind", ["calls", "has a hub"])
def test_threads_that_have_ended_leave_no_descriptors_behind(kind: str) -> None:
    """A thread with a hub has to destroy that, as gevent wants it: no thread else has any."""
    done = run_python(
        """
        import asyncio, os, sys
        import gevent
        from helpers import LOOPBACK, NativeThread
        from psofa_gevent import PsCallback, PsClient, PsServer, run_coroutine

        server = PsServer(PsCallback(), host=LOOPBACK, port=0)
        server.start()
        client = PsClient(PsCallback(), *server.address)
        session = client.connect()

        class Leaving(NativeThread):
            destroys_hub = False

        def calls():
            session.send("x")
            session.post("x")
            server.broadcast("x")
            server.stop_accepting()
            server.resume_accepting()

        def has_a_hub():
            gevent.sleep(0.001)
            calls()
            run_coroutine(asyncio.to_thread(int))
            with PsServer(PsCallback(), host=LOOPBACK, port=0) as own:
                with PsClient(PsCallback(), *own.address):
                    pass
            gevent.get_hub().destroy()

        def descriptors():
            return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))

        function = calls if sys.argv[1] == "calls" else has_a_hub
        Leaving(function).wait()
        before = descriptors()
        for _ in range(5):
            Leaving(function).wait()
        print(descriptors() - before)
        client.disconnect()
        server.shutdown()
        """,
        kind,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


# What belongs to the hub's thread


def test_wait_for_in_another_thread_is_refused(ps_server: ServerFactory) -> None:
    server = ps_server(RecordingCallback())
    with pytest.raises(PsServerError, match="thread"):
        NativeThread(server.wait_for).join(AT_ONCE)


def test_connect_in_another_thread_than_the_first_is_refused() -> None:
    with ScriptedServer() as listener:
        client = PsClient(RecordingCallback(), *listener.address)
        session = client.connect()
        session.close()
        eventually(lambda: client.session is None)
        with pytest.raises(PsClientError, match="thread"):
            NativeThread(client.connect).join(AT_ONCE)
        client.disconnect()
        with (
            PsMultiClient(RecordingCallback()) as bundle,
            pytest.raises(PsMultiClientError, match="thread"),
        ):
            NativeThread(bundle.connect, *listener.address).join(AT_ONCE)


# A server whose hub is another thread's


class ServerThread:
    """A server that lives in a native thread, until it is shut down."""

    def __init__(self, callback: RecordingCallback) -> None:
        self._started = NativeEvent()
        self.server = PsServer(callback, host="127.0.0.1", port=0)
        self.thread = NativeThread(self._serve)
        assert self._started.wait(5)

    def _serve(self) -> bool:
        self.server.start()
        self._started.set()
        return self.server.wait_for()


def test_server_in_another_thread_is_used_and_shut_down_from_here() -> None:
    callback = RecordingCallback(reply=bytes)
    other = ServerThread(callback)
    with ScriptedClient(other.server.address) as client:
        client.send("ping")
        client.expect("ping")
        session = only_session(callback)
        session.send("from here")
        client.expect("from here")
        other.server.stop_accepting()
        other.server.resume_accepting()
        other.server.shutdown()
        client.expect_eof()
    assert other.thread.join(AT_ONCE) is True
    assert close_reasons(callback) == [PsCloseReason.SHUTDOWN]


class ShutsOtherDown(RecordingCallback):
    """Shuts another thread's server down in one of its methods; an on_message "hang" hangs."""

    def __init__(self, method: str, *, use_async_callback: bool = False) -> None:
        super().__init__(use_async_callback=use_async_callback)
        self._method = method
        self.other: PsServer | None = None
        self.returned = False
        self.waited = False

    def _act(self, method: str) -> None:
        if method == self._method and self.other is not None:
            self.other.shutdown(timeout=1.0)
            self.waited = self.other.get_session_count() == 0
            self.returned = True

    def on_message(self, session: PsSession, message: bytes) -> None:
        super().on_message(session, message)
        if message == b"hang":
            gevent.sleep(600)
        self._act("on_message")

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        await super().on_message_async(session, message)
        self._act("on_message")

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        super().on_close(session, close_reason)
        self._act("on_close")

    def on_stop(self, owner: Any) -> None:
        super().on_stop(owner)
        self._act("on_stop")


@pytest.mark.parametrize(
    ("method", "use_async_callback"),
    [("on_message", False), ("on_message", True), ("on_close", False), ("on_stop", False)],
)
def test_callback_may_shut_down_the_server_of_another_thread_and_does_not_wait_for_it(
    method: str, use_async_callback: bool
) -> None:
    there = ShutsOtherDown("")
    other = ServerThread(there)
    here = ShutsOtherDown(method, use_async_callback=use_async_callback)
    with ScriptedClient(other.server.address) as hanging:
        hanging.send("hang")
        there.wait_for("on_message")
        here.other = other.server
        with serving(here) as server, ScriptedClient(server.address) as client:
            client.send("x")
            here.wait_for("on_message")
        eventually(lambda: here.returned)
        assert not here.waited, "it waited for the callback that hangs in the other thread"
        assert other.thread.wait() is True
        hanging.expect_eof()
    assert close_reasons(there) == [PsCloseReason.SHUTDOWN]


def test_servers_of_two_threads_may_shut_each_other_down() -> None:
    callbacks = [ShutsOtherDown("on_close") for _ in range(2)]
    servers = [ServerThread(callback) for callback in callbacks]
    callbacks[0].other, callbacks[1].other = servers[1].server, servers[0].server
    with (
        ScriptedClient(servers[0].server.address) as first,
        ScriptedClient(servers[1].server.address) as second,
    ):
        for callback in callbacks:
            callback.wait_for("on_open")
        first.eof()
        second.eof()
        first.expect_eof()
        second.expect_eof()
    for each in servers:
        assert each.thread.wait() is True
    for callback in callbacks:
        assert len(callback.named("on_close")) == 1
        assert callback.events[-1].name == "on_stop"


TWO_HUBS = """
    from helpers import NativeThread
    from psofa_gevent import PsServer
    from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually, serving
    from psofa_gevent.hub.thread import NativeEvent

    COUNT = 200

    class SendsToHere(RecordingCallback):
        def on_message(self, session, message):
            for _ in range(COUNT):
                session_here.send("x")

    def serve_there():
        server_there.start()
        started.set()
        server_there.wait_for()

    started = NativeEvent()
    server_there = PsServer(SendsToHere(), host="127.0.0.1", port=0)
    thread = NativeThread(serve_there)
    started.wait(5)
    with (
        serving(RecordingCallback()) as server_here,
        ScriptedClient(server_here.address) as client_here,
        ScriptedClient(server_there.address) as client_there,
    ):
        (session_here,) = eventually(lambda: server_here.sessions)
        (session_there,) = eventually(lambda: server_there.sessions)
        client_there.send("go")
        for _ in range(COUNT):
            session_there.send("y")
        client_here.expect("x" * COUNT)
        client_there.expect("y" * COUNT)
        server_there.shutdown()
    thread.join(5)
    print("done")
"""


def test_two_hubs_may_send_to_sessions_of_each_other_at_the_same_time() -> None:
    done = run_python(TWO_HUBS, timeout=20.0)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def give_up_sending(session: PsSession, message: bytes) -> str:
    """Runs in a thread with a hub of its own, whose greenlets may be thrown out of a send."""
    gevent.sleep(0)
    try:
        with gevent.Timeout(0.1):
            session.send(message, timeout=None)
    except gevent.Timeout:
        return "given up"
    return "sent"


def test_greenlet_of_another_hub_thrown_out_of_a_send_in_line_has_sent_nothing(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=0.0)
    with stalled_peer(server.address) as peer:
        session = only_session(callback)
        size = 32 * 1024 * 1024
        first = gevent.spawn(session.send, bytes(size), timeout=None)
        eventually(lambda: session.bytes_sent > 0)
        assert NativeThread(give_up_sending, session, b"never").wait() == "given up"
        assert session.is_open
        peer.socket.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_RCVBUF, size)
        peer.receive(size)
        first.get(timeout=5)
        session.send("fine")
        peer.expect("fine")


def test_greenlet_of_another_hub_thrown_out_after_a_part_left_fails_the_session(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, linger_timeout=0.0)
    with stalled_peer(server.address):
        session = only_session(callback)
        thread = NativeThread(give_up_sending, session, bytes(32 * 1024 * 1024))
        assert thread.wait() == "given up"
        assert callback.wait_for("on_close")[0].value is PsCloseReason.FAILED


# A thread that is overtaken by the end of the server in the middle of its call


class Paused:
    """A native thread that is stopped at the n-th line that it runs in the package."""

    def __init__(self, line: int, function: Callable[[], object]) -> None:
        self._lines_left = line
        self._function = function
        self.stopped = False
        self._go_on = NativeEvent()
        self.thread = NativeThread(self._run)

    def go_on(self) -> None:
        self._go_on.set()

    def _run(self) -> None:
        sys.settrace(self._trace_call)
        try:
            self._function()
        except PsSendError:
            return
        finally:
            sys.settrace(None)

    def _trace_call(self, frame: FrameType, _event: str, _arg: object) -> Any:
        if "psofa_gevent" in frame.f_code.co_filename:
            return self._trace_line
        return None

    def _trace_line(self, _frame: FrameType, event: str, _arg: object) -> Any:
        if event == "line":
            if self._lines_left == 0:
                self.stopped = True
                self._go_on.wait(10)
            self._lines_left -= 1
        return self._trace_line


def operations(server: PsServer, session: PsSession) -> dict[str, Callable[[], object]]:
    return {
        "send": lambda: session.send("x"),
        "send_eof": session.send_eof,
        "close": session.close,
        "abort": session.abort,
        "stop_accepting": server.stop_accepting,
        "resume_accepting": server.resume_accepting,
        "shutdown": server.shutdown,
        "shutdown without timeout": lambda: server.shutdown(None),
    }


@needs_tracing
@pytest.mark.parametrize(
    "operation",
    [
        "send",
        "send_eof",
        "close",
        "abort",
        "stop_accepting",
        "resume_accepting",
        "shutdown",
        "shutdown without timeout",
    ],
)
def test_thread_in_the_middle_of_a_call_is_released_when_the_server_has_stopped(
    operation: str,
) -> None:
    line = 0
    while stop_server_while_a_thread_is_at(line, operation):
        line += 1
    assert line > 0


def stop_server_while_a_thread_is_at(line: int, operation: str) -> bool:
    """Whether the thread came to that line; then the server stopped, and nothing of it hangs."""
    callback = RecordingCallback()
    with (
        PsServer(callback, host="127.0.0.1", port=0) as server,
        ScriptedClient(server.address),
    ):
        session = only_session(callback)
        paused = Paused(line, operations(server, session)[operation])
        eventually(lambda: paused.stopped or paused.thread.ended)
        server.shutdown()
        assert server.wait_for(5)
        paused.go_on()
        paused.thread.join(AT_ONCE)
        assert len(close_reasons(callback)) == 1
        return paused.stopped


# A whole program, patched and not


PROGRAM = """
    import sys
    if sys.argv[1] == "patched":
        from gevent import monkey
        monkey.patch_all()
    import gevent
    from helpers import NativeThread, ScriptedServer
    from psofa_gevent import PsClient, PsCloseReason, PsMultiClient, PsServer
    from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

    def say(word):
        print(word, flush=True)

    callback = RecordingCallback(reply=bytes)
    server = PsServer(callback, host="127.0.0.1", port=0)
    server.start()
    clients = [ScriptedClient(server.address) for _ in range(4)]
    sessions = [event.session for event in callback.wait_for("on_open", 4)]

    big = bytes(8 * 1024 * 1024)
    thread = NativeThread(sessions[0].send, big)
    assert clients[0].receive(len(big)) == big
    thread.join(5)
    say("send")

    NativeThread(sessions[1].send_eof).join(5)
    clients[1].expect_eof()
    say("send_eof")

    NativeThread(sessions[2].close).join(5)
    clients[2].expect_eof()
    say("close")

    NativeThread(sessions[3].abort).join(5)
    clients[3].expect_reset()
    say("abort")

    NativeThread(server.stop_accepting).join(5)
    waiting = ScriptedClient(server.address)
    waiting.send("x")
    waiting.expect_nothing(0.05)
    NativeThread(server.resume_accepting).join(5)
    waiting.expect("x")
    say("accepting")

    thread = NativeThread(server.shutdown)
    assert server.wait_for()
    thread.join(5)
    reasons = [event.value for event in callback.named("on_close")]
    assert reasons.count(PsCloseReason.SHUTDOWN) == 3, reasons
    assert reasons.count(PsCloseReason.SELF_CLOSE) == 2, reasons
    say("shutdown")

    with ScriptedServer() as listener:
        client = PsClient(callback, *listener.address)
        client.connect()
        thread = NativeThread(client.disconnect)
        client.disconnect()
        thread.join(5)
        say("disconnect")

        bundle = PsMultiClient(callback)
        bundle.init_bundle()
        connections = [bundle.connect(*listener.address) for _ in range(2)]
        NativeThread(bundle.disconnect, connections[0]).join(5)
        thread = NativeThread(bundle.destroy_bundle)
        bundle.destroy_bundle()
        thread.join(5)
        say("destroy_bundle")
    for each in [*clients, waiting]:
        each.close()
    # An ordinary pool: its threads are native ones, or greenlets where they are patched.
    import concurrent.futures
    server.start()
    session_of = {}
    with ScriptedClient(server.address) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        (session,) = eventually(lambda: server.sessions)
        futures = [pool.submit(session.send, "x") for _ in range(20)]
        client.expect("x" * 20)
        futures += [pool.submit(server.shutdown) for _ in range(4)]
        assert server.wait_for()
        for future in futures:
            future.result(5)
    say("pool")
"""


@pytest.mark.parametrize("mode", ["unpatched", "patched"])
def test_program_whose_main_thread_joins_native_threads_does_not_deadlock(mode: str) -> None:
    done = run_python(PROGRAM, mode, timeout=40.0)
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.split() == [
        "send",
        "send_eof",
        "close",
        "abort",
        "accepting",
        "shutdown",
        "disconnect",
        "destroy_bundle",
        "pool",
    ]


def test_thread_may_send_until_the_server_is_gone_and_be_joined_natively(
    ps_server: ServerFactory,
) -> None:
    def send_until_closed(session: PsSession) -> int:
        sent = 0
        try:
            while True:
                session.send("x")
                sent += 1
        except PsSendError:
            return sent

    callback = RecordingCallback()
    server = ps_server(callback)
    for count in range(1, 6):
        with ScriptedClient(server.address) as client:
            session = callback.wait_for("on_open", count)[-1].session
            assert session is not None
            threads = [NativeThread(send_until_closed, session) for _ in range(4)]
            client.receive(100)
            server.shutdown()
            assert server.wait_for(5)
            sent = sum(thread.join(AT_ONCE) for thread in threads)
            assert session.bytes_sent == sent
        server.start()


def test_what_was_over_for_the_caller_does_not_run_later() -> None:
    ran: list[str] = []
    thread = HubThread()

    def run() -> bool:
        return thread.run(lambda: True, ran.append, "run")

    def run_async() -> bool:
        asked = thread.run_async(lambda: True, ran.append, "run_async")
        has_run: bool = asyncio.run(asked)
        return has_run

    # The hub does nothing while this thread waits natively.
    assert [NativeThread(each).join() for each in (run, run_async)] == [False, False]
    has_come_to_it = gevent.event.Event()
    thread.call_soon(has_come_to_it.set)  # after what the two have asked for
    assert has_come_to_it.wait(5)
    assert ran == []
