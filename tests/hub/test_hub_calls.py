"""What other OS threads ask of a hub is done in order, at once, and the hub's loop stays intact.

What could take the process down, or needs a hub that has nothing else to do, runs in a process of
its own.
"""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import gevent
import gevent.event
import gevent.socket
import pytest

import psofa_gevent
from helpers import NativeThread, native_sleep, run_python, takes
from psofa_gevent.hub.calls import hub_calls
from psofa_gevent.hub.thread import HubThread
from psofa_gevent.testing import eventually

ON_LIBUV = "libuv" in type(gevent.get_hub().loop).__module__

PREPARE = """
import os, signal, sys, time
if os.environ.get("PSOFA_TEST_PATCHED") == "1":
    from gevent import monkey
    monkey.patch_all()
import gevent, gevent.event, gevent.os
from gevent.exceptions import LoopExit
from helpers import NativeThread, native_sleep
from psofa_gevent import hub_loop
from psofa_gevent.hub.calls import hub_calls
from psofa_gevent.hub.thread import HubThread
"""


def run_program(body: str) -> str:
    """Run a program that has imported what it needs; return what it printed, and nothing else."""
    done = run_python(PREPARE + textwrap.dedent(body))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_calls_of_each_thread_are_run_in_their_order() -> None:
    thread = HubThread()
    got: list[tuple[int, int]] = []

    def ask(number: int) -> None:
        for count in range(1_000):
            thread.call_soon(got.append, (number, count))

    threads = [NativeThread(ask, number) for number in range(4)]
    for each in threads:
        each.wait()
    eventually(lambda: len(got) == 4_000)
    for number in range(4):
        assert [count for asked_by, count in got if asked_by == number] == list(range(1_000))


def test_calls_of_the_hubs_own_thread_keep_their_place_among_them() -> None:
    thread = HubThread()
    got: list[str] = []
    thread.call_soon(got.append, "first")
    NativeThread(thread.call_soon, got.append, "second").join()
    thread.call_soon(got.append, "third")
    assert got == []
    eventually(lambda: len(got) == 3)
    assert got == ["first", "second", "third"]


def test_a_hub_that_waits_notices_a_call_at_once() -> None:
    thread = HubThread()
    called = gevent.event.Event()

    def ask() -> None:
        NativeThread(thread.call_soon, called.set).wait()

    asking = gevent.spawn_later(0.01, ask)
    with takes(most=0.1):
        assert called.wait(30)
    asking.get()


@pytest.mark.hub_errors
def test_a_call_that_raises_is_told_of_and_stops_no_other() -> None:
    thread = HubThread()
    got: list[int] = []
    for number in range(3):
        thread.call_soon(got.append, number)
        thread.call_soon(int, "no number")
    eventually(lambda: got == [0, 1, 2])


def test_calls_that_add_calls_starve_nobody() -> None:
    thread = HubThread()
    count = 0
    stop = False

    def again() -> None:
        nonlocal count
        count += 1
        if not stop:
            thread.call_soon(again)

    thread.call_soon(again)
    ours, theirs = gevent.socket.socketpair()
    with ours, theirs:
        for _ in range(20):
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"
            gevent.sleep(0.001)
    stop = True
    assert count > 20


@pytest.mark.skipif(ON_LIBUV, reason="libuv does not tell how many references it has")
def test_the_count_of_the_loops_references_stays_exact() -> None:
    """Where threads ask while libev stops timers that have fired, which it does without the GIL."""
    thread = HubThread()
    loop = thread.loop
    stop = False

    def ask() -> None:
        while not stop:
            for _ in range(50):
                thread.call_soon(int)
            native_sleep(0)

    gevent.sleep(0.001)
    before = loop.activecnt
    asking = [NativeThread(ask) for _ in range(2)]
    timers = [loop.timer(0) for _ in range(2_000)]
    for _ in range(400):
        for timer in timers:
            timer.start(int)
        gevent.sleep(0.001)
    stop = True
    for each in asking:
        each.wait()
    gevent.sleep(0.001)
    assert loop.activecnt == before


