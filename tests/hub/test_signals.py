"""Signals in ``serve_forever``, and Ctrl-C without it."""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.subprocess
import pytest

from helpers import NativeThread, PythonProcess, child_environment, python_process, run_python
from marks import needs_tracing
from psofa_gevent import PsCallback, PsCloseReason, PsServer
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually
from stopping import SOON, OnSignal, expect_one_life_each

pytestmark = pytest.mark.long


# serve_forever

SERVE = """
    import signal
    import sys
    import time

    if "patched" in sys.argv:
        from gevent import monkey
        monkey.patch_all()
    import asyncio
    import gevent
    from gevent import monkey
    from psofa_gevent import PsCallback, PsServer

    def say(*words):
        print(*words, flush=True)

    class Callback(PsCallback):
        use_async_callback = "async" in sys.argv

        def on_message(self, session, message):
            session.send(message)
            say("message", message.decode())
            if message == b"hang":
                gevent.sleep(600)
            if message == b"swallow":
                while True:
                    try:
                        gevent.sleep(600)
                    except BaseException:
                        pass
            if message == b"block":
                monkey.get_original("time", "sleep")(600)
            if message == b"exit":
                raise SystemExit(3)
            if message == b"shutdown":
                server.shutdown()

        def on_close(self, session, close_reason):
            say("close", close_reason.name)

        def on_stop(self, owner):
            say("stop")

        async def on_message_async(self, session, message):
            if message == b"hang":
                say("message hang")
                await asyncio.sleep(600)
            self.on_message(session, message)

        async def on_close_async(self, session, close_reason):
            self.on_close(session, close_reason)

        async def on_stop_async(self, owner):
            self.on_stop(owner)

    def own_handler(number, frame):
        say("own handler")

    server = PsServer(Callback(), host="127.0.0.1", port=0)
    server.start()
    signal.signal(signal.SIGTERM, own_handler)
    if "ignore" in sys.argv:
        signal.signal(signal.Signals[sys.argv[-1]], signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    say("port", server.address[1])
    try:
        if "drain" in sys.argv:
            server.serve_forever(drain=30.0)
        elif "short" in sys.argv:
            server.serve_forever(shutdown_timeout=0.1)
        else:
            server.serve_forever()
        say("returned", server.started, server.get_session_count())
    finally:
        after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        say("restored" if after == before else f"not restored: {after}")
"""


@contextlib.contextmanager
def serving_process(*arguments: str) -> Iterator[tuple[PythonProcess, ScriptedClient]]:
    """A program in ``serve_forever``, its signal handlers set, and a client of it."""
    with python_process("-c", textwrap.dedent(SERVE), *arguments) as process:
        port = int(process.expect_line("port").split()[1])
        with ScriptedClient(("127.0.0.1", port)) as client:
            client.send("ping")
            client.expect("ping")
            yield process, client


both_signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
END_OF_A_GRACEFUL_SHUTDOWN = ["close SHUTDOWN", "stop", "returned False 0", "restored"]


@both_signals
@pytest.mark.parametrize("arguments", [(), ("async",), ("patched",)])
def test_signal_shuts_serve_forever_down_gracefully(
    number: signal.Signals, arguments: tuple[str, ...]
) -> None:
    with serving_process(*arguments) as (process, client):
        process.send_signal(number)
        client.expect_eof()
        assert process.wait() == 0
        assert process.lines[-4:] == END_OF_A_GRACEFUL_SHUTDOWN


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["hang", "swallow"])
def test_second_signal_ends_serve_forever_at_once_while_a_callback_hangs(
    first: signal.Signals, second: signal.Signals, how: str
) -> None:
    with serving_process() as (process, client):
        client.send(how)
        process.expect_line(f"message {how}")
        process.send_signal(first)
        # The shutdown has begun when nobody can connect any more.
        eventually(lambda: not can_connect(client))
        process.send_signal(second)
        assert process.wait(timeout=3.0) == -second


def can_connect(client: ScriptedClient) -> bool:
    try:
        ScriptedClient(client.socket.getpeername()).close()
    except OSError:
        return False
    return True


def test_second_signal_ends_serve_forever_at_once_while_an_async_callback_hangs() -> None:
    with serving_process("async") as (process, client):
        client.send("hang")
        process.expect_line("message hang")
        process.send_signal(signal.SIGTERM)
        eventually(lambda: not can_connect(client))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=3.0) == -signal.SIGTERM


