"""The loop of a hub: all that asyncio offers works on it, and gevent does not notice it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import selectors
import socket
import sys
import textwrap
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gevent
import gevent.socket
import pytest

from helpers import NativeThread, run_python, takes
from psofa_gevent.aio.coroutines import hub_loop, run_coroutine, spawn_coroutine
from psofa_gevent.aio.selector import HubSelector
from psofa_gevent.testing import eventually

PREPARE = """
import os
if os.environ.get("PSOFA_TEST_PATCHED") == "1":
    from gevent import monkey
    monkey.patch_all()
import asyncio, gevent, gevent.event, sys, time
from psofa_gevent import hub_loop, run_coroutine, spawn_coroutine
"""


def run_program(body: str, *, environment: dict[str, str] | None = None) -> str:
    """Run a program that has imported what it needs; return what it printed, and nothing else."""
    done = run_python(PREPARE + textwrap.dedent(body), environment=environment)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


# asyncio, as it is known


def test_task_groups_timeouts_and_gather_work() -> None:
    async def work(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def main() -> list[float]:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.005):
                await asyncio.sleep(60)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(60), 0.005)
        with pytest.raises(ExceptionGroup):
            await group(work(60), fail())
        await group(work(0.003), work(0.002))
        return list(await asyncio.gather(work(0.001), work(0)))

    async def group(*coroutines: Coroutine[Any, Any, float]) -> None:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)

    async def fail() -> float:
        return 1 / 0

    assert run_coroutine(main()) == [0.001, 0]


def test_sleeps_take_as_long_as_they_say() -> None:
    async def nap() -> None:
        with takes(0.05, most=0.05):
            await asyncio.sleep(0.05)

    run_coroutine(nap())


def test_async_generators_that_nobody_finished_are_closed_on_the_loop() -> None:
    closed: list[bool] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(10):
                await asyncio.sleep(0)
                yield number
        finally:
            await asyncio.sleep(0)
            closed.append(asyncio.get_running_loop() is hub_loop())

    async def main() -> int:
        async for number in numbers():
            await asyncio.sleep(0.001)
            if number == 3:
                break
        return number

    assert run_coroutine(main()) == 3
    eventually(lambda: closed == [True])


def test_async_generators_of_other_loops_are_left_to_them() -> None:
    hooks = sys.get_asyncgen_hooks()
    sleeping = spawn_coroutine(asyncio.sleep(60))
    run_coroutine(asyncio.sleep(0))  # when this has had its turn, so has that
    assert sys.get_asyncgen_hooks() == hooks
    sleeping.kill()


def test_streams_connect_a_server_and_many_clients() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while line := await reader.readline():
                writer.write(line.upper() * 1000)
                await writer.drain()

    async def ask(port: int, text: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for _ in range(10):
                writer.write(text + b"\n")
                answer = await reader.readexactly(1000 * (len(text) + 1))
            return answer[: len(text)]
        finally:
            writer.close()
            await writer.wait_closed()

    server = run_coroutine(asyncio.start_server(serve, "127.0.0.1", 0))
    port = server.sockets[0].getsockname()[1]
    clients = [spawn_coroutine(ask(port, b"client %d" % number)) for number in range(50)]
    try:
        assert [each.get() for each in clients] == [b"CLIENT %d" % number for number in range(50)]
        # A greenlet on the same hub is a client like any other.
        with gevent.socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            sock.sendall(b"x\n")
            assert sock.makefile("rb").read(2000) == b"X\n" * 1000
    finally:
        server.close()
        run_coroutine(server.wait_closed())


def test_readers_and_writers_are_called_and_removed() -> None:
    ours, theirs = socket.socketpair()
    loop = hub_loop()
    got: list[bytes] = []
    writable: list[bool] = []

    def read() -> None:
        got.append(ours.recv(10))
        if len(got) == 2:
            assert loop.remove_reader(ours)

    def write() -> None:
        writable.append(True)
        loop.remove_writer(ours)

    with ours, theirs:
        ours.setblocking(False)
        loop.add_reader(ours, read)
        loop.add_writer(ours.fileno(), write)
        theirs.send(b"one")
        eventually(lambda: len(got) == 1)
        theirs.send(b"two")
        eventually(lambda: len(got) == 2)
        theirs.send(b"three")
        gevent.sleep(0.01)
        assert got == [b"one", b"two"]
        assert writable == [True]
        assert not loop.remove_reader(ours)


def test_calls_from_greenlets_wake_the_loop() -> None:
    loop = hub_loop()
    called: list[str] = []
    run_coroutine(asyncio.sleep(0))
    sleeping = spawn_coroutine(asyncio.sleep(60))
    run_coroutine(asyncio.sleep(0))  # when this has had its turn, so has that
    loop.call_later(0.002, called.append, "later")
    loop.call_soon(called.append, "soon")
    loop.call_later(0, called.append, "now").cancel()
    eventually(lambda: len(called) == 2, timeout=1)
    assert called == ["soon", "later"]
    sleeping.kill()


def test_an_executor_is_awaited() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(2) as pool:
            calls = [loop.run_in_executor(pool, pow, 2, number) for number in range(5)]
            return sum(await asyncio.gather(*calls))

    assert run_coroutine(main()) == 31


@pytest.mark.parametrize("patched", ["0", "1"])
def test_to_thread_waits_in_nobodys_way_and_keeps_the_hub_alive(patched: str) -> None:
    printed = run_program(
        """
        async def main():
            began = time.monotonic()
            await asyncio.gather(*(asyncio.to_thread(time.sleep, 1.0) for _ in range(3)))
            print(1.0 <= time.monotonic() - began < 2.9, ticks > 5)
            asyncio.get_running_loop().run_in_executor(None, late)

        def late():
            time.sleep(0.1)
            print("the hub was there until the end")

        def tick():
            global ticks
            while not main.ready():
                gevent.sleep(0.01)
                ticks += 1

        ticks = 0
        main = spawn_coroutine(main())
        gevent.spawn(tick)
        gevent.wait()
        """,
        environment={"PSOFA_TEST_PATCHED": patched},
    )
    assert printed == "True True\nthe hub was there until the end\n"


POLICIES = {
    "the default": "",
    "one without child watchers": """
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of all policies, since 3.14
            class Policy(asyncio.AbstractEventLoopPolicy):
                pass
            asyncio.set_event_loop_policy(Policy())
        """,
    "uvloop's": """
        import uvloop, warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of install, since 3.12
            uvloop.install()
        """,
}


@pytest.mark.parametrize("patched", ["0", "1"])
@pytest.mark.parametrize("policy", POLICIES)
def test_subprocesses_are_run_and_awaited(policy: str, patched: str) -> None:
    if "uvloop" in policy:
        pytest.importorskip("uvloop")
    elif policy != "the default" and sys.version_info >= (3, 16):
        pytest.skip("this Python has no event loop policies")
    printed = run_program(
        POLICIES[policy]
        + """
        async def run(number):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", f"print(input()); raise SystemExit({number})",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate(b"hello %d" % number)
            return output.decode().strip(), process.returncode

        async def killed():
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE
            )
            process.kill()
            return await process.wait()

        async def main():
            print(await asyncio.gather(run(0), run(7), killed()))

        run_coroutine(main())
        """,
        environment={"PSOFA_TEST_PATCHED": patched},
    )
    assert printed == "[('hello 0', 0), ('hello 7', 7), -9]\n"


def test_subprocesses_are_awaited_where_the_system_gives_no_descriptors_of_them() -> None:
    printed = run_program(
        """
        import os
        if hasattr(os, "pidfd_open"):
            del os.pidfd_open

        async def main():
            shell = await asyncio.create_subprocess_shell("exit 7")
            print(await shell.wait())

        spawn_coroutine(main())
        gevent.wait()
        """
    )
    assert printed == "7\n"


def test_signal_handlers_are_called_while_everything_waits() -> None:
    printed = run_program(
        """
        import signal
        async def main():
            loop = asyncio.get_running_loop()
            got = asyncio.Event()
            loop.add_signal_handler(signal.SIGUSR1, got.set)
            for _ in range(3):
                loop.call_later(0.05, os.kill, os.getpid(), signal.SIGUSR1)
                await got.wait()
                got.clear()
            print(loop.remove_signal_handler(signal.SIGUSR1))

        run_coroutine(main(), timeout=10)
        """
    )
    assert printed == "True\n"


def test_debug_mode_works() -> None:
    printed = run_program(
        """
        import logging
        logging.basicConfig()
        async def main():
            assert asyncio.get_running_loop().get_debug()
            gevent.sleep(0.2)
            async with asyncio.timeout(5):
                await asyncio.sleep(0.001)
            return "done"

        def call():
            hub_loop().call_soon(print, "called")
            print(gevent.get_hub().threadpool.apply(call_from_thread, (hub_loop(),)))

        def call_from_thread(loop):
            try:
                loop.call_soon(print, "not called")
            except RuntimeError as error:
                return error

        hub_loop().slow_callback_duration = 5
        print(*{gevent.spawn(run_coroutine, main()).get() for _ in range(3)})
        gevent.spawn(call).join()
        """,
        environment={"PYTHONASYNCIODEBUG": "1"},
    )
    assert printed == "done\ncalled\nthe loop of another thread's hub: use call_soon_threadsafe\n"


@pytest.mark.parametrize("how", ["PYTHONASYNCIODEBUG", "set_debug"])
def test_debug_mode_reports_async_callbacks_that_block_in_any_step(how: str) -> None:
    done = run_python(
        PREPARE
        + textwrap.dedent("""
        import logging
        from helpers import native_sleep
        from psofa_gevent import PsCallback, PsClient, PsServer
        logging.basicConfig(format="%(name)s: %(message)s")
        if not os.environ["PYTHONASYNCIODEBUG"]:
            hub_loop().set_debug(True)
        hub_loop().slow_callback_duration = 0.2

        class Callback(PsCallback):
            use_async_callback = True

            async def on_open_async(self, session):
                native_sleep(0.3)

            async def on_message_async(self, session, message):
                await asyncio.sleep(0.001)
                native_sleep(0.3)
                await session.send_async("seen")

        with PsServer(Callback(), host="127.0.0.1", port=0) as server:
            with PsClient(PsCallback(), *server.address) as client:
                client.session.send("x")
                while not client.session.messages_received:
                    gevent.sleep(0.001)
        """),
        environment={"PYTHONASYNCIODEBUG": "1" if how == "PYTHONASYNCIODEBUG" else ""},
    )
    reports = done.stderr.splitlines()
    assert all(report.startswith("asyncio: Executing <Task ") for report in reports)
    blocked = {report.partition("coro=<")[2].partition("()")[0] for report in reports}
    assert blocked >= {"Callback.on_open_async", "Callback.on_message_async"}


def test_another_loop_runs_beside_it_in_a_patched_process() -> None:
    printed = run_program(
        """
        async def count(name):
            for number in range(5):
                seen.append(name)
                await asyncio.sleep(0.01)
                assert asyncio.get_running_loop() is (hub_loop() if name == "ours" else other)
            return name

        async def theirs():
            global other
            other = asyncio.get_running_loop()
            return await count("theirs")

        seen = []
        ours = spawn_coroutine(count("ours"))
        other = gevent.spawn(asyncio.run, theirs())
        print(ours.get(), other.get() if isinstance(other, gevent.Greenlet) else "theirs")
        print(any(seen[i] != seen[i + 1] for i in range(2, 6)))
        gevent.sleep(0.01)
        """,
        # On libuv gevent's own selector, which the other loop uses, warns of short timers.
        environment={"PSOFA_TEST_PATCHED": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert printed == "ours theirs\nTrue\n"


def test_coroutines_of_another_loop_run_coroutines_on_ours() -> None:
    """Where one loop's step waits for another loop, each keeps its own current task."""
    printed = run_program(
        """
        async def ours():
            await asyncio.sleep(0.001)
            return asyncio.get_running_loop() is hub_loop(), asyncio.current_task().get_name()

        async def theirs():
            asyncio.current_task().set_name("theirs")
            print(*run_coroutine(ours()))
            await asyncio.sleep(0.001)
            print(asyncio.get_running_loop() is hub_loop(), asyncio.current_task().get_name())

        asyncio.run(theirs())
        """,
    )
    ours, theirs = printed.splitlines()
    assert ours.startswith("True Task-")
    assert theirs == "False theirs"