def test_many_threads_that_ask_at_once_do_not_break_the_loop() -> None:
    assert (
        run_program("""
            loop = hub_loop()
            got = 0
            def called():
                global got
                got += 1
            def ask():
                for _ in range(2_000):
                    native_sleep(0.0005)
                    loop.call_soon_threadsafe(called)
            threads = [NativeThread(ask) for _ in range(16)]
            with gevent.Timeout(25):
                for thread in threads:
                    thread.wait(25)
                while got < 32_000:
                    gevent.sleep(0.001)
            print(got)
            """)
        == "32000\n"
    )


def test_a_call_that_is_there_is_run_before_a_hub_without_anything_else_ends() -> None:
    assert (
        run_program("""
            thread = HubThread()
            called = gevent.event.Event()
            for _ in range(20):
                called.clear()
                NativeThread(thread.call_soon, called.set).join()
                called.wait()
            NativeThread(thread.call_soon, print, "before the end").join()
            gevent.wait()

            def last():
                gevent.sleep(0.001)
                thread.call_soon(called.set)
            called.clear()
            gevent.spawn(last)
            called.wait()

            called.clear()
            try:
                called.wait()
            except LoopExit:
                print("LoopExit")
            NativeThread(thread.call_soon, called.set).join()
            called.wait()
            """)
        == "before the end\nLoopExit\n"
    )


@pytest.mark.skipif(ON_LIBUV, reason="gevent itself loses its way at interrupts on libuv")
def test_an_interrupt_reaches_the_main_greenlet_and_loses_no_call() -> None:
    printed = run_program("""
        gevent.get_hub().exception_stream = None
        thread = HubThread()
        got = []
        interrupts = 0
        asked = 0
        stop = False
        def ask():
            global asked
            while not stop:
                thread.call_soon(got.append, asked)
                asked += 1
                if asked % 500 == 0:
                    os.kill(os.getpid(), signal.SIGINT)
                    native_sleep(0.002)
        asking = NativeThread(ask)
        while interrupts < 20:
            try:
                gevent.sleep(60)
            except KeyboardInterrupt:
                interrupts += 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop = True
        asking.join()
        with gevent.Timeout(10):
            while len(got) < asked:
                gevent.sleep(0.001)
        print(got == list(range(asked)))
        """)
    assert printed == "True\n"


@pytest.mark.skipif(not ON_LIBUV, reason="gevent on libev stops no watcher")
def test_a_watcher_that_gevent_has_stopped_is_started_again() -> None:
    """As it does when a signal's handler raises something in its code, or in that of a watcher."""
    calls = hub_calls()
    calls._watcher.stop()
    for _ in range(2):
        called = gevent.event.Event()
        NativeThread(calls.add, called.set, (), {}).join()
        assert called.wait(5)
    assert calls._watcher.callback is not None


def test_a_call_that_exits_ends_the_main_greenlet() -> None:
    done = run_python(
        PREPARE
        + textwrap.dedent("""
        thread = HubThread()
        NativeThread(thread.call_soon, sys.exit, 7).join()
        gevent.sleep(30)
        """)
    )
    assert done.returncode == 7


@pytest.mark.parametrize("ending", ["gevent.get_hub().destroy(destroy_loop=True)", "pass"])
def test_a_hub_that_has_ended_is_asked_in_vain(ending: str) -> None:
    """While it ends too: each time, threads ask a hub whose thread comes to its end."""
    printed = run_program(f"""
        class Living(NativeThread):
            destroys_hub = False

        def live():
            threads.append(HubThread())
            gevent.sleep(0.005)
            {ending}

        def ask(thread):
            while not stop:
                for _ in range(20):
                    thread.call_soon(got.append, 1)
                native_sleep(0)

        for _ in range(30):
            threads, got, stop = [], [], False
            living = Living(live)
            while not threads:
                native_sleep(0.001)
            asking = [NativeThread(ask, threads[0]) for _ in range(2)]
            living.join()
            native_sleep(0.005)
            stop = True
            for each in asking:
                each.join()
            before = len(got)
            threads[0].call_soon(got.append, 2)
            assert 2 not in got
        print("done")
        """)
    assert printed == "done\n"