def test_second_signal_ends_serve_forever_at_once_while_a_callback_blocks_the_thread() -> None:
    with serving_process() as (process, client):
        client.send("block")
        process.expect_line("message block")
        # One that comes just before the sleep begins is handled after that, or with the next one.
        process.send_signals_until_the_end(signal.SIGINT, every=0.5)
        assert process.wait(timeout=3.0) == -signal.SIGINT


@both_signals
def test_signal_that_was_ignored_stays_ignored(number: signal.Signals) -> None:
    """As SIGINT is by a shell script's ``server &``."""
    other = {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGINT}[number]
    with serving_process("ignore", number.name) as (process, client):
        for _ in range(2):
            process.send_signal(number)
            client.send("still served")
            client.expect("still served")
        # It does not become one that ends the process, either.
        client.send("hang")
        client.expect("hang")
        process.send_signal(other)
        eventually(lambda: not can_connect(client))
        process.send_signal(number)
        client.expect_nothing(0.1)
        process.send_signal(other)
        assert process.wait(timeout=3.0) == -other


def test_sigint_that_a_shell_script_has_ignored_stays_ignored() -> None:
    program = """
        import gevent
        import os
        import signal
        import sys
        from psofa_gevent import PsCallback, PsServer

        server = PsServer(PsCallback(), host="127.0.0.1", port=0)
        server.start()

        def interrupt_and_stop():
            os.kill(os.getpid(), signal.SIGINT)
            gevent.sleep(0.1)
            print("still serving", server.started)
            server.shutdown()

        gevent.spawn(interrupt_and_stop)
        server.serve_forever()
        print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
    """
    script = f"{shlex.join([sys.executable, '-c', textwrap.dedent(program)])} & wait $!"
    done = gevent.subprocess.run(
        ["sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        env=child_environment(),
    )
    assert (done.stdout, done.stderr) == ("still serving True\nTrue\n", "")


def can_be_process_1() -> bool:
    """Whether we may have a process that is the first one of its own namespace."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    return gevent.subprocess.run([*AS_PROCESS_1, "true"], capture_output=True).returncode == 0


AS_PROCESS_1 = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
PROCESS_1 = """
    import os
    import gevent
    from psofa_gevent import PsCallback, PsServer

    class Hangs(PsCallback):
        def on_message(self, session, message):
            session.send(message)
            print("message", os.getpid(), flush=True)
            if message == b"block":
                while True:
                    pass
            gevent.sleep(600)

    server = PsServer(Hangs(), host="127.0.0.1", port=0)
    server.start()
    # Printed when the main greenlet waits, its handlers set.
    gevent.spawn(print, "port", server.address[1], flush=True)
    server.serve_forever(shutdown_timeout=None)
"""


@pytest.mark.skipif(not can_be_process_1(), reason="unshare(1) is not there, or not allowed")
@both_signals
@pytest.mark.parametrize("message", ["hang", "block"])
def test_second_signal_ends_process_1_at_once(number: signal.Signals, message: str) -> None:
    """The kernel takes no signal's default action from it, and containers stop it by SIGTERM."""
    with program_as_process_1() as (process, client, pid):
        client.send(message)
        client.expect(message)
        os.kill(pid, number)
        if message == "hang":  # else it comes to shutting down when the second one has ended it
            eventually(lambda: not can_connect(client))
        else:
            client.expect_nothing(0.2)
        os.kill(pid, number)
        # So `unshare` ends with the exit code of its child, which a signal has not ended.
        assert process.wait(timeout=5) == 128 + number


@contextlib.contextmanager
def program_as_process_1() -> Iterator[tuple[Any, ScriptedClient, int]]:
    process: Any = gevent.subprocess.Popen(
        [*AS_PROCESS_1, sys.executable, "-c", textwrap.dedent(PROCESS_1)],
        stdout=gevent.subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    try:
        with gevent.Timeout(20):
            port = int(process.stdout.readline().split()[1])
        pid = child_of(process.pid)
        with ScriptedClient(("127.0.0.1", port)) as client:
            yield process, client, pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def child_of(pid: int) -> int:
    """The only child of a process."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_signal_gives_the_sessions_the_drain_of_serve_forever() -> None:
    with serving_process("drain") as (process, client):
        process.send_signal(signal.SIGTERM)
        eventually(lambda: not can_connect(client))
        client.send("still served")
        client.expect("still served")
        client.eof()
        assert process.wait(timeout=5.0) == 0
        assert "close PEER_CLOSE" in process.lines


def test_signal_gives_callbacks_the_shutdown_timeout_of_serve_forever() -> None:
    """By default that of `shutdown`, so one signal is enough although a callback hangs."""
    default = inspect.signature(PsServer.serve_forever).parameters["shutdown_timeout"].default
    assert default == inspect.signature(PsServer.shutdown).parameters["timeout"].default == 5.0
    with serving_process("short") as (process, client):
        client.send("hang")
        process.expect_line("message hang")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=3.0) == 0
        assert process.lines[-4:] == END_OF_A_GRACEFUL_SHUTDOWN


def test_signal_while_serve_forever_starts_ends_it_gracefully() -> None:
    program = """
        import gevent
        from psofa_gevent import PsCallback, PsServer

        class SlowStart(PsCallback):
            def on_start(self, owner):
                print("starting", flush=True)
                gevent.sleep(0.5)

            def on_stop(self, owner):
                print("stop", flush=True)

        PsServer(SlowStart(), host="127.0.0.1", port=0).serve_forever()
        print("returned", flush=True)
    """
    with python_process("-c", textwrap.dedent(program)) as process:
        process.expect_line("starting")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5.0) == 0
        assert process.lines == ["starting", "stop", "returned"]


A_SIGNAL_AT_EVERY_LINE = """
    import signal
    import sys

    import gevent
    from psofa_gevent import PsServer
    from psofa_gevent.testing import RecordingCallback

    def own_handler(number, frame):
        early.append(number)
        if not waiting:
            hub.loop.run_callback(signal.raise_signal, number)  # once more, when it serves

    def trace_call(frame, event, arg):
        if "psofa_gevent" in frame.f_code.co_filename:
            return trace_line

    def trace_line(frame, event, arg):
        global lines, waiting
        if event == "line":
            if frame.f_code.co_name == "wait_for" and not waiting:
                waiting = True
                gevent.spawn(server.shutdown)
            lines += 1
            if lines == line:
                signal.raise_signal(number)
        return trace_line

    hub = gevent.get_hub()
    number = signal.Signals[sys.argv[1]]
    early = []
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, own_handler)
    line, lines = 0, 1
    while line < lines:
        line += 1
        lines, waiting = 0, False
        callback = RecordingCallback()
        server = PsServer(callback, host="127.0.0.1", port=0)
        sys.settrace(trace_call)
        with gevent.Timeout(10):
            server.serve_forever()
        sys.settrace(None)
        assert not server.started
        names = [event.name for event in callback.events]
        assert names in ([], ["on_start", "on_stop"]), (line, names)
        for each in (signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(each) is own_handler, (line, each)
        assert gevent.wait(timeout=10), (line, "something is left")
    assert 0 < len(early) < line / 2
    print("survived")
"""


@needs_tracing
@both_signals
def test_signal_at_any_moment_of_serve_forever_ends_it_gracefully(number: signal.Signals) -> None:
    """Before there is a manager too: from the moment in which the handlers are set."""
    done = run_python(A_SIGNAL_AT_EVERY_LINE, number.name, timeout=110.0)
    assert (done.stdout, done.stderr, done.returncode) == ("survived\n", "", 0)


def test_signal_before_serve_forever_is_for_the_programs_own_handler() -> None:
    program = """
        import signal
        from psofa_gevent import PsCallback, PsServer

        server = PsServer(PsCallback(), host="127.0.0.1", port=0)
        try:
            signal.raise_signal(signal.SIGINT)
            server.serve_forever()
        except KeyboardInterrupt:
            print("interrupted", server.started)
    """
    done = run_python(program)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted False\n", "", 0)


@pytest.mark.parametrize("mode", ["unpatched", "patched"])
def test_serve_forever_in_the_main_thread_returns_after_a_shutdown_in_another(mode: str) -> None:
    program = """
        import sys

        if sys.argv[1] == "patched":
            from gevent import monkey
            monkey.patch_all()
        from helpers import NativeThread
        from psofa_gevent import PsServer
        from psofa_gevent.testing import RecordingCallback, ScriptedClient

        class StartsAThread(RecordingCallback):
            def on_open(self, session):
                super().on_open(session)
                threads.append(NativeThread(shut_down))

        def shut_down():
            server.shutdown()
            # Not before all is over.
            return [event.name for event in callback.events]

        def connect():
            with ScriptedClient(server.address) as client:
                client.expect_eof()

        threads = []
        callback = StartsAThread()
        server = PsServer(callback, host="127.0.0.1", port=0)
        server.start()
        client = NativeThread(connect)
        server.serve_forever()
        print("returned", server.started, server.get_session_count())
        print(*threads[0].join(5))  # natively: the hub is of no use to it any more
        client.join(5)
    """
    done = run_python(program, mode)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "returned False 0\non_start on_open on_close on_stop\n"


def test_serve_forever_returns_after_a_shutdown_by_a_callback() -> None:
    with serving_process() as (process, client):
        client.send("shutdown")
        assert process.wait() == 0
        assert process.lines[-4:] == END_OF_A_GRACEFUL_SHUTDOWN


def test_serve_forever_shuts_down_on_the_way_out_of_an_exception() -> None:
    with serving_process() as (process, client):
        client.send("exit")
        assert process.wait() == 3
        assert process.lines[-3:] == ["close FAILED", "stop", "restored"]


def test_signal_for_serve_forever_is_not_for_the_programs_own_handler() -> None:
    with serving_process() as (process, _client):
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "own handler" not in process.lines


def test_serve_forever_again_after_a_signal_handles_the_next_one() -> None:
    program = """
        import gevent
        from psofa_gevent import PsCallback, PsServer

        server = PsServer(PsCallback(), host="127.0.0.1", port=0)
        for number in (1, 2, 3):
            server.start()
            # Printed when the main greenlet waits, its handlers set.
            gevent.spawn(print, "serving", number, flush=True)
            server.serve_forever()
        print("done", flush=True)
    """
    with python_process("-c", textwrap.dedent(program)) as process:
        for number in (1, 2, 3):
            process.expect_line(f"serving {number}")
            process.send_signal(signal.SIGINT)
        process.expect_line("done")
        assert process.wait() == 0


HANDLER_OF_ITS_OWN = """
    import signal
    import sys

    if "no ctypes" in sys.argv:
        sys.modules["ctypes"] = None
    import gevent
    from gevent.queue import Queue
    from psofa_gevent import PsCallback, PsServer

    told = Queue()
    if sys.argv[1] == "gevent":
        handler = gevent.signal_handler(signal.SIGTERM, told.put, "own handler")
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: told.put("own handler"))
    for _ in range(2):
        # Printed when the main greenlet waits, its handlers set.
        gevent.spawn(print, "serving", flush=True)
        PsServer(PsCallback(), host="127.0.0.1", port=0).serve_forever()
        assert told.empty()
        print("returned", flush=True)
        while told.empty():
            # gevent does not see one of Python's that comes just as it begins to wait.
            gevent.sleep(0.01)
        print(told.get(), flush=True)
"""


@pytest.mark.parametrize("arguments", [("gevent",), ("python",), ("python", "no ctypes")])
def test_handler_that_the_program_had_works_again_after_serve_forever(
    arguments: tuple[str, ...],
) -> None:
    with python_process("-c", textwrap.dedent(HANDLER_OF_ITS_OWN), *arguments) as process:
        for _ in range(2):
            for line in ("serving", "returned"):
                process.expect_line(line)
                process.send_signal(signal.SIGTERM)
            process.expect_line("own handler")
        assert process.wait() == 0


def test_serve_forever_in_this_process_restores_the_handlers(on_signal: OnSignal) -> None:
    callback = RecordingCallback()
    server = PsServer(callback, host="127.0.0.1", port=0)

    def own_handler(_number: int, _frame: object) -> None:
        pytest.fail("the signal was for serve_forever")

    before = signal.signal(signal.SIGTERM, own_handler)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        server.start()
        with ScriptedClient(server.address) as client:
            callback.wait_for("on_open")
            terminate = gevent.spawn_later(0.05, signal.raise_signal, signal.SIGTERM)
            server.serve_forever()
            client.expect_eof()
            terminate.get(timeout=SOON)
        assert signal.getsignal(signal.SIGTERM) is own_handler
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
    expect_one_life_each(callback, 1)
    assert callback.named("on_close")[0].value is PsCloseReason.SHUTDOWN


def test_serve_forever_in_another_thread_works_without_signals() -> None:
    callback = RecordingCallback(reply=bytes)
    server = PsServer(callback, host="127.0.0.1", port=0)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = NativeThread(server.serve_forever)
    eventually(lambda: server.started and server.address[1])
    with ScriptedClient(server.address) as client:
        client.send("ping")
        client.expect("ping")
        assert {number: signal.getsignal(number) for number in before} == before
        server.shutdown()
        client.expect_eof()
    thread.join(SOON)
    expect_one_life_each(callback, 1)


def test_serve_forever_in_a_greenlet_of_the_main_thread_handles_signals() -> None:
    server = PsServer(PsCallback(), host="127.0.0.1", port=0)
    serving = gevent.spawn(server.serve_forever)
    eventually(lambda: server.started)
    gevent.sleep(0)
    signal.raise_signal(signal.SIGTERM)
    serving.get(timeout=SOON)


def test_two_servers_in_serve_forever_stop_at_one_signal_and_restore_the_handlers() -> None:
    program = """
        import gevent
        import signal
        from psofa_gevent import PsCallback, PsServer

        before = signal.getsignal(signal.SIGINT)
        servers = [PsServer(PsCallback(), host="127.0.0.1", port=0) for _ in range(2)]
        for server in servers:
            server.start()
        greenlets = [gevent.spawn(server.serve_forever) for server in servers]
        # Printed when both wait, their handlers set.
        gevent.spawn(print, "serving", flush=True)
        gevent.joinall(greenlets, raise_error=True)
        print("restored" if signal.getsignal(signal.SIGINT) is before else "not restored")
    """
    with python_process("-c", textwrap.dedent(program)) as process:
        process.expect_line("serving")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5.0) == 0
        assert process.lines[-1] == "restored"


def test_serve_forever_in_a_thread_beside_one_in_the_main_thread_leaves_signals_to_that() -> None:
    program = """
        import gevent
        import signal
        from helpers import NativeThread
        from psofa_gevent import PsCallback, PsServer
        from psofa_gevent.testing import eventually

        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        here, there = (PsServer(PsCallback(), host="127.0.0.1", port=0) for _ in range(2))
        here.start()

        def go_on():
            global thread
            thread = NativeThread(there.serve_forever)
            eventually(lambda: there.started)
            gevent.sleep(0.1)
            print("serving", flush=True)

        gevent.spawn(go_on)
        here.serve_forever()
        print(here.started, there.started)
        there.shutdown()
        thread.join(5)
        after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        print("restored" if after == before else "not restored")
    """
    with python_process("-c", textwrap.dedent(program)) as process:
        process.expect_line("serving")
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
        assert process.lines[-2:] == ["False True", "restored"]


# Ctrl-C without serve_forever: Python's own KeyboardInterrupt

WITH_SERVER = """
    from psofa_gevent import PsCallback, PsServer

    class Callback(PsCallback):
        def on_message(self, session, message):
            session.send(message)
            print("message", message.decode(), flush=True)
            while message == b"busy":
                pass

        def on_close(self, session, close_reason):
            print("close", close_reason.name, flush=True)

    try:
        with PsServer(Callback(), host="127.0.0.1", port=0) as server:
            print("port", server.address[1], flush=True)
            server.wait_for()
    except KeyboardInterrupt:
        print("interrupted", server.started, server.get_session_count())
"""


@pytest.mark.skipif(
    os.environ.get("GEVENT_LOOP") == "libuv",
    reason="gevent loses a KeyboardInterrupt that hits a callback of its own on libuv",
)
@pytest.mark.parametrize(("message", "reason"), [("idle", "SHUTDOWN"), ("busy", "FAILED")])
def test_keyboard_interrupt_comes_to_main_and_every_on_close_is_delivered(
    message: str, reason: str
) -> None:
    with python_process("-c", textwrap.dedent(WITH_SERVER)) as process:
        port = int(process.expect_line("port").split()[1])
        with ScriptedClient(("127.0.0.1", port)) as client:
            client.send(message)
            client.expect(message)
            process.expect_line(f"message {message}")
            client.expect_nothing(0.2)  # by now the callback that is not busy has returned
            process.send_signal(signal.SIGINT)
            assert process.wait() == 0
    assert f"close {reason}" in process.lines
    assert process.lines[-1] == "interrupted False 0"