def test_the_loop_runs_by_itself_only() -> None:
    with pytest.raises(RuntimeError):
        hub_loop().run_until_complete(hub_loop().create_future())
    with pytest.raises(RuntimeError):
        hub_loop().close()  # which may not have run yet
    hub_loop().stop()

    def run_it_before_it_runs() -> None:
        hub_loop().run_forever()

    with pytest.raises(RuntimeError, match="by itself"):
        NativeThread(run_it_before_it_runs).wait()
    assert run_coroutine(asyncio.sleep(0.001, "still there")) == "still there"


# A good citizen of the hub


def test_coroutines_that_never_wait_starve_nobody() -> None:
    stop = False

    async def spin() -> int:
        count = 0
        while not stop:
            count += 1
            await asyncio.sleep(0)
        return count

    spinning = [spawn_coroutine(spin()) for _ in range(3)]
    ours, theirs = gevent.socket.socketpair()

    def echo() -> None:
        while data := theirs.recv(10):
            theirs.sendall(data)

    echoing = gevent.spawn(echo)
    with ours, theirs:
        for _ in range(50):
            ours.sendall(b"ping")
            assert ours.recv(10) == b"ping"
        gevent.sleep(0.001)
        assert run_coroutine(asyncio.sleep(0.001, "served")) == "served"
        stop = True
        ours.shutdown(socket.SHUT_WR)
        echoing.join()
    assert all(each.get() > 50 for each in spinning)


