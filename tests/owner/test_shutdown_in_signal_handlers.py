"""Shutdown in signal handlers of the program (design, points 7 and 8).

A ``signal.signal`` handler runs in whichever greenlet the signal hits: in the hub while all wait.
None of these calls may deadlock on itself: where the caller is something that the shutdown has to
wait for, it returns at once, and the work goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import gevent
import pytest

from helpers import NativeThread, ScriptedServer, attached, run_python
from marks import needs_tracing, sync_and_async
from psofa_gevent import PsClient, PsSession
from psofa_gevent.testing import ClientFactory, RecordingCallback, ServerFactory
from stopping import METHODS, SIGNAL, SOON, OnSignal, StopsIn, expect_one_life_each, provoke


def send_signal_while_all_greenlets_wait() -> NativeThread[None]:
    """By a thread, which needs no greenlet of ours to run."""
    return NativeThread(os.kill, os.getpid(), SIGNAL)


def test_shutdown_in_a_signal_handler_while_all_greenlets_wait(
    on_signal: OnSignal, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    on_signal(server.shutdown)
    ps_client(server)
    callback.wait_for("on_open")
    sender = send_signal_while_all_greenlets_wait()
    assert server.wait_for(SOON)
    sender.join()
    expect_one_life_each(callback, 1)


def test_disconnect_in_a_signal_handler_while_all_greenlets_wait(on_signal: OnSignal) -> None:
    callback = RecordingCallback()
    with ScriptedServer() as listener:
        client = PsClient(callback, *listener.address)
        on_signal(client.disconnect)
        client.connect()
        sender = send_signal_while_all_greenlets_wait()
        callback.wait_for("on_stop")
        sender.join()
        client.disconnect()
        expect_one_life_each(callback, 1)


def test_shutdown_in_a_signal_handler_that_hits_the_main_greenlet_waits_there(
    on_signal: OnSignal, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    on_signal(server.shutdown)
    ps_client(server)
    callback.wait_for("on_open")
    signal.raise_signal(SIGNAL)
    expect_one_life_each(callback, 1)
    assert server.wait_for(0)


@sync_and_async
@pytest.mark.parametrize("method", METHODS)
def test_shutdown_in_a_signal_handler_that_hits_a_callback_returns_at_once(
    method: str,
    use_async_callback: bool,
    on_signal: OnSignal,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
) -> None:
    callback = StopsIn(method, use_async_callback=use_async_callback)
    callback.stop = lambda: signal.raise_signal(SIGNAL)
    server = ps_server(callback, allow_half_open=True)
    on_signal(server.shutdown)
    client = ps_client(server)
    opened = callback.wait_for("on_open")[0].session
    assert opened is not None
    provoke(method, client, opened, server.shutdown)
    assert server.wait_for(SOON)
    expect_one_life_each(callback, 1)


class SignalsWhenLogged:
    """Makes records, and raises the signal then: in the library's own greenlets, between two steps.

    (Handlers and filters run in greenlets of the log.)
    """

    def __init__(self) -> None:
        self.armed = False
        self.greenlets: set[object] = set()
        self._make = logging.getLogRecordFactory()

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        if self.armed:
            self.greenlets.add(gevent.getcurrent())
            signal.raise_signal(SIGNAL)
        return self._make(*args, **kwargs)


@pytest.fixture
def signals_when_logged() -> Iterator[SignalsWhenLogged]:
    factory, before = SignalsWhenLogged(), logging.getLogRecordFactory()
    logging.setLogRecordFactory(factory)
    with attached(logging.NullHandler()):
        yield factory
    logging.setLogRecordFactory(before)


class SignalsInHandlers(logging.Handler):
    """Raises the signal wherever a record is handed over."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        signal.raise_signal(SIGNAL)


