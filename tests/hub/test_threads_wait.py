"""Calls from other OS threads that wait for the hub: for its work, its end, or in vain.

The threads are real ones, in a monkey-patched process too. ``wait`` lets the hub go on until a
thread has ended. ``join`` blocks the hub as the main thread of an unpatched program does: a call
that joins in time has returned without the hub's help.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import gevent
import pytest

from calling_threads import (
    AT_ONCE,
    ActsInMessage,
    InThread,
    in_each_kind_of_thread,
    in_native_thread,
    only_session,
)
from helpers import NativeThread, ScriptedServer, close_reasons, run_python, takes
from marks import needs_tracing
from psofa_gevent import (
    PsClient,
    PsClientError,
    PsCloseReason,
    PsMultiClient,
    PsSendError,
    PsServer,
    PsSession,
)
from psofa_gevent.hub.thread import NativeEvent
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

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