def test_a_held_loop_with_bytes_to_read_does_not_keep_the_hub_busy() -> None:
    ours, theirs = socket.socketpair()
    got: list[bytes] = []
    with ours, theirs:
        hub_loop().add_reader(ours, lambda: got.append(ours.recv(10)))
        gevent.sleep(0.001)

        async def hold() -> float:
            theirs.send(b"unread")
            before = time.process_time()
            gevent.sleep(0.3)
            return time.process_time() - before

        assert run_coroutine(hold()) < 0.1
        eventually(lambda: got == [b"unread"])
        hub_loop().remove_reader(ours)


def test_an_idle_loop_does_not_keep_the_hub_alive() -> None:
    printed = run_program(
        """
        async def main():
            await asyncio.sleep(0.001)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await reader.read()
            writer.close()
            await writer.wait_closed()

        from gevent.server import StreamServer
        server = StreamServer(("127.0.0.1", 0), lambda sock, _: sock.close())
        server.start()
        port = server.server_port
        run_coroutine(main(), timeout=5)
        server.stop()
        print(gevent.wait(timeout=5))
        try:
            gevent.event.Event().wait()
        except gevent.exceptions.LoopExit:
            print("LoopExit")
        print(run_coroutine(asyncio.sleep(0.001, "and again")))
        """
    )
    assert printed == "True\nLoopExit\nand again\n"