def test_shutdown_in_a_signal_handler_that_hits_a_log_handler(
    on_signal: OnSignal, ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    handler = SignalsInHandlers()
    on_signal(server.shutdown)
    with attached(handler):
        ps_client(server)
        assert server.wait_for(SOON)
    assert handler.count > 1
    expect_one_life_each(callback, 1)


@pytest.mark.logs_errors
def test_shutdown_in_a_signal_handler_that_hits_the_librarys_own_greenlets(
    on_signal: OnSignal,
    signals_when_logged: SignalsWhenLogged,
    ps_server: ServerFactory,
    ps_client: ClientFactory,
) -> None:
    class Hangs(RecordingCallback):
        def on_message(self, session: PsSession, message: bytes) -> None:
            super().on_message(session, message)
            gevent.sleep(60)

    callback = Hangs()
    server = ps_server(callback)
    client = ps_client(server)
    client.send("x")
    callback.wait_for("on_message")
    on_signal(lambda: server.shutdown(0.1))
    signals_when_logged.armed = True
    stopping = gevent.spawn(server.shutdown, 0.1)
    assert server.wait_for(SOON)
    stopping.get(timeout=SOON)
    assert len(signals_when_logged.greenlets) > 1
    expect_one_life_each(callback, 1)


def test_shutdown_by_gevents_signal_handler(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback)
    ps_client(server)
    callback.wait_for("on_open")
    with cancelled_at_the_end(gevent.signal_handler(SIGNAL, server.shutdown)):
        sender = send_signal_while_all_greenlets_wait()
        assert server.wait_for(SOON)
        sender.join()
    expect_one_life_each(callback, 1)


@contextlib.contextmanager
def cancelled_at_the_end(handler: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handler.cancel()


STORM = """
    import signal
    import sys

    if sys.argv[1] == "patched":
        from gevent import monkey
        monkey.patch_all()
    import gevent
    from psofa_gevent import PsServer, testing
    from psofa_gevent.testing import RecordingCallback, ScriptedClient

    testing.POLL_SECONDS = 0.001

    # A few signals hit whatever runs: main, hub, sessions, timers, the stop itself.
    def handler(number, frame):
        global left
        left -= 1
        if left:
            signal.setitimer(signal.ITIMER_REAL, 50e-6)
        server.shutdown()

    left = 0
    signal.signal(signal.SIGALRM, handler)
    for number in range(240):  # each number of signals at each delay, twice
        callback = RecordingCallback()
        server = PsServer(callback, host="127.0.0.1", port=0, idle_milliseconds=1, divide=1_000)
        server.start()
        with ScriptedClient(server.address) as client:
            callback.wait_for("on_open")
            left = 1 + number % 3
            signal.setitimer(signal.ITIMER_REAL, 5e-6 * (1 + number % 40))
            server.shutdown()
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert server.wait_for(5)
        names = [event.name for event in callback.events]
        assert names == ["on_start", "on_open", "on_close", "on_stop"], names
        assert gevent.wait(timeout=5), "something is left"
    print("survived")
"""


@pytest.mark.parametrize("mode", ["unpatched", "patched"])
def test_shutdown_in_a_signal_handler_whatever_it_hits(mode: str) -> None:
    done = run_python(STORM, mode, timeout=110.0)
    assert done.stderr == ""
    assert (done.stdout, done.returncode) == ("survived\n", 0)


A_SIGNAL_AT_EVERY_LINE_OF_SHUTDOWN = """
    import signal
    import sys

    import gevent
    from psofa_gevent import PsServer, testing
    from psofa_gevent.testing import RecordingCallback, ScriptedClient

    testing.POLL_SECONDS = 0.001

    # On libuv gevent's loop is Python code, and a signal may hit that too.
    def trace_call(frame, event, arg):
        if "psofa_gevent" in frame.f_code.co_filename or "loop.py" in frame.f_code.co_filename:
            return trace_line

    def trace_line(frame, event, arg):
        global lines
        if event == "line":
            lines += 1
            if lines == line:
                signal.raise_signal(signal.SIGUSR1)
        return trace_line

    def shut_down():
        sys.settrace(trace_call)  # the greenlet that runs this
        server.shutdown()
        sys.settrace(None)

    signal.signal(signal.SIGUSR1, lambda number, frame: server.shutdown())
    line, lines = 0, 1
    while line < lines:
        line += 1
        lines = 0
        callback = RecordingCallback()
        server = PsServer(callback, host="127.0.0.1", port=0)
        server.start()
        with ScriptedClient(server.address):
            callback.wait_for("on_open")
            if sys.argv[1] == "main":
                shut_down()
            else:
                gevent.get_hub().loop.run_callback(shut_down)
                callback.wait_for("on_stop")
            assert server.wait_for(5)
        names = [event.name for event in callback.events]
        assert names == ["on_start", "on_open", "on_close", "on_stop"], (line, names)
        assert gevent.wait(timeout=10), (line, "something is left")
    print("survived")
"""


@needs_tracing
@pytest.mark.parametrize("caller", ["main", "hub"])
def test_shutdown_in_a_signal_handler_that_hits_any_line_of_a_shutdown(caller: str) -> None:
    done = run_python(A_SIGNAL_AT_EVERY_LINE_OF_SHUTDOWN, caller, timeout=110.0)
    assert (done.stdout, done.stderr, done.returncode) == ("survived\n", "", 0)


A_SIGNAL_AT_EVERY_LINE_OF_ACCEPTING = """
    import contextlib
    import signal
    import sys

    import gevent
    from psofa_gevent import PsServer, testing
    from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

    testing.POLL_SECONDS = 0.001

    def trace_call(frame, event, arg):
        if frame.f_code.co_filename.endswith("listener.py"):
            return trace_line

    def trace_line(frame, event, arg):
        global lines
        if event == "line":
            lines += 1
            functions.add(frame.f_code.co_name)
            if lines == line:
                signal.raise_signal(signal.SIGUSR1)
        return trace_line

    def served(count):
        return lambda: len(callback.named("on_open")) == count or not server.started

    signal.signal(signal.SIGUSR1, lambda number, frame: server.shutdown())
    hub = gevent.get_hub()
    functions = set()
    line = lines = 0
    while line <= lines:
        line += 1
        lines = 0
        callback = RecordingCallback()
        server = PsServer(callback, listener=[("127.0.0.1", 0)] * 2, max_sessions=1)
        server.start()
        one, other = server.addresses
        hub.loop.run_callback(sys.settrace, trace_call)
        with contextlib.suppress(ConnectionError):  # to whom it is stopped already
            with ScriptedClient(one) as first, ScriptedClient(one), ScriptedClient(other):
                eventually(served(1))
                gevent.sleep(0.001)
                first.close()
                eventually(served(2))
        hub.loop.run_callback(sys.settrace, None)
        sys.settrace(trace_call)
        server.shutdown()
        sys.settrace(None)
        names = [event.name for event in callback.events]
        assert names.count("on_open") == names.count("on_close"), (line, names)
        # Nobody was let in meanwhile.
        assert names[-1] == "on_stop", (line, names)
        assert gevent.wait(timeout=10), (line, "something is left")
    assert functions >= {"full", "accept_one", "do_read", "do_handle", "_give", "pause"}, functions
    print("survived")
"""


@needs_tracing
def test_shutdown_in_a_signal_handler_that_hits_any_line_of_accepting() -> None:
    done = run_python(A_SIGNAL_AT_EVERY_LINE_OF_ACCEPTING, timeout=110.0)
    assert (done.stdout, done.stderr, done.returncode) == ("survived\n", "", 0)