@pytest.mark.parametrize("fork", ["gevent.os.fork", "os.fork"])
def test_a_child_process_has_calls_of_its_own(fork: str) -> None:
    printed = run_program(f"""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        thread = HubThread()
        called = gevent.event.Event()
        gevent.sleep(0.001)
        NativeThread(thread.call_soon, print, "once, in the parent").join()
        child = {fork}()
        if child == 0:
            gevent.reinit()
            NativeThread(thread.call_soon, called.set).join()
            assert called.wait(10)
            os._exit(7)
        sys.stdout.flush()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert not called.is_set()
        NativeThread(thread.call_soon, called.set).join()
        assert called.wait(10)
        """)
    assert printed == "once, in the parent\n"


def test_sessions_that_come_and_go_while_the_hub_is_busy_do_not_break_the_loop() -> None:
    """On libuv a check watcher that a greenlet stops may be in a list on the hub's C stack."""
    printed = run_program("""
        from psofa_gevent.hub.ready import ready_sessions
        ready, coming = ready_sessions(), True
        def busy():
            while coming:
                until = time.perf_counter() + 0.0002
                while time.perf_counter() < until:
                    pass
                gevent.sleep(0)
        def come_and_go():
            global coming
            for _ in range(20):
                ready.register()
                gevent.sleep(0)
                ready.unregister()
                gevent.sleep(0)
            coming = False
        gevent.joinall([gevent.spawn(come_and_go)] + [gevent.spawn(busy) for _ in range(150)])
        print("done")
        """)
    assert printed == "done\n"


def test_nothing_of_ours_uses_the_threadsafe_callback_of_gevent() -> None:
    users = [
        f"{path.name}:{node.lineno}"
        for path in Path(psofa_gevent.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "run_callback_threadsafe"
    ]
    assert users == []


@pytest.mark.parametrize("forks", ["fork()", "NativeThread(fork).join()"])
def test_a_fork_in_the_middle_of_another_threads_call_does_not_hang(forks: str) -> None:
    """Python drops what other threads had before the hooks of a fork: one may hold a lock of ours.

    And nothing of theirs is closed in the child, nor does a coroutine run to its end there.
    """
    printed = run_program(f"""
        import asyncio, warnings
        from gevent import monkey
        from psofa_gevent import spawn_coroutine
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads

        async def wait_for_the_end():
            try:
                while not over:
                    await asyncio.sleep(0.001)
            finally:
                if os.getpid() != parent:
                    print("it runs in the child", flush=True)

        def live():
            waiting = spawn_coroutine(wait_for_the_end())
            threads.append(HubThread())
            waiting.join()

        def hold():
            with threads[0]._calls._lock:
                held.append(1)
                while not children:
                    native_sleep(0.001)

        def fork():
            child = monkey.get_original("os", "fork")()
            if child == 0:
                os._exit(7)
            children.append(child)

        parent = os.getpid()
        threads, held, children, over = [], [], [], []
        living = NativeThread(live)
        while not threads:
            native_sleep(0.001)
        holding = NativeThread(hold)
        while not held:
            native_sleep(0.001)
        {forks}
        ended, deadline = (0, 0), time.monotonic() + 20
        while ended[0] == 0 and time.monotonic() < deadline:
            ended = monkey.get_original("os", "waitpid")(children[0], os.WNOHANG)
            native_sleep(0.01)
        assert ended[0] and os.waitstatus_to_exitcode(ended[1]) == 7, ended
        over.append(1)
        living.join()
        holding.join()
        print("done")
        """)
    assert printed == "done\n"