def test_what_a_waiting_coroutine_needs_keeps_the_hub_alive() -> None:
    printed = run_program(
        """
        from gevent import monkey
        start_thread = monkey.get_original("_thread", "start_new_thread")
        sleep = monkey.get_original("time", "sleep")

        async def main():
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            def answer():
                sleep(0.1)
                loop.call_soon_threadsafe(future.set_result, "from a thread")
            start_thread(answer, ())
            return await future

        async def sleep_in_background():
            background.add(asyncio.create_task(late()))

        async def late():
            await asyncio.sleep(0.05)
            print("late")

        background = set()
        print(run_coroutine(main()))
        run_coroutine(sleep_in_background())
        gevent.wait()
        """
    )
    assert printed == "from a thread\nlate\n"


def test_a_process_that_used_the_loop_ends_quietly() -> None:
    printed = run_program(
        """
        import logging
        logging.basicConfig()
        run_coroutine(asyncio.sleep(0.001))
        async def forever():
            await asyncio.get_running_loop().create_future()
        spawn_coroutine(forever())
        run_coroutine(asyncio.sleep(0))
        print("end")
        """,
        environment={"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error", "PYTHONASYNCIODEBUG": "0"},
    )
    assert printed == "end\n"


def test_a_forked_child_makes_a_loop_of_its_own_and_leaves_its_parents_alone() -> None:
    printed = run_program(
        """
        import socket
        from gevent.os import fork, waitpid
        ours, theirs = socket.socketpair()

        async def read():
            reader, writer = await asyncio.open_connection(sock=ours)
            connected.set()
            return await reader.readexactly(4)

        connected = gevent.event.Event()
        reading = spawn_coroutine(read())
        connected.wait()
        parents = hub_loop()
        pid = fork()
        if not pid:
            theirs.send(b"12")
            assert hub_loop() is not parents
            assert run_coroutine(asyncio.sleep(0.1, True))
            assert not reading.ready()
            os._exit(7)
        print(os.waitstatus_to_exitcode(waitpid(pid, 0)[1]))
        theirs.send(b"34")
        print(reading.get(timeout=5))
        print(hub_loop() is parents)
        run_coroutine(asyncio.sleep(0.001))
        """
    )
    assert printed == "7\nb'1234'\nTrue\n"


# A destroyed hub has closed them itself.
@pytest.mark.filterwarnings("ignore:Failed to close watcher:ResourceWarning")
def test_a_loop_ends_with_its_thread() -> None:
    def use() -> Any:
        loop = hub_loop()
        run_coroutine(asyncio.sleep(0.001))
        return loop

    def use_under_another_hub() -> bool:
        first = use()
        gevent.get_hub().destroy(destroy_loop=True)
        second = use()
        return first is not second and first.is_closed() and not second.is_closed()

    loop = NativeThread(use).wait()
    eventually(loop.is_closed)
    assert NativeThread(use_under_another_hub).wait()
    reference = NativeThread(lambda: weakref.ref(use())).wait()
    eventually(lambda: gc.collect() >= 0 and reference() is None)


def test_threads_that_end_leave_nothing_to_say() -> None:
    printed = run_program(
        """
        import logging, threading
        logging.basicConfig()

        async def hold():
            holding.set()
            event.wait()

        def use(how):
            global event, holding
            run_coroutine(asyncio.sleep(0.001))
            if how == "held":
                event, holding = gevent.event.Event(), gevent.event.Event()
                spawn_coroutine(hold())
                holding.wait()
            if how == "unused":
                hub_loop()

        for how in ("used", "held", "unused"):
            thread = threading.Thread(target=use, args=[how])
            thread.start()
            thread.join()
        print("end")
        """,
        environment={"PSOFA_TEST_PATCHED": "0"},  # real threads
    )
    assert printed == "end\n"


def test_a_stray_kill_of_the_loops_greenlet_is_reported_and_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reported: list[dict[str, Any]] = []
    loop = hub_loop()
    loop.set_exception_handler(lambda _loop, context: reported.append(context))
    sleeping = spawn_coroutine(asyncio.sleep(0.02, "slept"))
    run_coroutine(asyncio.sleep(0))  # when this has had its turn, so has that
    gevent.kill(loop.greenlet)
    assert sleeping.get(timeout=5) == "slept"
    assert "GreenletExit" in reported[0]["message"]
    loop.set_exception_handler(None)


def test_a_signal_that_interrupts_the_hub_leaves_the_loop_working() -> None:
    printed = run_program(
        """
        import subprocess
        gevent.get_hub().exception_stream = False  # it would print what hits it
        sleeping = spawn_coroutine(asyncio.sleep(0.5, "slept"))
        with subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -INT {os.getpid()}"]):
            try:
                run_coroutine(asyncio.sleep(60))
            except KeyboardInterrupt:
                print("interrupted")
        print(sleeping.get(timeout=5))
        """
    )
    assert printed == "interrupted\nslept\n"


# The selector


@pytest.fixture
def selector() -> Iterator[HubSelector]:
    """A selector that never waits: parking only lets the hub run for a moment."""

    def park() -> None:
        for _ in range(3):  # on a busy machine a timer may win over an event of the same turn
            gevent.sleep(0.002)

    selector = HubSelector(gevent.get_hub(), park, lambda: None)
    yield selector
    selector.close()


def test_a_selector_tells_which_descriptors_are_ready(selector: HubSelector) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        key = selector.register(ours, selectors.EVENT_READ, "data")
        assert key == (ours, ours.fileno(), selectors.EVENT_READ, "data")
        assert selector.select(0.01) == []
        theirs.send(b"x")
        assert selector.select() == [(key, selectors.EVENT_READ)]
        # It is a level, not an edge: reported until it is read.
        assert selector.select() == [(key, selectors.EVENT_READ)]
        both = selector.modify(ours, selectors.EVENT_READ | selectors.EVENT_WRITE)
        assert selector.select() == [(both, both.events)]
        ours.recv(1)
        assert selector.select() == [(both, selectors.EVENT_WRITE)]
        assert selector.get_key(ours.fileno()) == both
        assert dict(selector.get_map()) == {ours.fileno(): both}
        selector.unregister(ours)
        assert selector.select() == []
        assert len(selector.get_map()) == 0


def test_a_selector_refuses_what_makes_no_sense(selector: HubSelector) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for events in (0, 8):
            with pytest.raises(ValueError, match="events"):
                selector.register(ours, events)
        selector.register(ours, selectors.EVENT_READ)
        with pytest.raises(KeyError, match="registered already"):
            selector.register(ours.fileno(), selectors.EVENT_WRITE)
        with pytest.raises(KeyError):
            selector.unregister(theirs)
        selector.unregister(ours)


def test_what_was_unregistered_before_it_was_selected_is_forgotten(selector: HubSelector) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        selector.register(ours, selectors.EVENT_WRITE)
        selector.unregister(ours)
        key = selector.register(ours, selectors.EVENT_WRITE)
        assert selector.select() == [(key, selectors.EVENT_WRITE)]
